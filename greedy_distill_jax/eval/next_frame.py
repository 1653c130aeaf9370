"""One step ahead on real history: does the student predict the next frame better than repeating the last one?

The prediction is the student's x0 at sigma 1, a single evaluation from pure noise. At sigma 1 its input holds nothing
of the frame, so a trained student answers with the mean of the frames that can follow.
"""

import jax
import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.models.students.base import History, StreamingModel


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 arrays in dB, from the mean squared error over everything."""
    error = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))
    return float(10 * np.log10(255.0**2 / error)) if error else float("inf")


def next_frame_psnr(
    student: StreamingModel,
    params,
    codec: PatchCodec,
    videos_VTHWC: np.ndarray,
    text_BMC,
    plan: StepPlan,
    *,
    batch: int = 8,
    seed: int = 0,
) -> dict[str, float]:
    """PSNR in dB over chunks 2.. of real videos, which the student sees as its stream of ``plan`` keeps its own.

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
        x0 = np.asarray(predict(params, jnp.asarray(latents), text_BMC[part], key))
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
