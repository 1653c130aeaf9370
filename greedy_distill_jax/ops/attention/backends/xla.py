"""Chunk attention in plain XLA; no block that the table leaves out is computed.

Two forms of the same sum:
- gathered: the few keys of every query chunk are copied side by side and all query chunks are one batch. Best where
  chunks are small (tests, the quickstart), because nothing is sequential.
- scanned: one ``lax.scan`` over the block pairs with the online softmax of flash attention, and a backward pass that
  recomputes the probabilities from the saved log-sum-exp. Memory is one block of logits, whatever the length.

Both are ordinary JAX code, so ``jax.jvp`` goes through ``attend``; ``forward`` and ``backward`` are the two halves of
the ``custom_vjp`` in ``api.py``. ``decode`` is the scanned form for a cache of which a prefix is filled.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from greedy_distill_jax.ops.attention.backends.record import Backend, Call
from greedy_distill_jax.ops.attention.pattern import VOID, BlockList, Pattern, largest_divisor

# Chunk pairs of up to GATHER_AREA logits are gathered, unless one example and head would need more than GATHER_LOGITS.
GATHER_AREA = 1 << 10
GATHER_LOGITS = 1 << 22
# Longest block of the scan in tokens: few enough that its logits stay in a CPU's cache, enough to feed a matmul unit.
BLOCK = 256
DECODE_BLOCK = 1024  # key slots of one step of ``decode``
NEVER = -1e30


def attend(q_BLNK, k_BSNK, v_BSNK, visible_QS, call: Call):
    """See ``record.Backend``; both differentiation modes work, reverse mode keeps every block's logits."""
    if _is_gathered(call.pattern):
        return _gathered(q_BLNK, k_BSNK, v_BSNK, visible_QS, call)
    return _scanned(q_BLNK, k_BSNK, v_BSNK, visible_QS, call)[0]


def forward(q_BLNK, k_BSNK, v_BSNK, visible_QS, call: Call):
    """(output, what ``backward`` needs)."""
    if _is_gathered(call.pattern):
        return jax.vjp(lambda q, k, v: _gathered(q, k, v, visible_QS, call), q_BLNK, k_BSNK, v_BSNK)
    out, lse_BNL = _scanned(q_BLNK, k_BSNK, v_BSNK, visible_QS, call)
    return out, (q_BLNK, k_BSNK, v_BSNK, visible_QS, out, lse_BNL)


def backward(residual, g_BLNK, call: Call):
    """(dq, dk, dv)."""
    if _is_gathered(call.pattern):
        return residual(g_BLNK)
    return _scanned_backward(*residual, g_BLNK, call)


def _is_gathered(pattern: Pattern) -> bool:
    merged = pattern.merged()
    longest = max(map(len, merged.table), default=0)
    total = merged.num_q_chunks * merged.q_chunk * longest * merged.k_chunk
    small = pattern.q_chunk * pattern.k_chunk <= GATHER_AREA
    return total <= (BLOCK * BLOCK if merged.num_q_chunks == 1 else GATHER_LOGITS) and small


def _softmax_attend(q_BNCLK, k_BNCSK, v_BNCSK, mask_CS, scale: float):
    logits = jnp.einsum("bnclk,bncsk->bncls", q_BNCLK, k_BNCSK, preferred_element_type=jnp.float32) * scale
    if mask_CS is not None:
        mask = mask_CS[None, None, :, None, :]
        logits = jnp.where(mask, logits, NEVER)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weight = jnp.exp(logits - peak)
    if mask_CS is not None:
        weight = jnp.where(mask, weight, 0.0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    weight = weight / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bncls,bncsk->bnclk", weight.astype(v_BNCSK.dtype), v_BNCSK)


def _gathered(q_BLNK, k_BSNK, v_BSNK, visible_QS, call: Call):
    # Where everybody sees everything: one long query row instead of copies of the keys.
    merged = call.pattern.merged() if visible_QS is None else call.pattern
    q = rearrange(q_BLNK, "b (c l) n k -> b n c l k", l=merged.q_chunk)
    k, v = (rearrange(x, "b (c s) n k -> b n c s k", s=merged.k_chunk) for x in (k_BSNK, v_BSNK))
    index, static = merged.padded()
    chunks, width = index.shape
    if merged.num_k_chunks == width and bool((index == np.arange(width)).all()) and bool(static.all()):
        k, v = (rearrange(x, "b n c s k -> b n 1 (c s) k") for x in (k, v))
        k, v = (jnp.broadcast_to(x, (*x.shape[:2], chunks, *x.shape[3:])) for x in (k, v))
    else:
        k, v = (rearrange(x[:, :, index], "b n c p s k -> b n c (p s) k") for x in (k, v))
    mask = None if static.all() else jnp.asarray(static)
    if visible_QS is not None:
        dynamic = jnp.take_along_axis(visible_QS, jnp.asarray(index), axis=1)
        mask = dynamic if mask is None else mask & dynamic
    if mask is not None:
        mask = jnp.repeat(mask, merged.k_chunk, axis=1)
    return rearrange(_softmax_attend(q, k, v, mask, call.scale), "b n c l k -> b (c l) n k")


def _blocks(visible_QS, pattern: Pattern) -> tuple[Pattern, int, int]:
    merged = pattern.merged() if visible_QS is None else pattern
    return merged, largest_divisor(merged.q_chunk, BLOCK), largest_divisor(merged.k_chunk, BLOCK)


def _visits(pairs: BlockList, visible_QS, per_q: int, per_k: int):
    """Scanned inputs (query block, key block, first visit of the query block, whether it counts or None if all do)."""
    counts = pairs.inner != VOID
    inner = np.where(counts, pairs.inner, 0)
    live = None if counts.all() else jnp.asarray(counts)
    if visible_QS is not None:
        dynamic = visible_QS[pairs.outer // per_q, inner // per_k]
        live = dynamic if live is None else live & dynamic
    return jnp.asarray(pairs.outer), jnp.asarray(inner), jnp.asarray(pairs.edges[0]), live


def _part(x_BSNK, index, size: int):
    """Block ``index`` of ``size`` tokens, [B, N, size, K]. Only blocks are transposed, whole arrays never copied."""
    return jnp.swapaxes(jax.lax.dynamic_slice_in_dim(x_BSNK, index * size, size, axis=1), 1, 2)


def _replace(x_BSNK, part_BNLK, index, size: int):
    part = jnp.swapaxes(part_BNLK, 1, 2).astype(x_BSNK.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x_BSNK, part, index * size, axis=1)


def zeros(shape, *like):
    """float32 zeros, marked as varying over the mesh axes of ``like``: what a loop carry needs inside ``shard_map``."""
    zero = sum(jnp.zeros_like(x, shape=(), dtype=jnp.float32) for x in like)
    return jnp.broadcast_to(zero, shape)


def _scanned(q_BLNK, k_BSNK, v_BSNK, visible_QS, call: Call):
    """(out [B, L, N, K], log-sum-exp [B, N, L] float32)."""
    scale, (pattern, block_q, block_k) = call.scale, _blocks(visible_QS, call.pattern)
    pairs, _ = pattern.block_lists(block_q, block_k)
    visits = _visits(pairs, visible_QS, pattern.q_chunk // block_q, pattern.k_chunk // block_k)
    q, k, v = q_BLNK, k_BSNK, v_BSNK
    batch, length, heads, dim = q.shape

    def visit(carry, xs):
        peak, total, acc, out, lse = carry
        i, j, first, live = xs
        peak, total, acc = jnp.where(first, NEVER, peak), jnp.where(first, 0.0, total), jnp.where(first, 0.0, acc)
        z = jnp.einsum(
            "bnlk,bnsk->bnls", _part(q, i, block_q), _part(k, j, block_k), preferred_element_type=jnp.float32
        )
        z = z * scale if live is None else jnp.where(live, z * scale, NEVER)
        new = jax.lax.stop_gradient(jnp.maximum(peak, jnp.max(z, axis=-1)))
        shrink, p = jnp.exp(peak - new), jnp.exp(z - new[..., None])
        if live is not None:
            p = jnp.where(live, p, 0.0)
        total = total * shrink + jnp.sum(p, axis=-1)
        pv = jnp.einsum("bnls,bnsk->bnlk", p.astype(v.dtype), _part(v, j, block_k), preferred_element_type=jnp.float32)
        acc = acc * shrink[..., None] + pv
        safe = jnp.where(total > 0, total, 1.0)
        # The last visit of a query block leaves the final values.
        out = _replace(out, acc / safe[..., None], i, block_q)
        lse = jax.lax.dynamic_update_slice_in_dim(lse, new + jnp.log(safe), i * block_q, axis=2)
        return (new, total, acc, out, lse), None

    row, acc = zeros((batch, heads, block_q), q, k, v), zeros((batch, heads, block_q, dim), q, k, v)
    out, lse = zeros(q.shape, q, k, v).astype(v.dtype), zeros((batch, heads, length), q, k, v)
    start = (row, row, acc, out, lse)
    (*_, out, lse), _ = jax.lax.scan(visit, start, visits)
    return out, lse


def _scanned_backward(q_BLNK, k_BSNK, v_BSNK, visible_QS, out_BLNK, lse_BNL, g_BLNK, call: Call):
    scale, (pattern, block_q, block_k) = call.scale, _blocks(visible_QS, call.pattern)
    pairs, _ = pattern.block_lists(block_q, block_k)
    visits = _visits(pairs, visible_QS, pattern.q_chunk // block_q, pattern.k_chunk // block_k)
    delta = jnp.einsum("blnk,blnk->bnl", out_BLNK, g_BLNK, preferred_element_type=jnp.float32)
    q, k, v, g = q_BLNK, k_BSNK, v_BSNK, g_BLNK

    def dot(spec, a, b):
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

    def row(x_BNL, i):
        return jax.lax.dynamic_slice_in_dim(x_BNL, i * block_q, block_q, axis=2)[..., None]

    def add(x_BNLK, part, index, size):
        # The gradients are summed in the layout of the blocks; the pass that scales them transposes them as well.
        old = jax.lax.dynamic_slice_in_dim(x_BNLK, index * size, size, axis=2)
        return jax.lax.dynamic_update_slice_in_dim(x_BNLK, old + part, index * size, axis=2)

    def visit(carry, xs):
        dq, dk, dv = carry
        i, j, _, live = xs
        q_, g_, k_, v_ = _part(q, i, block_q), _part(g, i, block_q), _part(k, j, block_k), _part(v, j, block_k)
        p = jnp.exp(dot("bnlk,bnsk->bnls", q_, k_) * scale - row(lse_BNL, i))
        if live is not None:
            p = jnp.where(live, p, 0.0)
        ds = p * (dot("bnlk,bnsk->bnls", g_, v_) - row(delta, i))
        p, ds = p.astype(g.dtype), ds.astype(q.dtype)
        dq = add(dq, dot("bnls,bnsk->bnlk", ds, k_), i, block_q)
        dk = add(dk, dot("bnls,bnlk->bnsk", ds, q_), j, block_k)
        dv = add(dv, dot("bnls,bnlk->bnsk", p, g_), j, block_k)
        return (dq, dk, dv), None

    start = tuple(zeros((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), q, k, v, g) for x in (q, k, v))
    (dq, dk, dv), _ = jax.lax.scan(visit, start, visits)
    grads = (dq * scale, q), (dk * scale, k), (dv, v)
    return tuple(jnp.swapaxes(d, 1, 2).astype(x.dtype) for d, x in grads)


def decode(q_BLNK, k_BSNK, v_BSNK, length, call: Call):
    """Online softmax over the blocks of slots that are filled, so that a short history costs less."""
    slots = k_BSNK.shape[1]
    block = largest_divisor(slots, DECODE_BLOCK)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))

    def step(j, carry):
        peak, total, acc = carry
        k_, v_ = (jax.lax.dynamic_slice_in_dim(x, j * block, block, axis=2) for x in (k, v))
        keep = (jnp.arange(block, dtype=jnp.int32) + j * block < length)[None, None, None]
        z = jnp.einsum("bnlk,bnsk->bnls", q, k_, preferred_element_type=jnp.float32) * call.scale
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


BACKEND = Backend("xla", lambda request: None, attend, forward, backward, forward_mode=True, decode=decode)
