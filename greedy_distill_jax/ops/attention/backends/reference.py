"""Dense masked attention: the definition every other backend is tested against."""

import jax
import jax.numpy as jnp

from greedy_distill_jax.ops.attention.backends.record import Backend, Call

NEVER = -1e30


def attend(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call: Call):
    """softmax(scale q k^T + mask) v with the whole [L, S] matrix in memory; a query without keys gives zeros."""
    pattern = call.pattern
    mask = jnp.asarray(pattern.dense_mask())
    if lengths_Q is not None:
        seen = jnp.asarray(pattern.ranks()) < lengths_Q[:, None]
        mask = mask & seen.repeat(pattern.q_chunk, 0).repeat(pattern.k_chunk, 1)
    mask = mask[None, None]
    logits = jnp.einsum("blnk,bsnk->bnls", q_BLNK, k_BSNK, preferred_element_type=jnp.float32) * call.scale
    logits = jnp.where(mask, logits, NEVER)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weight = jnp.where(mask, jnp.exp(logits - peak), 0.0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    weight = weight / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bnls,bsnk->blnk", weight.astype(v_BSNK.dtype), v_BSNK)


# jax differentiates the matrix as it stands, and keeps it: four matmuls for the two of the forward pass.
BACKEND = Backend("reference", why_not=lambda request: None, attend=attend, forward_mode=True, backward_flops=2.0)
