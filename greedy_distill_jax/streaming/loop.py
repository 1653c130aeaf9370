"""What the streams of all students share: step lists, the denoising loop of a chunk, the slots of a ring."""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.distribution import parallel

SAMPLERS = ("euler", "renoise")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a chunk is denoised.

    sigmas: per chunk a decreasing list of noise levels starting at 1; chunk i uses list min(i, last). The first
      list may be longer: chunk 0 has no history and is the hardest (docs/method.md, section 9.1).
    sampler: "euler" follows the flow ODE; "renoise" predicts x0 and adds fresh noise (few-step students).
    """

    sigmas: tuple[tuple[float, ...], ...]
    sampler: str = "euler"

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise ValueError(f"Sampling.sampler is {self.sampler!r}; choose from {', '.join(SAMPLERS)}.")
        for row in self.sigmas:
            if not row or any(a <= b for a, b in itertools.pairwise(row)) or row[-1] <= 0 or row[0] > 1:
                raise ValueError(f"Sampling.sigmas must decrease within (0, 1], got {row}.")

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """(sigmas [lists, longest + 1] ending in zeros, number of steps [lists])."""
        longest = max(map(len, self.sigmas))
        table = np.zeros((len(self.sigmas), longest + 1), np.float32)
        for i, row in enumerate(self.sigmas):
            table[i, : len(row)] = row
        return table, np.asarray([len(row) for row in self.sigmas], np.int32)

    @property
    def ends(self) -> np.ndarray:
        """Number of the last step of every list."""
        return self.tables()[1] - 1


class Exit(NamedTuple):
    """The denoising call whose x0 became a chunk."""

    x: jax.Array  # [B, g, H, W, C] its input
    sigma: jax.Array  # scalar, its noise level


def initial_noise(key, shape) -> jax.Array:
    """The noise a chunk starts from, given the key of its step."""
    return parallel.normal(jax.random.fold_in(key, 0), shape)


def denoise(sampling: Sampling, velocity, index, shape, own, key, exits, first=None):
    """Runs the step list of chunk ``index`` up to its exit, the loop of every student.

    Args:
      sampling: step lists and sampler.
      velocity: ``velocity(x, sigma) -> (v, Emitted)``.
      index: int32, which chunk this is.
      shape: of the chunk, [B, g, H, W, C].
      own: keys and values of the right shapes, replaced by those that the last call emits; None to drop them.
      key: of the chunk's noise.
      exits: number of the last step, per list; ``Sampling.ends`` runs them whole.
      first: ``first(x, sigma) -> v`` in place of the first call.

    Returns:
      (x0, own, the last call).
    """
    table, _ = sampling.tables()
    row = jnp.minimum(index, len(table) - 1)
    sigmas, last = jnp.asarray(table)[row], jnp.asarray(exits, jnp.int32)[row]
    x = initial_noise(key, shape)

    def update(n, x, v):
        sigma, after = sigmas[n], sigmas[n + 1]
        x0 = x - sigma * v
        if sampling.sampler == "euler":
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
