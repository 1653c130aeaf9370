"""Chunk attention in plain XLA: gather each query chunk's few key chunks, no masked block is computed.

Query chunks are processed in batches whose logits stay below a memory budget; above it the batches run under
``lax.map`` with a rematerialised body, so that neither pass holds the logits of the whole sequence.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from greedy_distill_jax.ops.sliding_window.schedule import Schedule

# Logits of one batch of query chunks, in elements per example and head. Small problems (every test and the
# quickstart) run as one batch, which is fastest on CPU; 1560-token frames run one chunk at a time.
LOGITS_BUDGET = 1 << 22


def _softmax_attend(q_BNCLK, k_BNCSK, v_BNCSK, mask_CS, scale: float):
    logits = jnp.einsum("bnclk,bncsk->bncls", q_BNCLK, k_BNCSK, preferred_element_type=jnp.float32) * scale
    if mask_CS is not None:
        mask = mask_CS[None, None, :, None, :]
        logits = jnp.where(mask, logits, -1e30)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weight = jnp.exp(logits - peak)
    if mask_CS is not None:
        weight = jnp.where(mask, weight, 0.0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    weight = weight / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bncls,bncsk->bnclk", weight.astype(v_BNCSK.dtype), v_BNCSK)


def attend(q_BLNK, k_BSNK, v_BSNK, schedule: Schedule, visible_QS, *, scale: float):
    """See ``api.chunk_attention``."""
    q = rearrange(q_BLNK, "b (c l) n k -> b n c l k", l=schedule.q_chunk)
    k = rearrange(k_BSNK, "b (c s) n k -> b n c s k", s=schedule.k_chunk)
    v = rearrange(v_BSNK, "b (c s) n k -> b n c s k", s=schedule.k_chunk)
    index, static = schedule.padded()
    chunks, width = index.shape
    same = schedule.num_k_chunks == width and bool((index == np.arange(width)).all()) and bool(static.all())

    def body(q_BNCLK, index_CP, mask_CP):
        """A batch of query chunks against their gathered keys."""
        batch = index_CP.shape[0]
        if same:  # everybody sees everything in order: one long query row instead of one key copy per chunk
            k_, v_ = (rearrange(x, "b n c s k -> b n 1 (c s) k") for x in (k, v))
            if visible_QS is None:
                q_ = rearrange(q_BNCLK, "b n c l k -> b n 1 (c l) k")
                out = _softmax_attend(q_, k_, v_, None, scale)
                return rearrange(out, "b n 1 (c l) k -> b n c l k", c=batch)
            k_, v_ = (jnp.broadcast_to(x, (*x.shape[:2], batch, *x.shape[3:])) for x in (k_, v_))
        else:
            k_, v_ = (rearrange(x[:, :, index_CP], "b n c p s k -> b n c (p s) k") for x in (k, v))
        mask = None if mask_CP is None else jnp.repeat(mask_CP, schedule.k_chunk, axis=1)
        return _softmax_attend(q_BNCLK, k_, v_, mask, scale)

    mask = None if static.all() else jnp.asarray(static)
    if visible_QS is not None:
        dynamic = jnp.take_along_axis(visible_QS, jnp.asarray(index), axis=1)
        mask = dynamic if mask is None else mask & dynamic

    per_chunk = schedule.q_chunk * width * schedule.k_chunk
    batch = max(1, min(chunks, LOGITS_BUDGET // per_chunk))
    if batch == chunks:
        out = body(q, jnp.asarray(index), mask)
    else:
        xs = (jnp.moveaxis(q, 2, 0), jnp.asarray(index), mask)
        body_one = jax.checkpoint(lambda x: body(x[0][:, :, None], x[1][None], None if x[2] is None else x[2][None]))
        out = jax.lax.map(lambda x: body_one(x)[:, :, 0], xs)
        out = jnp.moveaxis(out, 0, 2)
    return rearrange(out, "b n c l k -> b (c l) n k")
