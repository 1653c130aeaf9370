"""How many bytes a stream keeps between frames: the same for any length, unlike the cache of a full-causal model."""

import jax
import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.eval.comparison import Comparison
from greedy_distill_jax.eval.suites import Column, Measured, Suite
from greedy_distill_jax.eval.time_per_frame import kind_of, timed_lengths
from greedy_distill_jax.streaming.loop import cache_bytes


def measure(comparison: Comparison) -> Measured:
    """Counts the bytes of the student's state, and of the keys and values of all frames at the longest timed length."""
    teacher, student = comparison.teacher, comparison.student
    streamer, latent_shape = student.streamer(comparison.few_steps), student.latent_shape[1:]
    text = student.text(comparison.captions[:1])
    state = jax.eval_shape(lambda p, key: streamer.init(p, text, key, latent_shape), student.params, jax.random.key(0))
    cfg, frames = teacher.model.cfg, max(timed_lengths(comparison))
    tokens = int(np.prod(latent_shape[:2])) // cfg.patch**2
    per_frame = 2 * cfg.num_layers * cfg.dim * tokens * jnp.dtype(cfg.dtype).itemsize
    return Measured(
        [
            {"cache": f"{kind_of(streamer)}, any length", "bytes": cache_bytes(state)},
            {"cache": f"full_causal, {frames} frames", "bytes": per_frame * frames},
        ]
    )


SUITE = Suite(
    name="cache_bytes",
    title="Size of the cache",
    text="What a stream keeps between frames. It must not grow with the video; smaller is better.",
    columns=(Column("cache", "Cache", format="text"), Column("bytes", "Size", format="bytes", better="lower")),
    measure=measure,
)
