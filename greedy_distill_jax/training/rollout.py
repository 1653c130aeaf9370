"""Self-rollout: the student makes a video from its own frames, and the gradient through it.

``roll_out`` runs without gradient and keeps the input of the call that made every chunk; ``go_on`` does so from any
state of a stream, ``observe`` puts given frames in front. From there two forms give the gradient of the same video:
``recompute`` in ONE parallel teacher-forced pass (no gradient flows through generated frames), ``replay`` chunk by
chunk with caches, where it may.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.distribution import parallel
from greedy_distill_jax.models.students.base import ContextGrad, History, StreamingModel
from greedy_distill_jax.streaming.causal import CausalState, CausalStreamer
from greedy_distill_jax.streaming.etm_sdd import Streamer, StreamState
from greedy_distill_jax.streaming.loop import Exit, PerList

EXITS = ("random", "last", "random_but_first")


class Transitions(NamedTuple):
    """Of every chunk of a rollout one recorded denoising step, see ``loop.Transition``."""

    x_BTHWC: Float32[Array, "B T H W C"]
    sigma_T: Float32[Array, " T"]
    next_BTHWC: Float32[Array, "B T H W C"]
    next_sigma_T: Float32[Array, " T"]


class Keys(NamedTuple):
    """Of every chunk of a rollout the call whose keys are kept, see ``loop.Made.keys``."""

    x_BTHWC: Float32[Array, "B T H W C"]
    sigma_T: Float32[Array, " T"]


class Rollout(NamedTuple):
    """A generated video, how each of its frames came about, and as what it was kept for later ones; no gradients."""

    x0_BTHWC: Float32[Array, "B T H W C"]
    exit_BTHWC: Float32[Array, "B T H W C"]  # input of the call whose x0 it is
    sigma_T: Float32[Array, " T"]  # noise level of that call
    context_BTHWC: Float32[Array, "B T H W C"]  # the frame as later chunks saw it
    context_sigma_T: Float32[Array, " T"]  # noise level of that frame
    keys: Keys | None = None  # context "last_step_kv", where they are not the exits'
    transitions: Transitions | None = None  # where they were asked for


def draw_exits(key: PRNGKeyArray, lengths: PerList, how: str) -> PerList | None:
    """Number of the last denoising step, per step list; one draw for all chunks, videos and devices.

    "random": uniform over each list, as in Self-Forcing; "last": None, every list runs to its end; "random_but_first":
    uniform, but the first list to its end, as in Diagonal Distillation.
    """
    lengths = jnp.asarray(lengths)
    if how not in EXITS:
        raise ValueError(f"exit is {how!r}; choose from {', '.join(EXITS)}.")
    if how == "last":
        return None
    exits = jax.random.randint(key, lengths.shape, 0, lengths)
    return exits.at[0].set(lengths[0] - 1) if how == "random_but_first" else exits


def roll_out(
    streamer: Streamer | CausalStreamer,
    params: Any,
    text_BMC: Float[Array, "B M D"],
    key: PRNGKeyArray,
    latent_shape: tuple[int, int, int, int],
    how: str | PerList | None,
) -> Rollout:
    """Streams ``latent_shape`` = (T, H, W, C) for prompts [B, M, C] from the first frame on, without gradient.

    Args:
      streamer: student and step plan; its context mode must not be "fused" (whose numbers are those of "clean").
      params, text_BMC: of the student.
      key: of the noise and of the exits.
      how: as for ``draw_exits``, or the exits that it has drawn.
    """
    frames, *latent = latent_shape
    chunks = streamer.student.chunks_of(frames)
    key_exit, key_stream = jax.random.split(key)
    exits = draw_exits(key_exit, streamer.plan.lengths, how) if isinstance(how, str) else how

    def call(params, text, key, exits):
        return _go_on(streamer, chunks, params, _start(streamer, params, text, key, latent), exits, None)[1]

    return parallel.split_videos(call, jax.lax.stop_gradient(params), text_BMC, key_stream, exits, whole=1)


def go_on(
    streamer: Streamer | CausalStreamer,
    params: Any,
    state: StreamState | CausalState,
    frames: int,
    exits: PerList | None = None,
    *,
    record: PerList | None = None,
) -> tuple[StreamState | CausalState, Rollout]:
    """Streams ``frames`` more latent frames from any state, without gradient.

    States come from ``Streamer.init``, ``loop.fork`` (a group that shares its past), ``switch_prompt`` (another prompt
    from here on), ``observe``, or an earlier call, also of an earlier update.

    Args:
      streamer, params: as for ``roll_out``.
      state: where the stream is; its prompts and keys are used.
      frames: a multiple of the chunk.
      exits: that ``draw_exits`` has drawn; without, every list runs to its end.
      record: number of the denoising step, per list (``draw_exits`` draws it), that is kept as ``transitions``.

    Returns:
      (new state, rollout of the new frames).

    Raises:
      ValueError: both ``exits`` and ``record``: a chunk that is left early may not have had the step; or a step behind
        the end of its list.
    """
    if exits is not None and record is not None:
        raise ValueError("go_on: exits and record exclude each other; a step is recorded of lists that run to the end.")
    known = record is not None and not isinstance(record, jax.core.Tracer)
    if known and (np.any(np.asarray(record) < 0) or np.any(np.asarray(record) > streamer.plan.ends)):
        given, ends = np.asarray(record).tolist(), streamer.plan.ends.tolist()
        raise ValueError(f"go_on: record is {given}, the last steps of the lists are {ends}.")
    call = functools.partial(_go_on, streamer, streamer.student.chunks_of(frames))
    return parallel.split_videos(call, *jax.lax.stop_gradient((params, state)), exits, record, whole=1)


def observe(
    streamer: Streamer | CausalStreamer,
    params: Any,
    state: StreamState | CausalState,
    frames_BTHWC: Float32[Array, "B T H W C"],
) -> tuple[StreamState | CausalState, Rollout]:
    """Gives a stream frames to go on from, an image or the beginning of a video, in place of its own next ones.

    Returns:
      (new state, the frames in the form of a rollout, for ``recompute``'s ``before``).
    """
    streamer.student.chunks_of(frames_BTHWC.shape[1])

    def call(params, state, frames):
        chunks = rearrange(frames, "b (n g) h w c -> n b g h w c", g=streamer.cfg.chunk)

        def step(state, x0):
            after, made = streamer.observe(params, state, x0)
            return after, (made, after.last)

        return _recorded(streamer, state.index, *jax.lax.scan(step, state, chunks))

    return parallel.split_videos(call, *jax.lax.stop_gradient((params, state, frames_BTHWC)), whole=1)


def _start(streamer, params, text_BMC, key, latent):
    height, width, channels = latent
    return streamer.init(params, text_BMC, key, (height, parallel.stripe_columns(width), channels))


def _go_on(streamer, chunks: int, params, state, exits, record):
    def step(state, _):
        after, made = streamer.step_to(params, state, exits, record)
        return after, (made, after.last)

    return _recorded(streamer, state.index, *jax.lax.scan(step, state, length=chunks))


def _recorded(streamer, first: Int32[Array, ""], state, out):
    """(state, rollout) from what a scan over chunks has put out, the first of them number ``first``."""
    made, last = out
    g, chunks = streamer.cfg.chunk, len(last)
    x0, kept_at = in_time(made.x0), jnp.repeat(streamer.plan.context_sigma(first + jnp.arange(chunks)), g)
    return state, Rollout(
        x0,
        *by_frame(made.exit, g),
        x0 if streamer.plan.keeps_clean else in_time(last),
        kept_at,
        made.keys and Keys(*by_frame(made.keys, g)),
        made.transition and Transitions(*by_frame(made.transition, g)),
    )


def by_frame(record, chunk: int) -> list[jax.Array]:
    """What a scan over chunks put out of every field: chunks in time, and numbers of chunks once per frame."""
    return [in_time(x) if x.ndim == 6 else jnp.repeat(x, chunk) for x in record]


def in_time(x: Float[Array, "n B g H W C"]) -> Float[Array, "B T H W C"]:
    """Chunks one behind the other."""
    return rearrange(x, "n b g h w c -> b (n g) h w c")


def join(*rollouts: Rollout) -> Rollout:
    """One rollout of consecutive ones of a stream; without their transitions."""
    parts = [rollout._replace(transitions=None) for rollout in rollouts]
    if any(part.keys for part in parts):
        parts = [part._replace(keys=part.keys or Keys(part.exit_BTHWC, part.sigma_T)) for part in parts]
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1 if x[0].ndim == 5 else 0), *parts)


def history(student: StreamingModel, rollout: Rollout) -> History:
    """What the frames of a rollout that begins with the stream look back on, as it was when they were made."""
    seen = History(rollout.context_BTHWC, _per_video(rollout.context_sigma_T, rollout))
    if student.cfg.context != "last_step_kv":
        return seen if student.keeps_for_etm else seen.read_clean(rollout.x0_BTHWC)
    keys = rollout.keys or Keys(rollout.exit_BTHWC, rollout.sigma_T)
    return seen._replace(sdd_frames_BTHWC=keys.x_BTHWC, sdd_sigma_BT=_per_video(keys.sigma_T, rollout))


def _per_video(sigma_T, rollout: Rollout):
    return jnp.broadcast_to(sigma_T[None], rollout.x0_BTHWC.shape[:2])


def recompute(
    student: StreamingModel,
    params: Any,
    text_BMC: Float[Array, "B M D"],
    rollout: Rollout,
    grads: ContextGrad,
    *,
    before: Rollout | None = None,
) -> Float32[Array, "B T H W C"]:
    """The rollout's frames in one parallel pass, differentiable in ``params``.

    Args:
      student, params: as for ``roll_out``.
      text_BMC: prompts, the same for the whole video.
      rollout: what is made again.
      grads: what flows through the parameters that made the contexts.
      before: everything that the stream made or observed before the rollout; none of it gets a gradient. For a group
        (``loop.fork``) repeated as its videos are.

    Raises:
      ValueError: ``before`` of another number of videos.
    """
    if before is not None and len(before.x0_BTHWC) != len(rollout.x0_BTHWC):
        raise ValueError(
            f"recompute: before has {len(before.x0_BTHWC)} videos, the rollout {len(rollout.x0_BTHWC)}; repeat every "
            f"video of before for each of its group."
        )
    whole = rollout if before is None else join(before, rollout)
    sigma = _per_video(whole.sigma_T, whole)
    v = student(params, whole.exit_BTHWC, sigma, text_BMC, history(student, whole), grads)
    return flow.x0_from_velocity(whole.exit_BTHWC, v, sigma)[:, -rollout.x0_BTHWC.shape[1] :]


def replay(
    streamer: Streamer | CausalStreamer,
    params: Any,
    text_BMC: Float[Array, "B M D"],
    rollout: Rollout,
    grads: ContextGrad,
    *,
    frames: bool = False,
    segment: int = 0,
    start: StreamState | CausalState | None = None,
) -> Float32[Array, "B T H W C"]:
    """The rollout's frames chunk by chunk through the caches, differentiable in ``params``; each chunk rematerialised.

    Args:
      streamer: as for ``roll_out``.
      params, text_BMC: of the student.
      rollout: supplies the input of every chunk's last call; earlier denoising steps are constants.
      grads: what flows through the parameters that made the contexts.
      frames: gradients also flow through generated frames, so that later frames give credit to earlier ones.
      segment: with ``frames``, after so many chunks the flow through the state is cut; 0 never cuts.
      start: the state that the rollout went on from, whose caches are constants; without, its first frame.
    """
    chunks = streamer.student.chunks_of(rollout.x0_BTHWC.shape[1])
    segment = segment or chunks
    if chunks % segment:
        raise ValueError(f"segment is {segment} chunks, which does not divide the {chunks} chunks of a rollout.")
    call = functools.partial(_replay, streamer, grads=grads, frames=frames, segment=segment)
    return parallel.split_videos(call, params, text_BMC, rollout._replace(transitions=None), start, whole=1)


def _replay(streamer, params, text_BMC, rollout: Rollout, start, *, grads: ContextGrad, frames: bool, segment: int):
    shape, g = rollout.x0_BTHWC.shape, streamer.cfg.chunk
    if start is None:
        state = streamer.init(params, text_BMC, jax.random.key(0), shape[2:])
    else:
        state = streamer.with_text(params, jax.lax.stop_gradient(start), text_BMC)
    by_chunk = functools.partial(rearrange, pattern="b (s n g) h w c -> s n b g h w c", g=g, n=segment)

    def call_of(x, sigma_T):
        return Exit(by_chunk(x), rearrange(sigma_T[::g], "(s n) -> s n", n=segment))

    exit, keys = call_of(rollout.exit_BTHWC, rollout.sigma_T), rollout.keys and call_of(*rollout.keys)
    noise = None
    if not streamer.plan.keeps_clean:  # a chunk that moves is kept with the noise it had in the rollout
        noise = by_chunk(
            rollout.context_BTHWC
            - flow.expand(1.0 - rollout.context_sigma_T[None], rollout.x0_BTHWC) * rollout.x0_BTHWC
        )

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a scan's body is not merged with its backward pass anyway
    def chunk(state, made):
        return streamer.replay(params, state, *made, grads, frames)

    def section(state, made):
        if frames:  # cut the past, not the projected text: it is the same for all sections
            text = {name: getattr(state, name) for name in state._fields if name.endswith("text")}
            state = jax.lax.stop_gradient(state)._replace(**text)
        return jax.lax.scan(chunk, state, made)

    _, x = jax.lax.scan(section, state, (exit, keys, noise))
    return rearrange(x, "s n b g h w c -> b (s n g) h w c")
