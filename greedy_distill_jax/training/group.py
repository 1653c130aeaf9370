"""Groups of streams: one past per prompt, several futures of one stretch, and what a network predicts along them.

``record`` makes them without gradient. ``predict`` asks a network for the frames of that stretch again, given noisy
inputs, each chunk behind the frames that the stream had made: with the parameters that made them, differentiably, or
with others, whose caches are then their own. ``predict_corrected`` does so behind real frames.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float, Float32, Int32, Key, Shaped

from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.distribution import parallel
from greedy_distill_jax.models.students.base import ContextGrad
from greedy_distill_jax.streaming.causal import CausalStreamer
from greedy_distill_jax.streaming.etm_sdd import Streamer
from greedy_distill_jax.streaming.loop import Exit, Near, PerList, fork
from greedy_distill_jax.training.rollout import Transitions, by_frame, in_time

CONSTANT = ContextGrad("none", "none")  # of a pass that nobody learns by


class Videos(NamedTuple):
    """Streams from their first frame on, and as what later chunks saw theirs; no gradient flows through any of it.

    frames: zeros where none were made. noise: on top of (1 - sigma) frames in what later chunks saw, None where
    finished chunks are kept clean. kept_input, kept_sigma: context mode "last_step_kv": of the call whose keys stayed.
    """

    frames: Float32[Array, "B F H W C"]
    noise: Float32[Array, "B F H W C"] | None = None
    kept_input: Float32[Array, "B F H W C"] | None = None
    kept_sigma: Float32[Array, " F"] | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """How groups are made.

    streamer: the student with the few-step sampling it is trained for.
    frames: F, room for the longest stream.
    clip: latent frames that the streams of a group make apart, and learn from; the past before them is one.
    after: latent frames behind these.
    given: first latent frames of a stream that are real.
    group: streams per prompt.
    spread: of the noise within a group, see ``streaming.loop.Near``; the first stream has the centre's. 1: independent.
    """

    streamer: Streamer | CausalStreamer
    frames: int
    clip: int
    after: int = 0
    given: int = 0
    group: int = 1
    spread: float = 1.0

    @property
    def chunk(self) -> int:
        """Latent frames of one chunk."""
        return self.streamer.cfg.chunk

    def members(self, x: Shaped[Array, "P ..."]) -> Shaped[Array, "B ..."]:
        """Every prompt's row for each stream of its group."""
        return repeat(x, "p ... -> (p n) ...", n=self.group)

    def firsts(self, x: Shaped[Array, "B ..."]) -> Shaped[Array, "P ..."]:
        """The rows of the first stream of every group."""
        return rearrange(x, "(p n) ... -> p n ...", n=self.group)[:, 0]


def record(
    own: Group,
    params: Any,
    text_PMC: Float[Array, "P M D"],
    key: Key[Array, ""],
    start: Int32[Array, ""],
    step: PerList,
    latent_shape: tuple[int, int, int],
    real_PTHWC: Float32[Array, "P F H W C"] | None = None,
) -> tuple[Videos, Transitions]:
    """Streams groups of videos, without gradient.

    Args:
      own: how.
      params, text_PMC: of the student, and the prompts.
      key: of the noise.
      start: chunks before a group's streams part; at least ``given``'s.
      step: number of the denoising step that is recorded of every chunk of the clip, per list of the plan.
      latent_shape: (H, W, C).
      real_PTHWC: videos whose first frames are ``given``.

    Returns:
      (the streams of all groups, group after group; the recorded steps of their clips).
    """
    prompts = len(text_PMC)
    keys = jax.random.split(key, 3)
    past, apart = jax.random.split(keys[0], prompts), jax.random.split(keys[1], prompts * own.group)
    if own.spread < 1.0:
        spread = jnp.where(jnp.arange(len(apart)) % own.group, jnp.float32(own.spread), 0.0)
        apart = Near(jnp.repeat(jax.random.split(keys[2], prompts), own.group), apart, spread)

    def call(params, text, past, apart, start, step, real):
        shape = (latent_shape[0], parallel.stripe_columns(latent_shape[1]), latent_shape[2])
        state = own.streamer.init(params, text, past, shape)
        at, given = (state, _room(own, prompts, shape)), own.given // own.chunk
        for i in range(given):
            at = _observed(own, params, at, _chunk(own, real, i))
        at = jax.lax.fori_loop(given, start, lambda _, at: _made(own, params, at)[0], at)
        at = fork(at[0], apart), _of_members(own, at[1])
        at, made = jax.lax.scan(lambda at, _: _made(own, params, at, step), at, length=own.clip // own.chunk)
        at = jax.lax.fori_loop(0, own.after // own.chunk, lambda _, at: _made(own, params, at)[0], at)
        return at[1], Transitions(*by_frame(made.transition, own.chunk))

    args = jax.lax.stop_gradient((params, text_PMC, past, apart, start, step, real_PTHWC))
    return parallel.split_videos(call, *args, whole=1)


def predict(
    own: Group,
    params: Any,
    text_PMC: Float[Array, "P M D"],
    videos: Videos,
    start: Int32[Array, ""],
    x_BTHWC: Float32[Array, "B T H W C"],
    sigma_T: Float32[Array, " T"],
    grads: ContextGrad,
) -> Float32[Array, "B T H W C"]:
    """x0 of the clip's frames from noisy inputs, each chunk behind the streams' frames; differentiable in ``params``.

    The shared past is a constant; within the clip gradients flow as ``grads`` says. Each chunk is rematerialised.

    Args:
      own, text_PMC, start: as for ``record``.
      params: of the network that is asked; its caches are made anew of the frames.
      videos: whose clips these are.
      x_BTHWC, sigma_T: inputs and their levels, one per chunk.
      grads: what flows through the parameters that made the contexts.
    """

    def call(params, text, videos, start, x, sigma):
        state = _behind(own, params, text, videos, start)
        state = own.streamer.with_text(params, state, own.members(text))

        @functools.partial(jax.checkpoint, prevent_cse=False)  # as in ``rollout.replay``
        def chunk(state, at):
            i, exit = at
            x0, keys, noise = _kept(own, videos, start + i)
            return own.streamer.replay(params, state, exit, keys, noise, grads, False, x0)

        _, out = jax.lax.scan(chunk, state, (jnp.arange(own.clip // own.chunk), _exits(own, x, sigma)))
        return in_time(out)

    return parallel.split_videos(call, params, text_PMC, videos, start, x_BTHWC, sigma_T, whole=1)


def predict_corrected(
    own: Group,
    params: Any,
    text_PMC: Float[Array, "P M D"],
    videos: Videos,
    real_PTHWC: Float32[Array, "P F H W C"],
    start: Int32[Array, ""],
    x_BTHWC: Float32[Array, "B T H W C"],
    sigma_T: Float32[Array, " T"],
    keep: int,
) -> Float32[Array, "B T H W C"]:
    """``predict`` behind real frames, without gradient: all that a chunk sees is real but for its last ``keep`` chunks.

    Args:
      real_PTHWC: the videos that stand in place of the streams' older frames; their noise, where chunks are not kept
        clean, is the streams'.
      keep: own chunks before every chunk that stay; ``start`` is at least as large.
      own, params, text_PMC, videos, start, x_BTHWC, sigma_T: as for ``predict``.
    """

    def call(params, text, videos, real, start, x, sigma):
        truth = _with_frames(videos, own.members(real))
        state = _behind(own, params, text, truth, start - keep)

        def chunk(state, at):
            i, exit = at
            seen = state
            for k in range(keep):
                seen = _retraced(own, params, seen, videos, start + i - keep + k)
            x0, keys, noise = _kept(own, videos, start + i)
            _, out = own.streamer.replay(params, seen, exit, keys, noise, CONSTANT, False, x0)
            return _retraced(own, params, state, truth, start + i - keep), out

        _, out = jax.lax.scan(chunk, state, (jnp.arange(own.clip // own.chunk), _exits(own, x, sigma)))
        return in_time(out)

    args = jax.lax.stop_gradient((params, text_PMC, videos, real_PTHWC, start, x_BTHWC, sigma_T))
    return parallel.split_videos(call, *args, whole=1)


def _room(own: Group, count: int, shape) -> Videos:
    plan, context = own.streamer.plan, own.streamer.cfg.context
    zeros = parallel.varying(jnp.zeros((count, own.frames, *shape), jnp.float32))
    last_kv = context == "last_step_kv"
    return Videos(
        zeros,
        None if plan.keeps_clean else zeros,
        zeros if last_kv else None,
        jnp.zeros(own.frames, jnp.float32) if last_kv else None,
    )


def _of_members(own: Group, videos: Videos) -> Videos:
    return Videos(*(x if x is None or x.ndim == 1 else own.members(x) for x in videos))


def _of_firsts(own: Group, videos: Videos) -> Videos:
    return Videos(*(x if x is None or x.ndim == 1 else own.firsts(x) for x in videos))


def _made(own: Group, params, at, step: PerList | None = None):
    """((state, videos) with one more chunk, how it was made)."""
    before, videos = at
    after, made = own.streamer.step_to(params, before, None, step)
    return (after, _written(own, videos, before.index, after, made)), made


def _observed(own: Group, params, at, x0):
    before, videos = at
    after, made = own.streamer.observe(params, before, x0)
    return after, _written(own, videos, before.index, after, made)


def _written(own: Group, videos: Videos, i, after, made) -> Videos:
    """The videos with chunk ``i``, which ``made`` tells of and ``after`` has last."""

    def put(buffer, x, axis: int = 1):
        return jax.lax.dynamic_update_slice_in_dim(buffer, x, i * own.chunk, axis)

    videos = videos._replace(frames=put(videos.frames, made.x0))
    if videos.noise is not None:
        level = own.streamer.plan.context_sigma(i)
        videos = videos._replace(noise=put(videos.noise, after.last - (1.0 - level) * made.x0))
    if videos.kept_input is not None:
        call = made.keys or made.exit
        levels = jnp.full((own.chunk,), call.sigma)
        videos = videos._replace(
            kept_input=put(videos.kept_input, call.x), kept_sigma=put(videos.kept_sigma, levels, 0)
        )
    return videos


def _chunk(own: Group, x, i):
    return jax.lax.dynamic_slice_in_dim(x, i * own.chunk, own.chunk, axis=1)


def _kept(own: Group, videos: Videos, i):
    """(chunk ``i``, the call whose keys are kept of it, its context noise), the last two where there are any."""
    keys = noise = None
    if videos.kept_input is not None:
        keys = Exit(_chunk(own, videos.kept_input, i), videos.kept_sigma[i * own.chunk])
    if videos.noise is not None:
        noise = _chunk(own, videos.noise, i)
    return _chunk(own, videos.frames, i), keys, noise


def _retraced(own: Group, params, state, videos: Videos, i):
    return own.streamer.retrace(params, state, *_kept(own, videos, i))


def _behind(own: Group, params, text, videos: Videos, start):
    """The states of all streams, constants, after ``start`` chunks that are the same within a group."""
    params, text, past = jax.lax.stop_gradient((params, text, _of_firsts(own, videos)))
    state = own.streamer.init(params, text, jax.random.key(0), past.frames.shape[2:])
    state = jax.lax.fori_loop(0, start, lambda i, state: _retraced(own, params, state, past, i), state)
    return fork(jax.lax.stop_gradient(state), jax.random.split(state.key, len(videos.frames)))


def _with_frames(videos: Videos, frames) -> Videos:
    """The same with other frames, which are noised as those were."""
    kept_input = videos.kept_input
    if kept_input is not None:
        kept_input = kept_input + flow.expand(1.0 - videos.kept_sigma[None], frames) * (frames - videos.frames)
    return videos._replace(frames=frames, kept_input=kept_input)


def _exits(own: Group, x, sigma_T) -> Exit:
    return Exit(rearrange(x, "b (n g) h w c -> n b g h w c", g=own.chunk), sigma_T[:: own.chunk])
