"""Chunk attention in plain XLA; no block that the table leaves out is computed.

Two forms of the same sum:
- gathered: the few keys of every query chunk are copied side by side and all query chunks are one batch. Best where
  chunks are small (tests, the quickstart), because nothing is sequential.
- scanned: one ``lax.scan`` over the block pairs with the online softmax of flash attention, and a backward pass that
  recomputes the probabilities from the saved log-sum-exp. Memory is one block of logits, whatever the length.

Both are ordinary JAX code, so ``jax.jvp`` goes through ``attend``; ``forward`` and ``backward`` are the two halves of
the ``custom_vjp`` in ``api.py``.
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
NEVER = -1e30


def attend(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call: Call):
    """See ``record.Backend``; both differentiation modes work, reverse mode keeps every block's logits."""
    if _is_gathered(call.pattern):
        return _gathered(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call)
    return _scanned(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call)[0]


def forward(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call: Call):
    """(output, what ``backward`` needs)."""
    if _is_gathered(call.pattern):
        return jax.vjp(lambda q, k, v: _gathered(q, k, v, lengths_Q, call), q_BLNK, k_BSNK, v_BSNK)
    out, lse_BNL = _scanned(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call)
    return out, (q_BLNK, k_BSNK, v_BSNK, lengths_Q, out, lse_BNL)


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


def _gathered(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call: Call):
    # Where everybody sees everything: one long query row instead of copies of the keys.
    merged = call.pattern.merged() if lengths_Q is None else call.pattern
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
    if lengths_Q is not None:
        dynamic = jnp.arange(width, dtype=jnp.int32)[None] < lengths_Q[:, None]
        mask = dynamic if mask is None else mask & dynamic
    if mask is not None:
        mask = jnp.repeat(mask, merged.k_chunk, axis=1)
    return rearrange(_softmax_attend(q, k, v, mask, call.scale), "b n c l k -> b (c l) n k")


def _blocks(lengths_Q, pattern: Pattern) -> tuple[Pattern, int, int]:
    merged = pattern.merged() if lengths_Q is None else pattern
    return merged, largest_divisor(merged.q_chunk, BLOCK), largest_divisor(merged.k_chunk, BLOCK)


def _visits(pattern: Pattern, pairs: BlockList, lengths_Q, per_q: int, per_k: int):
    """Scanned inputs (query block, key block, first visit of the query block, whether it counts or None if all do)."""
    counts = pairs.inner != VOID
    inner = np.where(counts, pairs.inner, 0)
    live = None if counts.all() else jnp.asarray(counts)
    if lengths_Q is not None:
        chunks = pairs.outer // per_q
        dynamic = jnp.asarray(pattern.ranks()[chunks, inner // per_k]) < lengths_Q[chunks]
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


def _if_seen(live, seen, hidden, *carry):
    """``seen(*carry)`` for a visit that counts, else ``hidden(*carry)``; ``live`` is None where all count.

    A block that is hidden costs nothing and is not read: free slots of a cache may hold anything. Under a vmap over
    lengths both are computed and one is chosen.
    """
    return seen(*carry) if live is None else jax.lax.cond(live, seen, hidden, *carry)


def _scanned(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call: Call):
    """(out [B, L, N, K], log-sum-exp [B, N, L] float32)."""
    scale, (pattern, block_q, block_k) = call.scale, _blocks(lengths_Q, call.pattern)
    pairs, _ = pattern.block_lists(block_q, block_k)
    visits = _visits(pattern, pairs, lengths_Q, pattern.q_chunk // block_q, pattern.k_chunk // block_k)
    q, k, v = q_BLNK, k_BSNK, v_BSNK
    batch, length, heads, dim = q.shape

    def visit(carry, xs):
        peak, total, acc, out, lse = carry
        i, j, first, live = xs
        peak, total, acc = jnp.where(first, NEVER, peak), jnp.where(first, 0.0, total), jnp.where(first, 0.0, acc)

        def seen(peak, total, acc):
            q_, k_, v_ = _part(q, i, block_q), _part(k, j, block_k), _part(v, j, block_k)
            z = jnp.einsum("bnlk,bnsk->bnls", q_, k_, preferred_element_type=jnp.float32) * scale
            new = jax.lax.stop_gradient(jnp.maximum(peak, jnp.max(z, axis=-1)))
            shrink, p = jnp.exp(peak - new), jnp.exp(z - new[..., None])
            pv = jnp.einsum("bnls,bnsk->bnlk", p.astype(v.dtype), v_, preferred_element_type=jnp.float32)
            return new, total * shrink + jnp.sum(p, axis=-1), acc * shrink[..., None] + pv

        new, total, acc = _if_seen(live, seen, lambda *old: old, peak, total, acc)
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


def _scanned_backward(q_BLNK, k_BSNK, v_BSNK, lengths_Q, out_BLNK, lse_BNL, g_BLNK, call: Call):
    scale, (pattern, block_q, block_k) = call.scale, _blocks(lengths_Q, call.pattern)
    pairs, _ = pattern.block_lists(block_q, block_k)
    visits = _visits(pattern, pairs, lengths_Q, pattern.q_chunk // block_q, pattern.k_chunk // block_k)
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

        def seen():
            q_, g_, k_, v_ = _part(q, i, block_q), _part(g, i, block_q), _part(k, j, block_k), _part(v, j, block_k)
            p = jnp.exp(dot("bnlk,bnsk->bnls", q_, k_) * scale - row(lse_BNL, i))
            ds = p * (dot("bnlk,bnsk->bnls", g_, v_) - row(delta, i))
            p, ds = p.astype(g.dtype), ds.astype(q.dtype)
            return dot("bnls,bnsk->bnlk", ds, k_), dot("bnls,bnlk->bnsk", ds, q_), dot("bnls,bnlk->bnsk", p, g_)

        def hidden():
            return tuple(zeros((*dq.shape[:2], size, dq.shape[3]), q, k, v, g) for size in (block_q, block_k, block_k))

        of_q, of_k, of_v = _if_seen(live, seen, hidden)
        dq, dk, dv = add(dq, of_q, i, block_q), add(dk, of_k, j, block_k), add(dv, of_v, j, block_k)
        return (dq, dk, dv), None

    start = tuple(zeros((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), q, k, v, g) for x in (q, k, v))
    (dq, dk, dv), _ = jax.lax.scan(visit, start, visits)
    grads = (dq * scale, q), (dk * scale, k), (dv, v)
    return tuple(jnp.swapaxes(d, 1, 2).astype(x.dtype) for d, x in grads)


BACKEND = Backend("xla", lambda request: None, attend, forward, backward, forward_mode=True)
