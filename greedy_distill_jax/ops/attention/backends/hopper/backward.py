"""Backward kernels for Hopper: dq over the keys that a query tile sees, dk and dv over the queries that see a key tile.

Both compute the probabilities again from the log-sum-exp. A tile of the outer side stays in shared memory; the visits
of its chunk, and nothing else, pass by.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from greedy_distill_jax.ops.attention.backends.hopper import parts, tables
from greedy_distill_jax.ops.attention.backends.hopper.forward import LOG2E
from greedy_distill_jax.ops.attention.backends.hopper.parts import ROWS, Launch


def dq(arrays, rows_BNL, launch: Launch, visits: tables.Visits, plan: tables.Parts, scale: float):
    """dq [B, L, N, K].

    Args:
      arrays: q, the cotangent g [B, L, N, K]; k, v [B, S, N, K].
      rows_BNL: log-sum-exp in powers of 2, and delta, the sum over K of output times cotangent.
      launch: queries outside, keys inside.
      visits: by query.
      plan: whole tiles.
      scale: of the softmax.
    """
    rows = [launch.outer_row(x) for x in rows_BNL]
    return _run(False, arrays, rows, launch, visits, plan, scale)[0]


def dkv(arrays, rows_BNL, launch: Launch, visits: tables.Visits, plan: tables.Parts, scale: float):
    """(dk, dv), both [B, S, N, K]; as ``dq`` with k, v; q, g as arrays, keys outside, queries inside, visits by key."""
    rows = [launch.inner_row(x) for x in rows_BNL]
    return _run(True, arrays, rows, launch, visits, plan, scale)


def _run(by_key: bool, arrays, rows, launch: Launch, visits: tables.Visits, plan: tables.Parts, scale: float):
    outer, inner = [launch.outer_view(x) for x in arrays[:2]], [launch.inner_view(x) for x in arrays[2:]]
    groups = launch.warpgroups
    # Products sum over the tokens of k in dq, of q and g in dk and dv.
    sides = parts.side(launch, summed=True, row=by_key), parts.side(launch, summed=by_key, row=by_key)
    scratch = {
        "tiles": tuple(launch.shared(groups, ROWS, launch.dim) for _ in range(2)),
        "rows": None if by_key else tuple(launch.row(groups, ROWS) for _ in range(2)),
        "sides": sides,
        "staging": launch.staging(),
        "loaded": plgpu.Barrier(num_arrivals=2 if by_key else 4, num_barriers=groups),
    }
    numbers = [jnp.asarray(x) for x in (plan.parts, *visits)]
    types = [jax.ShapeDtypeStruct(outer[0].shape, launch.dtype)] * (2 if by_key else 1)
    body, name = functools.partial(_kernel, launch, scale, by_key), "dkv_kernel" if by_key else "dq_kernel"
    made = launch.run(body, name, types, scratch, len(plan.parts), (*outer, *inner, *rows, *numbers))
    return [launch.from_outer(x) for x in made]


def _kernel(launch: Launch, scale: float, by_key: bool, *refs, tiles, rows, sides, staging, loaded):
    outer_refs, inner_refs, row_refs, (parts_ref, starts_ref, valid_ref, full_ref, total_ref), outs = (
        refs[:2],
        refs[2:4],
        refs[4:6],
        refs[6:11],
        refs[11:],
    )
    warpgroup = lax.axis_index(parts.PARALLEL)

    def numbers():
        """Read by each role for itself: what lives across the branch is spilled, for a loader has few registers."""
        example, chunk, head, place = (parts_ref[lax.axis_index(parts.GRID), i] for i in range(4))
        return example, chunk, head, place, total_ref[chunk], launch.columns(head)

    @pl.when(warpgroup < launch.warpgroups)
    def _():
        plgpu.set_max_registers(parts.REGISTERS[launch.warpgroups], action="increase")
        example, chunk, head, place, total, columns = numbers()
        here, tokens = example * launch.chunks + chunk, launch.rows(place, warpgroup)
        mine = [tile.at[warpgroup] for tile in tiles]
        for ref, tile in zip(outer_refs, mine):
            plgpu.copy_gmem_to_smem(ref.at[here, tokens, columns], tile, loaded.at[warpgroup])
        if not by_key:
            for ref, row in zip(row_refs, rows):
                source = ref.at[here * launch.heads + head, tokens]
                plgpu.copy_gmem_to_smem(source, row.at[warpgroup], loaded.at[warpgroup])
        plgpu.barrier_wait(loaded.at[warpgroup])
        if not by_key:
            of_tile = [plgpu.load(row.at[warpgroup], layout=parts.LAYOUT.reduce(1)) for row in rows]

        def visit(i, carry, masked: bool):
            slot = parts.slot_of(i)
            for ring in sides:
                plgpu.barrier_wait(ring.filled.at[slot])
            first, second = (ring.blocks.at[slot] for ring in sides)
            z, dp = parts.products((mine[0], first), (mine[1], second), launch.block)

            lse, delta = (
                of_tile
                if not by_key
                else (plgpu.load(ring.row.at[slot], layout=parts.LAYOUT.reduce(0)) for ring in sides)
            )
            spread = functools.partial(parts.across if by_key else parts.down, columns=launch.block)
            if masked and by_key:  # no probability is left
                lse = jnp.where(parts.counted(lse, valid_ref[chunk, i]), lse, -parts.NEVER)
            p = jnp.exp2(z * (scale * LOG2E) - spread(lse))
            if masked and not by_key:
                p = jnp.where(parts.counted(p, valid_ref[chunk, i]), p, 0.0)
            ds = p * (dp - spread(delta))
            terms = [(carry[0], ds.astype(launch.dtype), first)]
            if by_key:
                terms.append((carry[1], p.astype(launch.dtype), second))
            carry = parts.add_products(None if staging is None else staging.at[warpgroup], *terms)
            for ring in sides:
                plgpu.barrier_arrive(ring.done.at[slot])
            return carry

        middle = full_ref[chunk]
        carry = tuple(parts.zeros(ROWS, launch.dim) for _ in outs)
        carry = lax.fori_loop(0, middle, functools.partial(visit, masked=False), carry)
        carry = lax.fori_loop(middle, total, functools.partial(visit, masked=True), carry)
        for tile, made, factor in zip(mine, carry, (scale, 1.0)):
            tile[...] = (made * factor).astype(launch.dtype)
        plgpu.commit_smem()
        for tile, out in zip(mine, outs):
            plgpu.copy_smem_to_gmem(tile, out.at[here, tokens, columns])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == launch.warpgroups)
    def _():
        plgpu.set_max_registers(parts.LOADING, action="decrease")
        example, chunk, head, _, total, columns = numbers()

        def sources(i):
            where, tokens = launch.inner_place(starts_ref[chunk, i])
            found = [[ref.at[example * launch.inner_chunks + where, tokens, columns]] for ref in inner_refs]
            if by_key:
                for source, ref in zip(found, row_refs):
                    source.append(ref.at[(example * launch.heads + head) * launch.inner_chunks + where, tokens])
            return found

        parts.load(sides, sources, jnp.int32(0), total, jnp.int32(0))
        parts.drain(sides, total)
