"""Networks as the losses see them: ``net(x, sigma, batch) -> velocity``."""

import jax
import jax.numpy as jnp
from einops import rearrange

from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.models.students.base import History, StreamingModel
from greedy_distill_jax.models.wan.dit import Teacher


def teacher_net(teacher: Teacher, params, key):
    """``net(x, sigma, batch)`` of the bidirectional teacher."""
    del key
    return lambda x, sigma, batch: teacher(params, x, sigma, batch["text"])


def student_net(
    student: StreamingModel,
    params,
    key,
    *,
    context_noise: float = 0.0,
    last_sigmas: tuple[float, float] | None = None,
):
    """Teacher-forced ``net(x, sigma, batch)``: every chunk sees the batch's own frames before it.

    Args:
      student, params: any student.
      key: for the noise on the history.
      context_noise: the history is noised to a level drawn from U(0, context_noise) per video, and the networks
        are told the level (robustness to their own errors; docs/method.md, section 6).
      last_sigmas: with context mode "last_step_kv" the history behind the keys (of ETM + SDD: SDD's) is at these
        levels (of the first chunk, of the others), as it will be when streaming.
    """
    key_level, key_noise, key_last = jax.random.split(key, 3)

    def net(x, sigma, batch):
        frames = batch["latents"].astype(jnp.float32)
        level = context_noise * jax.random.uniform(key_level, (frames.shape[0], 1), jnp.float32)
        clean = frames
        if context_noise:
            frames = flow.add_noise(clean, jax.random.normal(key_noise, clean.shape, jnp.float32), level)
        history = History(frames, level)
        if last_sigmas is not None:
            is_first = jnp.arange(frames.shape[1]) < student.cfg.chunk
            last = jnp.where(is_first, *(jnp.float32(x) for x in last_sigmas))
            last = jnp.broadcast_to(last[None], frames.shape[:2])
            noisy = flow.add_noise(clean, jax.random.normal(key_last, clean.shape, jnp.float32), last)
            history = history._replace(sdd_frames_BTHWC=noisy, sdd_sigma_BT=last)
        return student(params, x, sigma, batch["text"], history)

    return net


def clean_history_net(teacher: Teacher, chunk: int, params, key):
    """``net(x, sigma, batch)`` of a teacher trained with per-frame noise: chunk i given the clean chunks before it.

    One call per chunk, all in one batch: chunks < i are the batch's own frames at level 0, later ones pure noise, which
    says nothing. So teacher and teacher-forced student are asked the same question.
    """

    def net(x, sigma, batch):
        count, frames = x.shape[:2]
        chunks = frames // chunk
        of_frame = jnp.arange(frames)[None] // chunk - jnp.arange(chunks)[:, None]  # [chunks, T]: negative = past

        def choose(past, now, later, trailing):
            at = of_frame.reshape(1, chunks, frames, *(1,) * trailing)
            return jnp.where(at < 0, past[:, None], jnp.where(at == 0, now[:, None], later[:, None]))

        sigma = jnp.broadcast_to(sigma, (count, frames))
        noise = jax.random.normal(key, x.shape, jnp.float32)
        inputs = choose(batch["latents"].astype(jnp.float32), x, noise, 3)
        levels = choose(jnp.zeros_like(sigma), sigma, jnp.ones_like(sigma), 0)
        v = teacher(
            params, rearrange(inputs, "b n ... -> (b n) ..."), rearrange(levels, "b n t -> (b n) t"),
            jnp.repeat(batch["text"], chunks, axis=0),
        )  # fmt: skip
        v = rearrange(v, "(b n) (m g) ... -> b n m g ...", n=chunks, g=chunk)
        own = jnp.diagonal(v, axis1=1, axis2=2)  # [B, g, H, W, C, n]
        return rearrange(own, "b g h w c n -> b (n g) h w c")

    return net
