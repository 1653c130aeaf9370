"""One step ahead on real history: does the student predict the next frame better than repeating the last one?

The prediction is the student's x0 at sigma 1, a single evaluation from pure noise. At sigma 1 its input holds nothing
of the frame, so a trained student answers with the mean of the frames that can follow.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.eval import gates
from greedy_distill_jax.eval.comparison import Comparison
from greedy_distill_jax.eval.suites import Column, Measured, Suite
from greedy_distill_jax.models.students.base import History, StreamingModel


def psnr(a: UInt8[np.ndarray, "*shape"], b: UInt8[np.ndarray, "*shape"]) -> float:
    """Returns the peak signal-to-noise ratio in dB, from the mean squared error over everything."""
    error = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))
    return float(10 * np.log10(255.0**2 / error)) if error else float("inf")


def next_frame_psnr(
    student: StreamingModel,
    params: Any,
    codec: VideoCodec,
    videos_VTHWC: UInt8[np.ndarray, "V T H W 3"],
    text_VMC: Float[Array, "V M C"],
    plan: StepPlan,
    *,
    batch: int = 8,
    seed: int = 0,
) -> dict[str, float]:
    """Measures the PSNR in dB over chunks 2.. of real videos.

    Args:
      student, params: of the prediction, given the real frames before a chunk.
      codec: between pixels and the student's latents.
      videos_VTHWC: real videos.
      text_VMC: rows of their captions.
      plan: the student sees the real frames as its stream of this plan keeps its own.
      batch: videos at a time.
      seed: of the noise.

    Returns:
      student: predicted frame, decoded, against the real one.
      repeat: the last real frame against the real one.
      repeat_decoded: the last frame through the codec; the student cannot do better at copying.
      codec: the real frame through the codec, the ceiling of every prediction.
    """
    chunk = student.cfg.chunk

    @jax.jit
    def predict(params, latents, text, key):
        noise = jax.random.normal(key, latents.shape, jnp.float32)
        one, chunks = jnp.ones((len(latents), 1), jnp.float32), student.chunks_of(latents.shape[1])
        level = jnp.repeat(plan.context_sigma(jnp.arange(chunks)), chunk)[None]
        seen = latents
        if not plan.keeps_clean:
            seen = flow.add_noise(latents, jax.random.normal(jax.random.fold_in(key, 1), latents.shape), level)
        velocity = student(params, noise, one, text, History(seen, level))
        return flow.x0_from_velocity(noise, velocity, one)

    predicted, decoded = [], []
    for begin in range(0, len(videos_VTHWC), batch):
        part = slice(begin, begin + batch)
        latents = codec.encode(videos_VTHWC[part])
        key = jax.random.fold_in(jax.random.key(seed), begin)
        x0 = np.asarray(predict(params, jnp.asarray(latents), text_VMC[part], key))
        predicted.append(codec.decode(x0))
        decoded.append(codec.decode(latents))
    predicted, decoded = np.concatenate(predicted), np.concatenate(decoded)
    real = videos_VTHWC[:, 2 * chunk :]
    last = np.repeat(videos_VTHWC[:, 2 * chunk - 1 : -chunk : chunk], chunk, axis=1)
    last_decoded = np.repeat(decoded[:, 2 * chunk - 1 : -chunk : chunk], chunk, axis=1)
    return {
        "student": psnr(predicted[:, 2 * chunk :], real),
        "repeat": psnr(last, real),
        "repeat_decoded": psnr(last_decoded, real),
        "codec": psnr(decoded[:, 2 * chunk :], real),
    }


def measure(comparison: Comparison) -> Measured:
    """Measures the student's prediction on the real videos of the comparison, and what it is compared with."""
    student, real = comparison.student, comparison.entries["data"].video_VTHWC
    scores = next_frame_psnr(
        student.model, student.params, student.codec, real, student.text(comparison.captions), student.settings.plan
    )
    return Measured([{"prediction": name, "psnr": value} for name, value in scores.items()])


def claims(measured: Measured, comparison: Comparison) -> list[dict[str, Any]]:
    """Claims that the student predicts better than the last frame does."""
    found = {row["prediction"]: row["psnr"] for row in measured.rows}
    name = "next frame, PSNR in dB: the student against repeating the last frame"
    passed = found["student"] > found["repeat"]
    return [gates.gate(name, round(found["student"], 2), f"> {found['repeat']:.2f}", passed)]


SUITE = Suite(
    name="next_frame",
    title="The next frame",
    text="One evaluation given the real frames before it, on held-out windows. Repeating the last frame is what a "
    "student that learned nothing about motion can do; no prediction can be better than the codec.",
    columns=(
        Column("prediction", "Prediction", format="text"),
        Column("psnr", "PSNR", "Peak signal-to-noise ratio to the real frame.", unit="dB", better="higher"),
    ),
    measure=measure,
    gates=claims,
    applies=lambda comparison: not comparison.of_shapes,
)
