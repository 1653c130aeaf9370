"""A stream whose older history is real: what tells whether a stream drifts because of its cache or of its denoiser.

References:
  OPSD-V, arXiv 2607.08766: old cache entries are replaced by real frames, the last generated chunk stays.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.ops.attention import backends
from greedy_distill_jax.ops.attention.backends.record import Backend
from greedy_distill_jax.streaming.causal import CausalState, CausalStreamer
from greedy_distill_jax.streaming.etm_sdd import Streamer, StreamState
from greedy_distill_jax.streaming.make import make_streamer

Chunk = Float32[np.ndarray, "B g H W C"]


def refreshed_stream(
    streamer: Streamer | CausalStreamer,
    params: Any,
    state: StreamState | CausalState,
    real_BTHWC: Float32[np.ndarray, "B T H W C"],
    *,
    start: int = 0,
    keep: int = 1,
    redraw: Callable[[Chunk], Chunk] | None = None,
) -> Float32[np.ndarray, "B T H W C"]:
    """A stream of T frames that makes every chunk on real history, except for its own ``keep`` chunks just before it.

    A second state observes the real history. Every chunk starts from that state, which first observes the stream's own
    last chunks: rings, sinks and frame 0 hold what a stream of exactly these frames would have left there. Noise is
    that of the plain stream, and so are the first ``keep`` + 1 chunks that are made, which have no older history; with
    ``keep`` of at least all chunks that are made it is the plain stream. In context mode "last_step_kv" the chunks of
    the history have the keys of given ones (``Streamer.observe``). A chunk costs ``keep`` + 1 observations more.

    Args:
      streamer, params: of the student.
      state: an empty stream, of ``Streamer.init``.
      real_BTHWC: real videos of the stream's prompts.
      start: frames that the stream begins with, taken from the real videos. Without, whatever prompts do not tell is
        another in the stream than in its history.
      keep: chunks; with 0 all history is real.
      redraw: makes a real chunk of one of the stream's own, which takes its place; None for the real video's chunk at
        the same positions, as in the paper. By then that video has gone another way than the stream, and a student
        whose history contradicts its last chunk may answer worse than on its own history.
    """
    observe, step, go_on = _programs(streamer.cfg, streamer.plan, backends.BACKENDS)
    given, chunks = (streamer.student.chunks_of(n) if n else 0 for n in (start, real_BTHWC.shape[1]))
    real = np.split(real_BTHWC, chunks, axis=1)
    for x0 in real[:given]:
        state = observe(params, state, x0)
    past, made = state, []
    for i in range(chunks - given):
        if i <= keep:
            state, x0 = step(params, state)
        else:
            leaving = i - keep - 1
            older = real[given + leaving] if redraw is None else redraw(made[leaving])
            past, x0 = go_on(params, past, older, made[leaving + 1 :])
        made.append(np.asarray(x0))
    return np.concatenate([*real[:given], *made], axis=1)


@functools.lru_cache(maxsize=8)
def _programs(student_config, plan: StepPlan, chosen_from: tuple[Backend, ...]):
    """Jitted ``observe`` and ``step``, and the step on a history that has become one real chunk longer."""
    del chosen_from  # of the key only, as in ``session``
    streamer = make_streamer(make_student(student_config), plan)

    def observe(params, state, x0):
        return streamer.observe(params, state, x0)[0]

    def go_on(params, past, older, own):
        past = present = observe(params, past, older)
        for x0 in own:
            present = observe(params, present, x0)
        return past, streamer.step(params, present)[1]

    return jax.jit(observe), jax.jit(streamer.step), jax.jit(go_on)
