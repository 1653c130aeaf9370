"""Dense masked attention: the definition every other backend is tested against."""

import jax
import jax.numpy as jnp

from greedy_distill_jax.ops.attention.backends.record import Backend, Call

NEVER = -1e30


def attend(q_BLNK, k_BSNK, v_BSNK, visible_QS, call: Call):
    """softmax(scale q k^T + mask) v with the whole [L, S] matrix in memory; a query without keys gives zeros."""
    pattern = call.pattern
    mask = jnp.asarray(pattern.dense_mask())
    if visible_QS is not None:
        mask = mask & visible_QS.repeat(pattern.q_chunk, 0).repeat(pattern.k_chunk, 1)
    mask = mask[None, None]
    logits = jnp.einsum("blnk,bsnk->bnls", q_BLNK, k_BSNK, preferred_element_type=jnp.float32) * call.scale
    logits = jnp.where(mask, logits, NEVER)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weight = jnp.where(mask, jnp.exp(logits - peak), 0.0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    weight = weight / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bnls,bsnk->blnk", weight.astype(v_BSNK.dtype), v_BSNK)


def decode(q_BLNK, k_BSNK, v_BSNK, length, call: Call):
    """The same of the first ``length`` keys."""
    keep = (jnp.arange(k_BSNK.shape[1], dtype=jnp.int32) < length)[None, None, None]
    z = jnp.einsum("blnk,bsnk->bnls", q_BLNK, k_BSNK, preferred_element_type=jnp.float32) * call.scale
    p = jnp.where(keep, jax.nn.softmax(jnp.where(keep, z, NEVER), axis=-1), 0.0)
    return jnp.einsum("bnls,bsnk->blnk", p.astype(v_BSNK.dtype), v_BSNK)


# jax differentiates the matrix as it stands, and keeps it: four matmuls for the two of the forward pass.
BACKEND = Backend(
    "reference", why_not=lambda request: None, attend=attend, decode=decode, forward_mode=True, backward_flops=2.0
)
