"""Attention of one chunk of queries to the filled prefix of a cache; see ``api.decode_attention``."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from greedy_distill_jax.ops.attention import pallas_tpu
from greedy_distill_jax.ops.attention.pattern import largest_divisor
from greedy_distill_jax.ops.attention.tuning import Pair
from greedy_distill_jax.ops.attention.xla import zeros

NEVER = -1e30
# Key slots of one step of the XLA loop.
XLA_BLOCK = 1024


def dense(q_BLNK, k_BSNK, v_BSNK, length, scale: float):
    """The definition: all logits at once."""
    keep = (jnp.arange(k_BSNK.shape[1], dtype=jnp.int32) < length)[None, None, None]
    z = jnp.einsum("blnk,bsnk->bnls", q_BLNK, k_BSNK, preferred_element_type=jnp.float32) * scale
    p = jnp.where(keep, jax.nn.softmax(jnp.where(keep, z, NEVER), axis=-1), 0.0)
    return jnp.einsum("bnls,bsnk->blnk", p.astype(v_BSNK.dtype), v_BSNK)


def xla(q_BLNK, k_BSNK, v_BSNK, length, scale: float):
    """Online softmax over the blocks of slots that are filled, so that a short history costs less."""
    slots = k_BSNK.shape[1]
    block = largest_divisor(slots, XLA_BLOCK)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))

    def step(j, carry):
        peak, total, acc = carry
        k_, v_ = (jax.lax.dynamic_slice_in_dim(x, j * block, block, axis=2) for x in (k, v))
        keep = (jnp.arange(block, dtype=jnp.int32) + j * block < length)[None, None, None]
        z = jnp.einsum("bnlk,bnsk->bnls", q, k_, preferred_element_type=jnp.float32) * scale
        z = jnp.where(keep, z, NEVER)
        new = jnp.maximum(peak, jnp.max(z, axis=-1))
        shrink, p = jnp.exp(peak - new), jnp.where(keep, jnp.exp(z - new[..., None]), 0.0)
        pv = jnp.einsum("bnls,bnsk->bnlk", p.astype(v.dtype), v_, preferred_element_type=jnp.float32)
        return new, total * shrink + jnp.sum(p, axis=-1), acc * shrink[..., None] + pv

    row = zeros(q.shape[:3], q, k, v, length)
    filled = jnp.minimum((length + block - 1) // block, slots // block)
    _, total, acc = jax.lax.fori_loop(0, filled, step, (row + NEVER, row, zeros(q.shape, q, k, v, length)))
    out = acc / jnp.where(total > 0, total, 1.0)[..., None]
    return jnp.swapaxes(out, 1, 2).astype(v_BSNK.dtype)


def pallas(q_BLNK, k_BSNK, v_BSNK, length, scale: float, blocks: Pair, interpret):
    """The TPU kernel: a grid over all blocks of slots, in which those not filled are neither loaded nor computed."""
    batch, tokens, heads, dim = q_BLNK.shape
    block_q, block_k = blocks
    slots = k_BSNK.shape[1]
    in_place = dim == pallas_tpu.LANES

    def view(x):
        if in_place:
            return x.reshape(batch, -1, heads * dim)
        return jnp.swapaxes(x, 1, 2).reshape(batch * heads, -1, dim)

    def keys(row, head, i, j, length_ref):
        # A block that is not needed repeats the last one that is, which costs no copy.
        last = jnp.maximum(jax.lax.div(length_ref[0] + (block_k - 1), block_k) - 1, 0)
        return row, jnp.minimum(j, last), head

    q, k, v = view(q_BLNK), view(k_BSNK), view(v_BSNK)
    q_spec = pl.BlockSpec((None, block_q, dim), lambda row, head, i, j, length_ref: (row, i, head))
    k_spec = pl.BlockSpec((None, block_k, dim), keys)
    statistics = pltpu.VMEM((1, block_q), jnp.float32)
    out = pl.pallas_call(
        functools.partial(_kernel, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(
                *((batch, heads) if in_place else (batch * heads, 1)),
                pl.cdiv(tokens, block_q), pl.cdiv(slots, block_k),
            ),
            in_specs=[q_spec, k_spec, k_spec],
            out_specs=q_spec,
            scratch_shapes=[statistics, statistics, pltpu.VMEM((dim, block_q), jnp.float32)],
        ),
        out_shape=pallas_tpu.like(q, q.shape, v.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=pallas_tpu.VMEM_LIMIT,
        ),
        interpret=interpret,
        name="decode_kernel",
    )(jnp.minimum(length, slots).reshape(1), q, k, v)  # fmt: skip
    if in_place:
        return out.reshape(q_BLNK.shape)
    return jnp.swapaxes(out.reshape(batch, heads, tokens, dim), 1, 2)


def _kernel(length_ref, q_ref, k_ref, v_ref, out_ref, peak_ref, total_ref, acc_ref, *, scale):
    j, block = pl.program_id(3), k_ref.shape[0]
    left = length_ref[0] - j * block

    @pl.when(j == 0)
    def _():
        pallas_tpu.start_softmax(peak_ref, total_ref, acc_ref)

    @pl.when(left >= block)
    def _():
        pallas_tpu.add_keys(q_ref[...], k_ref[...], v_ref[...], None, scale, peak_ref, total_ref, acc_ref)

    @pl.when((left > 0) & (left < block))
    def _():
        keep = jax.lax.broadcasted_iota(jnp.int32, (block, q_ref.shape[0]), 0) < left
        rows = jax.lax.broadcasted_iota(jnp.int32, v_ref.shape, 0) < left
        v = jnp.where(rows, v_ref[...], jnp.zeros(v_ref.shape, v_ref.dtype))  # free slots may hold NaN
        pallas_tpu.add_keys(q_ref[...], k_ref[...], v, keep, scale, peak_ref, total_ref, acc_ref)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        pallas_tpu.finish_softmax(out_ref, None, peak_ref, total_ref, acc_ref)
