"""What the streams of all students share: the denoising loop of a chunk, what is kept of it, the slots of a ring."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.distribution import parallel

CONTEXT_FOLD = 2**31 - 1  # folded into a chunk's key for the noise on its context; denoising step n folds in n


class Exit(NamedTuple):
    """The denoising call whose x0 became a chunk."""

    x: jax.Array  # [B, g, H, W, C] its input
    sigma: jax.Array  # scalar, its noise level


def initial_noise(key, shape) -> jax.Array:
    """The noise a chunk starts from, given the key of its step."""
    return parallel.normal(jax.random.fold_in(key, 0), shape)


def denoise(plan: StepPlan, velocity, index, shape, own, key, exits, first=None):
    """Runs the step list of chunk ``index`` up to its exit, the loop of every student.

    Args:
      plan: step lists and sampler.
      velocity: ``velocity(x, sigma) -> (v, Emitted)``.
      index: int32, which chunk this is.
      shape: of the chunk, [B, g, H, W, C].
      own: keys and values of the right shapes, replaced by those that the last call emits; None to drop them.
      key: of the chunk's noise.
      exits: number of the last step, per list; ``StepPlan.ends`` runs them whole.
      first: ``first(x, sigma) -> v`` in place of the first call.

    Returns:
      (x0, own, the last call).
    """
    table = plan.table
    row = jnp.minimum(index, len(table) - 1)
    sigmas, last = jnp.asarray(table)[row], jnp.asarray(exits, jnp.int32)[row]
    x = initial_noise(key, shape)

    def update(n, x, v):
        sigma, after = sigmas[n], sigmas[n + 1]
        x0 = x - sigma * v
        if plan.sampler == "euler":
            between = x + (after - sigma) * v
        else:
            noise = parallel.normal(jax.random.fold_in(key, n + 1), x.shape)
            between = (1.0 - after) * x0 + after * noise
        return jnp.where(n == last, x0, between)

    def body(n, carry):
        x, own, _ = carry
        v, emitted = velocity(x, sigmas[n])
        return update(n, x, v), emitted.own if own is not None else None, x

    start, entered = 0, x
    if first is not None:
        x, start = update(0, x, first(x, sigmas[0])), 1
    x, own, entered = jax.lax.fori_loop(start, last + 1, body, (x, own, entered))
    return x, own, Exit(entered, sigmas[last])


def context_noise(plan: StepPlan, index, key, shape) -> jax.Array | None:
    """sigma noise, what a finished chunk gets on top of (1 - sigma) x0 for later chunks to look at; None for nothing.

    Args:
      plan: says sigma.
      index: int32, which chunk this is.
      key: of the chunk's noise, the one that ``denoise`` takes.
      shape: of the chunk, [B, g, H, W, C].
    """
    if plan.keeps_clean:
        return None
    return plan.context_sigma(index) * parallel.normal(jax.random.fold_in(key, CONTEXT_FOLD), shape)


def kept(plan: StepPlan, index, x, noise) -> tuple[jax.Array, jax.Array]:
    """(chunk ``x`` as later ones see it, its noise level), given its ``context_noise``."""
    if noise is None:
        return x, jnp.float32(0.0)
    sigma = plan.context_sigma(index)
    return (1.0 - sigma) * x + noise, sigma


def last_sigma(plan: StepPlan, index) -> jax.Array:
    """Noise level at which chunk ``index`` sees the one before it, a float32 scalar; 0 for the first chunk."""
    if plan.keeps_clean:
        return jnp.float32(0.0)
    return jnp.where(index > 0, plan.context_sigma(index - 1), 0.0)


def ring_slot(index, sink: int, ring: int) -> tuple[jax.Array, jax.Array]:
    """(slot chunk ``index`` goes to, whether to leave it as it is): the sink's slots first, then the oldest's."""
    behind_sink = index - sink
    keep = (behind_sink >= 0) & (ring == 0)  # a full sink without a ring: nothing to write
    slot = jnp.where(behind_sink < 0, index, sink + behind_sink % max(ring, 1))
    return jnp.where(keep, 0, slot), keep


def write_slot(buffer, new, slot, keep, *, axis: int):
    """``buffer`` with its ``slot``-th stretch of the size of ``new`` replaced along ``axis``, unless ``keep``."""
    size = new.shape[axis]
    old = jax.lax.dynamic_slice_in_dim(buffer, slot * size, size, axis)
    return jax.lax.dynamic_update_slice_in_dim(buffer, jnp.where(keep, old, new), slot * size, axis)


def cache_bytes(state) -> int:
    """Bytes a stream holds between chunks."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state._replace(key=None)))
