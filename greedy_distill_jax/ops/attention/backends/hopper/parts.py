"""What the Hopper kernels share: shapes and views, the ring of blocks in shared memory, matrix products.

A thread block is two or three *warpgroups* of 128 threads that compute, 64 rows of the outer tile each, and one that
loads the inner blocks by TMA into a ring of slots ahead of them. Copies by TMA end at the end of a chunk (outer views)
or of what the inner side is cut into, so that no token is padded in memory. Emulated (``interpret``), arrays are padded
instead, and what a product makes goes into the next one through shared memory and not in registers.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from greedy_distill_jax.ops.varying import varying_as

ROWS = 64  # of a warpgroup's matrix product
STAGES = 2  # slots of the ring
NEVER = -1e30
REGISTERS = {2: 240, 3: 160}  # of a thread that computes, by warpgroups; one that loads keeps LOADING
LOADING = 24
LAYOUT = plgpu.Layout.WGMMA
GRID, PARALLEL = "thread_block", "warpgroup"  # names of axes


@dataclasses.dataclass(frozen=True)
class Launch:
    """Shapes of one kernel.

    Attributes:
      batch, heads, dim: of all arrays.
      dtype: of all arrays but statistics.
      outer: tokens of an outer chunk.
      chunks: outer chunks of an example.
      inner_chunks: what an example's inner tokens are cut into, so that a block ends at the end of one: the chunks
        where some may not be read, 1 where blocks lie across chunks.
      inner: tokens of one of these.
      tile: tokens of an outer tile.
      block: tokens of an inner block.
      interpret: what the kernel is emulated with; None on a device.
    """

    batch: int
    heads: int
    dim: int
    dtype: Any
    outer: int
    chunks: int
    inner_chunks: int
    inner: int
    tile: int
    block: int
    interpret: Any

    @property
    def tiles(self) -> int:
        """Of an outer chunk."""
        return -(-self.outer // self.tile)

    @property
    def warpgroups(self) -> int:
        """Those that compute."""
        return self.tile // ROWS

    def shared_bytes(self, tiles: int) -> int:
        """Of shared memory, for so many outer tiles and two sides of the ring; without numbers per token."""
        return (tiles * self.tile + 2 * STAGES * self.block) * self.dim * jnp.dtype(self.dtype).itemsize

    # --- views ----------------------------------------------------------------------------------------------------

    def outer_view(self, x_BLNK):
        """[B, L, N, K] -> [B chunks, tokens of a chunk, N K]."""
        x = x_BLNK.reshape(self.batch * self.chunks, self.outer, self.heads * self.dim)
        return self._padded(x, 1, self.tiles * self.tile - self.outer)

    def from_outer(self, x):
        """An outer view back to [B, L, N, K]."""
        return x[:, : self.outer].reshape(self.batch, -1, self.heads, self.dim)

    def inner_view(self, x_BSNK):
        """[B, S, N, K] -> [B inner chunks, tokens, N K]."""
        x = x_BSNK.reshape(self.batch * self.inner_chunks, self.inner, self.heads * self.dim)
        return self._padded(x, 1, self.block)

    @property
    def row_shape(self) -> tuple[int, int]:
        """[B chunks N, tokens of a chunk's tiles]: one number per outer token."""
        return self.batch * self.chunks * self.heads, self.tiles * self.tile

    def outer_row(self, x_BNL):
        """[B, N, L] -> ``row_shape``."""
        x = x_BNL.reshape(self.batch, self.heads, self.chunks, self.outer).swapaxes(1, 2)
        return jnp.pad(x.reshape(-1, self.outer), ((0, 0), (0, self.tiles * self.tile - self.outer)))

    def from_row(self, x):
        """``row_shape`` -> [B, N, L]."""
        x = x[:, : self.outer].reshape(self.batch, self.chunks, self.heads, self.outer)
        return x.swapaxes(1, 2).reshape(self.batch, self.heads, -1)

    def inner_row(self, x_BNS):
        """[B, N, S] -> [B N inner chunks, tokens]."""
        return self._padded(x_BNS.reshape(-1, self.inner), 1, self.block)

    def _padded(self, x, axis: int, more: int):
        if not self.interpret:
            return x
        return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])

    # --- where things lie -------------------------------------------------------------------------------------------

    def columns(self, head):
        """A head's part of the lanes."""
        return pl.ds(head * self.dim, self.dim)

    def inner_place(self, start):
        """(inner chunk of an example, tokens in it) of the block that begins at token ``start``."""
        chunk, token = lax.div(start, jnp.int32(self.inner)), lax.rem(start, jnp.int32(self.inner))
        return chunk, pl.ds(pl.multiple_of(token, 8), self.block)

    def rows(self, tile, warpgroup):
        """A warpgroup's tokens of an outer chunk."""
        return pl.ds(tile * self.tile + warpgroup * ROWS, ROWS)

    def shared(self, *shape: int, block: int | None = None):
        """[..., tokens, lanes] in shared memory, laid out for the tensor cores.

        Args:
          *shape: of the array.
          block: tokens over which a product sums, if they are not the lanes: the swizzle's width has to divide both.
        """
        width = next(w for w in (64, 32, 16) if shape[-1] % w == 0 and (block or w) % w == 0)
        transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width))
        return plgpu.SMEM(shape, self.dtype, transforms=transforms)

    def staging(self):
        """Where an emulated product's factor lies; None on a device, where it stays in registers."""
        return self.shared(self.warpgroups, ROWS, self.block) if self.interpret else None

    def row(self, slots: int, tokens: int):
        """Numbers per token in shared memory."""
        return plgpu.SMEM((slots, tokens), jnp.float32)

    def run(self, body: Callable, name: str, out_types: Sequence, scratch: Mapping, grid: int, inputs: Sequence):
        """The outputs of ``body(*input refs, *output refs, **scratch refs)`` in ``grid`` thread blocks."""
        body.__name__ = name
        made = plgpu.kernel(
            body,
            out_type=tuple(out_types),
            scratch_types=scratch,
            grid=(grid,),
            grid_names=(GRID,),
            num_threads=self.warpgroups + 1,
            thread_name=PARALLEL,
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
            ),
            **({"interpret": self.interpret} if self.interpret else {}),
        )(*inputs)
        return [varying_as(x, inputs[0]) for x in made]


class Side(NamedTuple):
    """One of the ring's two streams of inner blocks.

    Attributes:
      blocks: [STAGES, tokens, K] in shared memory.
      row: [STAGES, tokens], a number for each token; None without.
      filled: barriers; a slot holds what was asked for.
      done: barriers; every warpgroup has used a slot.
    """

    blocks: Any
    row: Any
    filled: Any
    done: Any


def side(launch: Launch, *, summed: bool, row: bool) -> Side:
    """The types of a side; ``summed``: a product sums over its tokens; ``row``: with a number for each token."""
    return Side(
        launch.shared(STAGES, launch.block, launch.dim, block=launch.block if summed else None),
        launch.row(STAGES, launch.block) if row else None,
        plgpu.Barrier(num_arrivals=2 if row else 1, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=launch.warpgroups, num_barriers=STAGES),
    )


def slot_of(count):
    """Where the ``count``-th block of a thread block lies."""
    return lax.rem(count, jnp.int32(STAGES))


def load(sides: Sequence[Side], sources: Callable, first, last, count):
    """Loads visits into the ring, for the warpgroup that loads; returns the new count.

    Args:
      sides: the ring.
      sources: ``sources(visit)`` gives, for each side, what goes into ``blocks`` and, if it has one, into ``row``.
      first, last: visits.
      count: blocks that were loaded before.
    """

    def visit(i, count):
        slot = slot_of(count)
        for ring, refs in zip(sides, sources(i), strict=True):

            @pl.when(count >= STAGES)
            def _(ring=ring):
                plgpu.barrier_wait(ring.done.at[slot])

            for ref, buffer in zip(refs, (ring.blocks, ring.row)):
                plgpu.copy_gmem_to_smem(ref, buffer.at[slot], ring.filled.at[slot])
        return count + 1

    return lax.fori_loop(first, last, visit, count)


def drain(sides: Sequence[Side], count) -> None:
    """Waits until the last ``count`` blocks, as many as there are slots, were used."""

    def visit(i, none):
        for ring in sides:
            plgpu.barrier_wait(ring.done.at[slot_of(i)])
        return none

    lax.fori_loop(jnp.maximum(count - STAGES, 0), count, visit, jnp.int32(0))


def zeros(*shape: int):
    """float32 in registers, as products have it."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), LAYOUT)


def along_rows(value: float):
    """One number per row of a warpgroup."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), LAYOUT.reduce(1))


def product(a_ref, b_ref, columns: int, meanwhile: Callable = lambda: None):
    """a b^T, [ROWS, columns] float32, both from shared memory; ``meanwhile()`` while the tensor cores work."""

    def run(acc):
        plgpu.wgmma(acc, a_ref, b_ref.transpose((1, 0)))
        meanwhile()
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, columns), jnp.float32))


def products(first: tuple, second: tuple, columns: int):
    """``product`` twice, one wait."""

    def run(acc1, acc2):
        for acc, (a_ref, b_ref) in ((acc1, first), (acc2, second)):
            plgpu.wgmma(acc, a_ref, b_ref.transpose((1, 0)))
        return acc1[...], acc2[...]

    return pl.run_scoped(run, *[plgpu.ACC((ROWS, columns), jnp.float32)] * 2)


def add_products(staging, *terms: tuple):
    """acc + a b for every (acc, a, b_ref), one wait.

    Args:
      staging: [ROWS, tokens] in shared memory for a, None if it stays in registers.
      *terms: accumulators [ROWS, K] float32, factors [ROWS, tokens], references [tokens, K].
    """
    if staging is None:

        def run(accs):
            for acc, (_, a, b_ref) in zip(accs, terms, strict=True):
                plgpu.wgmma(acc, a, b_ref)

        return pl.run_state(run)(tuple(plgpu.ACC.init(acc) for acc, _, _ in terms))

    def emulated(acc, a, b_ref):
        staging[...] = a
        plgpu.commit_smem()

        def run(out):
            plgpu.wgmma(out, staging, b_ref)
            return out[...]

        return acc + pl.run_scoped(run, plgpu.ACC(acc.shape, jnp.float32))

    return tuple(emulated(*term) for term in terms)


def counted(x, valid):
    """bool like ``x``, [ROWS, columns] or [columns]: the columns below ``valid``."""
    layout = LAYOUT if x.ndim == 2 else LAYOUT.reduce(0)
    return plgpu.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1, layout=layout) < valid


def down(row, columns: int):
    """A number per row -> [ROWS, columns]."""
    return lax.broadcast_in_dim(row, (ROWS, columns), [0])


def across(row, columns: int):
    """A number per column -> [ROWS, columns]."""
    return lax.broadcast_in_dim(row, (ROWS, columns), [1])
