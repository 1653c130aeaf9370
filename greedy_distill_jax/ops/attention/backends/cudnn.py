"""Chunk attention on NVIDIA GPUs by cuDNN's fused attention on exact slices: the safe default there.

Query chunks with equally long lists are one batch: their keys are gathered side by side and nothing is masked, so no
pair outside the table is computed. The copies of the keys are what a kernel of our own will save.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from greedy_distill_jax.ops.attention.backends.record import Backend, Call, Request


def why_not(request: Request) -> str | None:
    """See ``record.Backend``."""
    if request.platform != "gpu":
        return f"it needs an NVIDIA GPU and this is {request.platform}"
    if request.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the dtype is {request.dtype}, not bfloat16 or float16"
    if request.head_dim % 8 or request.head_dim > 128:
        return f"the head dim is {request.head_dim}, not a multiple of 8 up to 128"
    if request.hides_chunks:
        return "it cannot hide chunks at run time (visible_QS)"
    return None


def attend(q_BLNK, k_BSNK, v_BSNK, visible_QS, call: Call, inner: str = "cudnn"):
    """See ``record.Backend``; ``inner`` is the implementation of ``jax.nn.dot_product_attention``."""
    pattern = call.pattern.merged()
    q = rearrange(q_BLNK, "b (c l) n k -> b c l n k", l=pattern.q_chunk)
    k, v = (rearrange(x, "b (c s) n k -> b c s n k", s=pattern.k_chunk) for x in (k_BSNK, v_BSNK))
    lengths = np.array([len(row) for row in pattern.table])
    parts, order = [], []
    for length in np.unique(lengths):
        members = np.flatnonzero(lengths == length)
        order.append(members)
        if length == 0:
            parts.append(jnp.zeros_like(q[:, members]))
            continue
        index = np.array([sorted(pattern.table[i]) for i in members])
        keys, values = (rearrange(x[:, index], "b c p s n k -> (b c) (p s) n k") for x in (k, v))
        queries = rearrange(q[:, members], "b c l n k -> (b c) l n k")
        out = jax.nn.dot_product_attention(queries, keys, values, scale=call.scale, implementation=inner)
        parts.append(rearrange(out, "(b c) l n k -> b c l n k", c=len(members)))
    back = np.argsort(np.concatenate(order))
    return rearrange(jnp.concatenate(parts, axis=1)[:, back], "b c l n k -> b (c l) n k")


BACKEND = Backend("cudnn", why_not, attend, partitionable=False)
