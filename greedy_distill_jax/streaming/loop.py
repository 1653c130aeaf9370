"""What the streams of all students share: the denoising loop of a chunk, what is kept of it, the slots of a ring.

A stream's noise comes from one typed key (``jax.random.key``), or from a key per video, [B]: then a video is the same
alone and among others, and videos with equal keys share their noise. ``Near`` keys share it in part.
"""

import functools
import numbers
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32, Key, Shaped

from greedy_distill_jax import ranges
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.distribution import parallel
from greedy_distill_jax.models.wan.layers import KeyValue
from greedy_distill_jax.ranges import Seed

CONTEXT_FOLD = 2**31 - 1  # folded into a chunk's key for the noise on its context; denoising step n folds in n


PerList = Int[Array | np.ndarray, " lists"]  # the number of a step, for every list of a plan


class Near(NamedTuple):
    """Noise per video in the neighbourhood of another one: sqrt(1 - spread^2) centre + spread own, again of variance 1.

    References:
      Neighbor GRPO, arXiv 2511.16955.
    """

    centre: Key[Array, " B"]
    own: Key[Array, " B"]
    spread: Float32[Array, " B"]  # 0: the centre's noise, 1: independent of it


Noise = Key[Array, "*B"] | Near  # what a stream draws its noise from


class Exit(NamedTuple):
    """The denoising call whose x0 became a chunk."""

    x: Float32[Array, "B g H W C"]  # its input
    sigma: Float32[Array, ""]  # its noise level


class Transition(NamedTuple):
    """One denoising step of a chunk: from its input to the input of the next one, or to the chunk after the last."""

    x: Float32[Array, "B g H W C"]
    sigma: Float32[Array, ""]
    next: Float32[Array, "B g H W C"]
    next_sigma: Float32[Array, ""]


class Made(NamedTuple):
    """A finished chunk and how it came about."""

    x0: Float32[Array, "B g H W C"]
    exit: Exit
    transition: Transition | None = None  # of the step that was to be recorded
    keys: Exit | None = None  # context "last_step_kv": the call whose keys are kept, where that is not the exit


class Axes(NamedTuple):
    """Which axis of a field of a stream's state counts videos, and which is split over the columns of a frame."""

    videos: int
    columns: int | None = None


State = TypeVar("State")  # StreamState or CausalState


def fork(state: State, keys: Key[Array, " N"] | Near) -> State:
    """Streams that go on from the same past, each with noise of its own: groups of N / B for each of ``state``'s.

    Args:
      state: of B videos; the group of video b are videos b N / B to (b + 1) N / B - 1 of the result.
      keys: of the noise from here on, one per video of the result.

    Raises:
      ValueError: N is not a multiple of B.
    """
    videos, streams = len(state.last), len(keys.own if isinstance(keys, Near) else keys)
    if streams % videos:
        raise ValueError(f"{streams} keys for {videos} videos; give a multiple, one key for each stream to come.")

    def repeated(name: str, field):
        axes = state.AXES.get(name)
        return field if axes is None else jax.tree.map(lambda x: jnp.repeat(x, streams // videos, axes.videos), field)

    return type(state)(**{name: repeated(name, x) for name, x in state._asdict().items()})._replace(key=keys)


def noise_keys(seed: int | Key[Array, "*B"], videos: int) -> Key[Array, "*B"]:
    """Keys of the noise of some videos.

    Args:
      seed: a number gives every video the noise that it has alone; a key, from which all videos draw together, or a key
        per video are returned as they are.
      videos: how many.

    Raises:
      UserError: a number that is no seed (field "seed").
      ValueError: keys for another number of videos, or what is no typed key.
    """
    if isinstance(seed, numbers.Integral):
        ranges.check(seed, Seed, "seed")
        return jnp.broadcast_to(jax.random.key(seed), (videos,))
    if not jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        raise ValueError(f"seed is an array of {seed.dtype}; give a number, or keys of jax.random.key.")
    if seed.shape not in ((), (videos,)):
        raise ValueError(f"seed holds keys of shape {seed.shape} for {videos} videos; give one, or one for each.")
    return seed


def split_key(key: Noise) -> tuple[Noise, Noise]:
    """(key of the chunks to come, key of the next one)."""
    if isinstance(key, Near):
        centre, own = split_key(key.centre), split_key(key.own)
        return key._replace(centre=centre[0], own=own[0]), key._replace(centre=centre[1], own=own[1])
    pair = jax.random.split(key) if key.ndim == 0 else jax.vmap(jax.random.split, out_axes=1)(key)
    return pair[0], pair[1]


def draw_noise(key: Noise, n: Int[Array, ""] | int, shape: tuple[int, ...]) -> Float32[Array, "B g H W C"]:
    """The ``n``-th noise of a chunk, given its key."""
    if isinstance(key, Near):
        spread = key.spread[:, None, None, None, None]
        return jnp.sqrt(1.0 - jnp.square(spread)) * draw_noise(key.centre, n, shape) + spread * draw_noise(
            key.own, n, shape
        )
    if key.ndim == 0:
        return parallel.normal(jax.random.fold_in(key, n), shape)
    return jax.vmap(lambda key: parallel.normal(jax.random.fold_in(key, n), (1, *shape[1:]))[0])(key)


def initial_noise(key: Noise, shape: tuple[int, ...]) -> Float32[Array, "B g H W C"]:
    """The noise a chunk starts from, given its key."""
    return draw_noise(key, 0, shape)


ListNumber = Int32[Array, ""] | int  # of a plan's lists


def list_of(plan: StepPlan, index: Int32[Array, ""], *, full: bool = False) -> ListNumber:
    """Number of the step list that chunk ``index`` takes; an int where it is the same for all chunks.

    ``full``: they are behind all others than the last one.
    """
    last = len(plan.sigmas) - 1
    return last if full or not last else jnp.minimum(index, last)


def warm_up(plan: StepPlan, slots: int) -> int:
    """Chunks after which a stream with so many cache slots is full: all hold a chunk, and the last list has come."""
    return max(slots, len(plan.sigmas) - 1)


def denoise(
    plan: StepPlan,
    velocity: Callable,
    row: ListNumber,
    shape: tuple[int, ...],
    own: KeyValue | None,
    key: Noise,
    exits: PerList,
    *,
    first: Callable | None = None,
    record: PerList | None = None,
) -> tuple[Made, KeyValue | None]:
    """Runs a chunk's step list up to its exit, the loop of every student; its length is static where ``row`` is.

    Args:
      plan: step lists and sampler.
      velocity: ``velocity(x, sigma) -> (v, Emitted)``.
      row: ``list_of`` the chunk.
      shape: of the chunk, [B, g, H, W, C].
      own: keys and values of the right shapes, replaced by those that the last call emits; None to drop them.
      key: of the chunk's noise.
      exits: number of the last step, per list; ``StepPlan.ends`` runs them whole.
      first: ``first(x, sigma) -> v`` in place of the first call; nothing is recorded then.
      record: number of the step to record, per list; not behind the exit.

    Returns:
      (the chunk, own).
    """
    sigmas, last = jnp.asarray(plan.table)[row], jnp.asarray(exits, jnp.int32)[row]
    if isinstance(row, int) and isinstance(exits, np.ndarray):
        last = int(exits[row])
    x = initial_noise(key, shape)
    recorded = None if record is None else jnp.asarray(record, jnp.int32)[row]

    def update(n, x, v):
        sigma, after = sigmas[n], sigmas[n + 1]
        x0 = x - sigma * v
        if plan.sampler == "euler":
            between = x + (after - sigma) * v
        else:
            noise = draw_noise(key, n + 1, x.shape)
            between = (1.0 - after) * x0 + after * noise
        return jnp.where(n == last, x0, between)

    def body(n, carry):
        x, own, _, ends = carry
        v, emitted = velocity(x, sigmas[n])
        after = update(n, x, v)
        if ends is not None:
            ends = tuple(jnp.where(n == recorded, *pair) for pair in zip((x, after), ends, strict=True))
        return after, emitted.own if own is not None else None, x, ends

    start, entered, ends = 0, x, None if record is None else (x, x)
    if first is not None:
        x, start = update(0, x, first(x, sigmas[0])), 1
    x, own, entered, ends = jax.lax.fori_loop(start, last + 1, body, (x, own, entered, ends))
    transition = None
    if ends is not None:
        following = jnp.where(recorded == last, 0.0, sigmas[recorded + 1])
        transition = Transition(ends[0], sigmas[recorded], ends[1], following)
    return Made(x, Exit(entered, sigmas[last]), transition), own


def keys_of(call: Callable, exit: Exit) -> KeyValue:
    """The keys and values that a network's call on a chunk leaves."""
    return call(*exit, with_head=False, emit=("own",))[1].own


def make_chunk(
    plan: StepPlan,
    call: Callable,
    row: ListNumber,
    shape: tuple[int, ...],
    own: KeyValue | None,
    key: Noise,
    exits: PerList | None,
    record: PerList | None,
) -> tuple[Made, KeyValue | None]:
    """``denoise`` by a student's ``call``, with the keys that context mode "last_step_kv" keeps.

    Args:
      own: arrays of their shapes; None in the other modes.
      plan, row, shape, key, record: as for ``denoise``.
      call: ``call(x, sigma, **module) -> (velocity, Emitted)``.
      exits: as for ``denoise``; None runs the lists to their ends.
    """
    if exits is None:
        velocity = functools.partial(call, emit=("own",) if own is not None else ())
        return denoise(plan, velocity, row, shape, own, key, plan.ends, record=record)
    made, _ = denoise(plan, call, row, shape, None, key, exits, record=record)
    if own is None:
        return made, None
    made = made._replace(keys=kept_call(plan, row, made, exits, key))
    return made, keys_of(call, made.keys)


def given_chunk(
    plan: StepPlan,
    call: Callable,
    row: ListNumber,
    x0: Float32[Array, "B g H W C"],
    key: Noise,
    *,
    last_kv: bool,
) -> tuple[Made, KeyValue | None]:
    """A given chunk in place of ``make_chunk``'s: its exit is the chunk itself at level 0."""
    made = Made(x0, Exit(x0, jnp.float32(0.0)))
    if not last_kv:
        return made, None
    made = made._replace(keys=as_last_input(plan, row, x0, key))
    return made, keys_of(call, made.keys)


def made_again(
    call: Callable,
    exit: Exit,
    keys: Exit | None,
    *,
    frames: bool,
    last_kv: bool,
    x0: Float32[Array, "B g H W C"] | None = None,
) -> tuple[Float32[Array, "B g H W C"], Float32[Array, "B g H W C"], KeyValue | None]:
    """The chunk of a recorded exit, differentiable: (x0, what later chunks see of it, the keys that are kept).

    Args:
      call: as for ``make_chunk``.
      exit, keys: of the chunk's ``Made``.
      frames: gradients flow through what later chunks see.
      last_kv: the keys of the last step are kept (context mode "last_step_kv").
      x0: the finished chunk that later ones see, where ``exit`` is another of its calls; ``keys`` come with it then.
    """
    v, emitted = call(exit.x, exit.sigma, emit=("own",) if last_kv and keys is None else ())
    x = exit.x - exit.sigma * v
    seen = x if frames else jax.lax.stop_gradient(x if x0 is None else x0)
    return x, seen, emitted.own if keys is None else keys_of(call, kept_call_again(exit, keys, seen))


def kept_call(plan: StepPlan, row: ListNumber, made: Made, exits: PerList, key: Noise) -> Exit:
    """The call whose keys stay in context mode "last_step_kv" when a chunk may have left its list early.

    At inference later chunks see keys of the last step's level. A chunk that left at a higher one is noised to that
    level again, for training not to look back on what inference never has.
    """
    early = jnp.asarray(exits, jnp.int32)[row] < jnp.asarray(plan.ends)[row]
    again = as_last_input(plan, row, made.x0, key)
    return Exit(jnp.where(early, again.x, made.exit.x), again.sigma)


def kept_call_again(exit: Exit, keys: Exit, x0: Float32[Array, "B g H W C"]) -> Exit:
    """``keys`` with the derivative in ``x0`` that they have where the chunk was noised again."""
    moves = (1.0 - keys.sigma) * (x0 - jax.lax.stop_gradient(x0))
    return Exit(keys.x + jnp.where(exit.sigma > keys.sigma, moves, 0.0), keys.sigma)


def as_last_input(plan: StepPlan, row: ListNumber, x: Float32[Array, "B g H W C"], key: Noise) -> Exit:
    """A given chunk as the input of its list's last step.

    Its noise is what "renoise" would have added before that step; with "euler" it is fresh.
    """
    last = jnp.asarray(plan.ends)[row]
    sigma = jnp.asarray(plan.table)[row, last]
    return Exit((1.0 - sigma) * x + sigma * draw_noise(key, last, x.shape), sigma)


def context_noise(
    plan: StepPlan, index: Int32[Array, ""], key: Noise, shape: tuple[int, ...]
) -> Float32[Array, "B g H W C"] | None:
    """sigma noise, what a finished chunk gets on top of (1 - sigma) x0 for later chunks to look at; None for nothing.

    Args:
      plan: says sigma.
      index: int32, which chunk this is.
      key: of the chunk's noise, the one that ``denoise`` takes.
      shape: of the chunk, [B, g, H, W, C].
    """
    if plan.keeps_clean:
        return None
    return plan.context_sigma(index) * draw_noise(key, CONTEXT_FOLD, shape)


def kept(
    plan: StepPlan,
    index: Int32[Array, ""],
    x: Float32[Array, "B g H W C"],
    noise: Float32[Array, "B g H W C"] | None,
) -> tuple[Float32[Array, "B g H W C"], Float32[Array, ""]]:
    """(chunk ``x`` as later ones see it, its noise level), given its ``context_noise``."""
    if noise is None:
        return x, jnp.float32(0.0)
    sigma = plan.context_sigma(index)
    return (1.0 - sigma) * x + noise, sigma


def last_sigma(plan: StepPlan, index: Int32[Array, ""]) -> Float32[Array, ""]:
    """Noise level at which chunk ``index`` sees the one before it, a float32 scalar; 0 for the first chunk."""
    if plan.keeps_clean:
        return jnp.float32(0.0)
    return jnp.where(index > 0, plan.context_sigma(index - 1), 0.0)


def ring_slot(index: Int32[Array, ""], sink: int, ring: int) -> tuple[Int32[Array, ""], Bool[Array, ""] | None]:
    """(slot chunk ``index`` goes to, whether to leave it as it is): the sink's slots first, then the oldest's.

    None in place of the latter: never.
    """
    behind_sink = index - sink
    if not ring:  # once the sink is full there is nothing to write
        return jnp.minimum(index, sink - 1), behind_sink >= 0
    return jnp.where(behind_sink < 0, index, sink + behind_sink % ring), None


def write_slot(
    buffer: Shaped[Array, "..."],
    new: Shaped[Array, "..."],
    slot: Int32[Array, ""] | int,
    keep: Bool[Array, ""] | None = None,
    *,
    axis: int,
) -> Shaped[Array, "..."]:
    """``buffer`` with its ``slot``-th stretch of the size of ``new`` replaced along ``axis``, unless ``keep``."""
    size = new.shape[axis]
    if keep is not None:
        new = jnp.where(keep, jax.lax.dynamic_slice_in_dim(buffer, slot * size, size, axis), new)
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, slot * size, axis)


def cache_bytes(state: State) -> int:
    """Bytes a stream holds between chunks."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state._replace(key=None)))
