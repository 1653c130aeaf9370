"""Self-rollout: the student makes a video from its own frames, and the gradient through it.

``roll_out`` runs without gradient and keeps the input of the call that made every chunk. From there two forms give the
gradient of the same video: ``recompute`` in ONE parallel teacher-forced pass (no gradient flows through generated
frames), ``replay`` chunk by chunk with caches, where it may.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.distribution import parallel
from greedy_distill_jax.models.students.base import ContextGrad, History, StreamingModel
from greedy_distill_jax.streaming.causal import CausalStreamer
from greedy_distill_jax.streaming.etm_sdd import Streamer
from greedy_distill_jax.streaming.loop import Exit

EXITS = ("random", "last")


class Rollout(NamedTuple):
    """A generated video, how each of its frames came about, and as what it was kept for later ones; no gradients."""

    x0_BTHWC: jax.Array
    exit_BTHWC: jax.Array  # input of the call whose x0 it is
    sigma_T: jax.Array  # noise level of that call
    context_BTHWC: jax.Array  # the frame as later chunks saw it
    context_sigma_T: jax.Array  # noise level of that frame


def draw_exits(key, lengths, how: str):
    """Number of the last denoising step, per step list; one draw for all chunks, videos and devices.

    "random": uniform over each list, as in Self-Forcing; "last": every list runs to its end.
    """
    lengths = jnp.asarray(lengths)
    if how == "last":
        return lengths - 1
    if how != "random":
        raise ValueError(f"exit is {how!r}; choose from {', '.join(EXITS)}.")
    return jax.random.randint(key, lengths.shape, 0, lengths)


def roll_out(
    streamer: Streamer | CausalStreamer, params, text_BMC, key, latent_shape: tuple[int, int, int, int], how
) -> Rollout:
    """Streams ``latent_shape`` = (T, H, W, C) for prompts [B, M, C], without gradient.

    Args:
      streamer: student and step plan; its context mode must not be "fused" (whose numbers are those of "clean").
      params, text_BMC: of the student.
      key: of the noise and of the exits.
      how: as for ``draw_exits``, or the exits that it has drawn.
    """
    frames, height, width, channels = latent_shape
    chunks, clean = streamer.student.chunks_of(frames), streamer.plan.keeps_clean
    key_exit, key_stream = jax.random.split(key)
    exits = draw_exits(key_exit, streamer.plan.lengths, how) if isinstance(how, str) else how

    def call(params, text, key, exits):
        state = streamer.init(params, text, key, (height, parallel.stripe_columns(width), channels))

        def chunk(state, _):
            state, x, exit = streamer.step_to(params, state, exits)
            return state, (x, exit.x, exit.sigma, None if clean else state.last)

        _, (x0, entered, sigma, last) = jax.lax.scan(chunk, state, length=chunks)
        x0 = _in_time(x0)
        context = x0 if clean else _in_time(last)
        kept_at = jnp.repeat(streamer.plan.context_sigma(jnp.arange(chunks)), streamer.cfg.chunk)
        return Rollout(x0, _in_time(entered), jnp.repeat(sigma, streamer.cfg.chunk), context, kept_at)

    return parallel.split_videos(call, jax.lax.stop_gradient(params), text_BMC, key_stream, exits, whole=1)


def _in_time(x):
    return rearrange(x, "n b g h w c -> b (n g) h w c")


def history(student: StreamingModel, rollout: Rollout) -> History:
    """What the frames of a rollout look back on, as it was when they were made."""
    sigma = jnp.broadcast_to(rollout.context_sigma_T[None], rollout.x0_BTHWC.shape[:2])
    seen = History(rollout.context_BTHWC, sigma)
    if student.cfg.context != "last_step_kv":
        return seen
    sigma = jnp.broadcast_to(rollout.sigma_T[None], rollout.x0_BTHWC.shape[:2])
    return seen._replace(sdd_frames_BTHWC=rollout.exit_BTHWC, sdd_sigma_BT=sigma)


def recompute(student: StreamingModel, params, text_BMC, rollout: Rollout, grads: ContextGrad):
    """The rollout's frames [B, T, H, W, C] in one parallel pass, differentiable in ``params``."""
    sigma = jnp.broadcast_to(rollout.sigma_T[None], rollout.x0_BTHWC.shape[:2])
    v = student(params, rollout.exit_BTHWC, sigma, text_BMC, history(student, rollout), grads)
    return flow.x0_from_velocity(rollout.exit_BTHWC, v, sigma)


def replay(
    streamer: Streamer | CausalStreamer,
    params,
    text_BMC,
    rollout: Rollout,
    grads: ContextGrad,
    *,
    frames: bool = False,
    segment: int = 0,
):
    """The rollout's frames chunk by chunk through the caches, differentiable in ``params``; each chunk rematerialised.

    Args:
      streamer: as for ``roll_out``.
      params, text_BMC: of the student.
      rollout: supplies the input of every chunk's last call; earlier denoising steps are constants.
      grads: what flows through the parameters that made the contexts.
      frames: gradients also flow through generated frames, so that later frames give credit to earlier ones.
      segment: with ``frames``, after so many chunks the flow through the state is cut; 0 never cuts.
    """
    chunks = streamer.student.chunks_of(rollout.x0_BTHWC.shape[1])
    segment = segment or chunks
    if chunks % segment:
        raise ValueError(f"segment is {segment} chunks, which does not divide the {chunks} chunks of a rollout.")
    call = functools.partial(_replay, streamer, grads=grads, frames=frames, segment=segment)
    return parallel.split_videos(call, params, text_BMC, rollout, whole=1)


def _replay(streamer, params, text_BMC, rollout: Rollout, *, grads: ContextGrad, frames: bool, segment: int):
    shape, g = rollout.x0_BTHWC.shape, streamer.cfg.chunk
    state = streamer.init(params, text_BMC, jax.random.key(0), shape[2:])
    by_chunk = functools.partial(rearrange, pattern="b (s n g) h w c -> s n b g h w c", g=g, n=segment)
    levels = rearrange(rollout.sigma_T[::g], "(s n) -> s n", n=segment)
    noise = None
    if not streamer.plan.keeps_clean:  # a chunk that moves is kept with the noise it had in the rollout
        noise = by_chunk(
            rollout.context_BTHWC
            - flow.expand(1.0 - rollout.context_sigma_T[None], rollout.x0_BTHWC) * rollout.x0_BTHWC
        )

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a scan's body is not merged with its backward pass anyway
    def chunk(state, made):
        *exit, noise = made
        return streamer.replay(params, state, Exit(*exit), noise, grads, frames)

    def section(state, made):
        if frames:  # cut the past, not the projected text: it is the same for all sections
            text = {name: getattr(state, name) for name in state._fields if name.endswith("text")}
            state = jax.lax.stop_gradient(state)._replace(**text)
        return jax.lax.scan(chunk, state, made)

    _, x = jax.lax.scan(section, state, (by_chunk(rollout.exit_BTHWC), levels, noise))
    return rearrange(x, "s n b g h w c -> b (s n g) h w c")
