"""Dense masked attention: the definition every other implementation is tested against."""

import jax
import jax.numpy as jnp

from greedy_distill_jax.ops.attention.pattern import Pattern


def attend(q_BLNK, k_BSNK, v_BSNK, pattern: Pattern, visible_QS, *, scale: float):
    """softmax(scale q k^T + mask) v with the whole [L, S] matrix in memory; a query without keys gives zeros."""
    mask = jnp.asarray(pattern.dense_mask())
    if visible_QS is not None:
        mask = mask & visible_QS.repeat(pattern.q_chunk, 0).repeat(pattern.k_chunk, 1)
    mask = mask[None, None]
    logits = jnp.einsum("blnk,bsnk->bnls", q_BLNK, k_BSNK, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(mask, logits, -1e30)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weight = jnp.where(mask, jnp.exp(logits - peak), 0.0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    weight = weight / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bnls,bsnk->blnk", weight.astype(v_BSNK.dtype), v_BSNK)
