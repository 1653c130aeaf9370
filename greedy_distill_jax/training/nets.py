"""Networks as the losses see them: ``net(x, sigma, batch) -> velocity``."""

import jax
import jax.numpy as jnp
from einops import rearrange

from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.models.students.base import History, StreamingModel
from greedy_distill_jax.models.wan.dit import Teacher


def teacher_net(teacher: Teacher, params):
    """``net(x, sigma, batch)`` of the bidirectional teacher."""
    return lambda x, sigma, batch: teacher(params, x, sigma, batch["text"])


def look_back(student: StreamingModel, batch, key, *, plan: StepPlan, context_noise: float = 0.0):
    """The batch with what all networks of an update look back on: one "history", and "later", noise without a video.

    Every chunk sees the batch's own frames before it, at the noise levels at which the stream of ``plan`` keeps them.
    With context mode "last_step_kv" the history behind the keys (of ETM + SDD: SDD's) is at the level of every chunk's
    last step.

    Args:
      student: any student.
      batch: "latents" [B, T, H, W, C], the frames.
      key: for the noise on the history.
      plan: the steps and context levels of the student's streams.
      context_noise: the history is noised to a level drawn from U(0, context_noise) per video, and the networks
        are told the level (robustness to their own errors, docs/method.md section 6); for plans that keep chunks clean.
    """
    key_level, key_noise, key_last = jax.random.split(key, 3)
    clean = frames = batch["latents"].astype(jnp.float32)
    chunks = student.chunks_of(frames.shape[1])

    def per_frame(sigma_of_chunk):
        return jnp.broadcast_to(jnp.repeat(sigma_of_chunk, student.cfg.chunk)[None], frames.shape[:2])

    if plan.keeps_clean:
        level = context_noise * jax.random.uniform(key_level, (frames.shape[0], 1), jnp.float32)
    else:
        level = per_frame(plan.context_sigma(jnp.arange(chunks)))
    if context_noise or not plan.keeps_clean:
        frames = flow.add_noise(clean, jax.random.normal(key_noise, clean.shape, jnp.float32), level)
    history = History(frames, level)
    if not (plan.keeps_clean or student.keeps_for_etm):
        history = history.read_clean(clean)
    if student.cfg.context == "last_step_kv":
        last = per_frame(plan.last_sigmas(chunks))
        noisy = flow.add_noise(clean, jax.random.normal(key_last, clean.shape, jnp.float32), last)
        history = history._replace(sdd_frames_BTHWC=noisy, sdd_sigma_BT=last)
    later = jax.random.normal(jax.random.fold_in(key, 3), clean.shape, jnp.float32)
    return {**batch, "history": history, "later": later}


def student_net(student: StreamingModel, params):
    """Teacher-forced ``net(x, sigma, batch)``: every chunk sees the batch's "history" before it, see ``look_back``."""
    return lambda x, sigma, batch: student(params, x, sigma, batch["text"], batch["history"])


def given_history_net(teacher: Teacher, chunk: int, params):
    """``net(x, sigma, batch)`` of a teacher trained with per-frame noise: chunk i given the history before it.

    One call per chunk, all in one batch: chunks < i are the frames of the batch's "history" at its levels, later ones
    are "later", pure noise, which says nothing. So teacher and teacher-forced student are asked the same question.
    """

    def net(x, sigma, batch):
        count, frames = x.shape[:2]
        chunks = frames // chunk
        of_frame = jnp.arange(frames)[None] // chunk - jnp.arange(chunks)[:, None]  # [chunks, T]: negative = past

        def choose(past, now, later, trailing):
            at = of_frame.reshape(1, chunks, frames, *(1,) * trailing)
            return jnp.where(at < 0, past[:, None], jnp.where(at == 0, now[:, None], later[:, None]))

        sigma = jnp.broadcast_to(sigma, (count, frames))
        history = batch["history"]
        inputs = choose(history.frames_BTHWC, x, batch["later"], 3)
        levels = choose(jnp.broadcast_to(history.sigma_BT, sigma.shape), sigma, jnp.ones_like(sigma), 0)
        v = teacher(
            params,
            rearrange(inputs, "b n ... -> (b n) ..."),
            rearrange(levels, "b n t -> (b n) t"),
            jnp.repeat(batch["text"], chunks, axis=0),
        )
        v = rearrange(v, "(b n) (m g) ... -> b n m g ...", n=chunks, g=chunk)
        own = jnp.diagonal(v, axis1=1, axis2=2)  # [B, g, H, W, C, n]
        return rearrange(own, "b g h w c n -> b (n g) h w c")

    return net
