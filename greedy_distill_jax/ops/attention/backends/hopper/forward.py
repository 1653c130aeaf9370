"""Forward kernel for Hopper: output and log-sum-exp, of whole tiles or of parts of equal work that are merged after.

Two warpgroups take turns: while one has the tensor cores, the other one is at its softmax (Shah et al.,
FlashAttention-3, 2024, section 3.1).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from greedy_distill_jax.ops.attention.backends.hopper import parts, tables
from greedy_distill_jax.ops.attention.backends.hopper.parts import ROWS, Launch

LOG2E = math.log2(math.e)


def forward(q_BLNK, k_BSNK, v_BSNK, launch: Launch, visits: tables.Visits, plan: tables.Parts, scale: float):
    """(output [B, L, N, K], log-sum-exp in powers of 2 [B, N, L]); see ``mosaic_gpu.forward``."""
    if plan.split:
        shapes = (len(plan.parts), launch.tile, launch.dim), (len(plan.parts), launch.tile)
    else:
        shapes = launch.outer_view(q_BLNK).shape, launch.row_shape
    types = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, (launch.dtype, jnp.float32))]
    sides = parts.side(launch, summed=False, row=False), parts.side(launch, summed=True, row=False)
    groups = launch.warpgroups
    scratch = {
        "tile": launch.shared(groups, ROWS, launch.dim),
        "row": launch.row(groups, ROWS),
        "sides": sides,
        "staging": launch.staging(),
        "loaded": plgpu.Barrier(num_barriers=groups),
        "turn": plgpu.Barrier(num_arrivals=groups) if groups == 2 else None,
    }
    inputs = launch.outer_view(q_BLNK), launch.inner_view(k_BSNK), launch.inner_view(v_BSNK)
    numbers = [jnp.asarray(x) for x in (plan.parts, plan.bounds, *visits)]
    body = functools.partial(_kernel, launch, scale * LOG2E, plan.split)
    out, lse = launch.run(body, "forward_kernel", types, scratch, len(plan.bounds) - 1, (*inputs, *numbers))
    if plan.split:
        return _merged(out, lse, launch, plan)
    return launch.from_outer(out), launch.from_row(lse)


def _merged(out, lse, launch: Launch, plan: tables.Parts):
    """Tiles from their parts, each weighted with its share of the exponentials' sum."""
    index = tables.merging(plan, launch.chunks, launch.batch, launch.heads, launch.tiles)
    there = index < len(plan.parts)
    index = np.where(there, index, 0)
    lse_parts = jnp.where(there[..., None], lse[index], -jnp.inf)  # [B, chunks, N, tiles, parts, tokens of a tile]
    peak = jnp.max(lse_parts, axis=-2, keepdims=True)
    shares = jnp.exp2(lse_parts - peak)
    total = jnp.sum(shares, axis=-2, keepdims=True)
    # Where there is no part another one's values were read, which may be NaN: 0 x NaN would spread.
    values = jnp.where(there[..., None, None], out[index], jnp.zeros((), out.dtype)).astype(jnp.float32)
    merged = jnp.einsum("bcntpr,bcntprk->bctrnk", shares / total, values).astype(launch.dtype)
    merged = merged.reshape(launch.batch * launch.chunks, launch.tiles * launch.tile, -1)
    whole = (peak + jnp.log2(total))[..., 0, :].reshape(launch.row_shape)
    return launch.from_outer(merged), launch.from_row(whole)


def _kernel(launch: Launch, factor: float, split: bool, *refs, tile, row, sides, staging, loaded, turn):
    """``factor``: from products of q and k to powers of 2."""
    q_ref, k_ref, v_ref, parts_ref, bounds_ref, starts_ref, valid_ref, full_ref, total_ref, out_ref, lse_ref = refs
    warpgroup, thread_block = lax.axis_index(parts.PARALLEL), lax.axis_index(parts.GRID)
    mine = bounds_ref[thread_block], bounds_ref[thread_block + 1]
    keys, values = sides

    def take_turns():
        if turn is not None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

    def numbers_of(part):
        """Example, chunk, head, tile, and the visits from the first to the end.

        With lengths known at run time a chunk can have fewer visits than its tiles were planned with.
        """
        example, chunk, head, place, *visits = (parts_ref[part, i] for i in range(6))
        return example, chunk, head, place, *(jnp.minimum(visit, total_ref[chunk]) for visit in visits)

    def compute(part, count):
        example, chunk, head, place, first, end = numbers_of(part)
        q, tokens, columns = tile.at[warpgroup], launch.rows(place, warpgroup), launch.columns(head)
        here = example * launch.chunks + chunk
        plgpu.copy_gmem_to_smem(q_ref.at[here, tokens, columns], q, loaded.at[warpgroup])
        plgpu.barrier_wait(loaded.at[warpgroup])

        def visit(i, carry, masked: bool):
            acc, peak, total = carry
            slot = parts.slot_of(count + i - first)
            plgpu.barrier_wait(keys.filled.at[slot])
            z = parts.product(q, keys.blocks.at[slot], launch.block, take_turns)
            plgpu.barrier_arrive(keys.done.at[slot])
            if masked:
                z = jnp.where(parts.counted(z, valid_ref[chunk, i]), z, parts.NEVER)
            higher = jnp.maximum(peak, jnp.max(z, axis=1) * factor)
            shrink = jnp.exp2(peak - higher)
            p = jnp.exp2(z * factor - parts.down(higher, launch.block))
            acc *= parts.down(shrink, launch.dim)
            rounded = p.astype(launch.dtype)
            total = total * shrink + jnp.sum(p, axis=1)
            if staging is None:  # so that nothing of this is put off until the tensor cores are taken
                acc, total, higher, rounded = lax.optimization_barrier((acc, total, higher, rounded))
            if turn is not None:
                plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(values.filled.at[slot])
            if turn is not None:
                plgpu.barrier_wait(turn)
            stage = None if staging is None else staging.at[warpgroup]
            (acc,) = parts.add_products(stage, (acc, rounded, values.blocks.at[slot]))
            plgpu.barrier_arrive(values.done.at[slot])
            return acc, higher, total

        middle = jnp.clip(full_ref[chunk], first, end)
        carry = parts.zeros(ROWS, launch.dim), parts.along_rows(parts.NEVER), parts.along_rows(0.0)
        carry = lax.fori_loop(first, middle, functools.partial(visit, masked=False), carry)
        acc, peak, total = lax.fori_loop(middle, end, functools.partial(visit, masked=True), carry)

        total = jnp.where(total > 0, total, 1.0)  # a query that sees no key gets zeros
        q[...] = (acc / parts.down(total, launch.dim)).astype(launch.dtype)
        row.at[warpgroup][...] = peak + jnp.log2(total)
        plgpu.commit_smem()
        if split:
            targets = out_ref.at[part, launch.rows(0, warpgroup)], lse_ref.at[part, launch.rows(0, warpgroup)]
        else:
            targets = out_ref.at[here, tokens, columns], lse_ref.at[here * launch.heads + head, tokens]
        for source, target in zip((q, row.at[warpgroup]), targets):
            plgpu.copy_smem_to_gmem(source, target)
        plgpu.wait_smem_to_gmem(0)
        return count + end - first

    @pl.when(warpgroup < launch.warpgroups)
    def _():
        plgpu.set_max_registers(parts.REGISTERS[launch.warpgroups], action="increase")
        pl.when(warpgroup == 1)(take_turns)
        lax.fori_loop(*mine, compute, jnp.int32(0))
        pl.when(warpgroup == 0)(take_turns)

    @pl.when(warpgroup == launch.warpgroups)
    def _():
        plgpu.set_max_registers(parts.LOADING, action="decrease")

        def fetch(part, count):
            example, chunk, head, _, first, end = numbers_of(part)

            def sources(i):
                where, tokens = launch.inner_place(starts_ref[chunk, i])
                rows = example * launch.inner_chunks + where
                return [(ref.at[rows, tokens, launch.columns(head)],) for ref in (k_ref, v_ref)]

            return parts.load(sides, sources, first, end, count)

        parts.drain(sides, lax.fori_loop(*mine, fetch, jnp.int32(0)))
