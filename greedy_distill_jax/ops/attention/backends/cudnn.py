"""Chunk attention on NVIDIA GPUs by cuDNN's fused attention on exact slices: the safe default there.

Query chunks with equally long lists are one batch: their keys are gathered side by side and nothing is masked, so no
pair outside the table is computed. Where only the first chunks of a list are visible, cuDNN is told the number of keys.
The copies of the keys are what a kernel of our own will save; a list of all chunks in their order, as a stream has it,
needs none.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from greedy_distill_jax.ops.attention.backends.record import Backend, Call, Request
from greedy_distill_jax.ops.attention.pattern import Pattern


def why_not(request: Request) -> str | None:
    """See ``record.Backend``."""
    if request.platform != "gpu":
        return f"it needs an NVIDIA GPU and this is {request.platform}"
    if request.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the dtype is {request.dtype}, not bfloat16 or float16"
    if request.head_dim % 8 or request.head_dim > 128:
        return f"the head dim is {request.head_dim}, not a multiple of 8 up to 128"
    return None


def attend(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call: Call, inner: str = "cudnn"):
    """See ``record.Backend``; ``inner`` is the implementation of ``jax.nn.dot_product_attention``."""
    pattern = call.pattern.merged() if lengths_Q is None else call.pattern
    q = rearrange(q_BLNK, "b (c l) n k -> b c l n k", l=pattern.q_chunk)
    listed = np.array([len(row) for row in pattern.table])
    parts, order = [], []
    for length in np.unique(listed):
        members = np.flatnonzero(listed == length)
        order.append(members)
        if length == 0:
            parts.append(jnp.zeros_like(q[:, members]))
            continue
        keys, values = (_side_by_side(x, pattern, members) for x in (k_BSNK, v_BSNK))
        visible = None
        if lengths_Q is not None:
            visible = jnp.tile(jnp.minimum(lengths_Q[members], length) * pattern.k_chunk, len(q))
        queries = rearrange(q if len(members) == len(listed) else q[:, members], "b c l n k -> (b c) l n k")
        out = jax.nn.dot_product_attention(
            queries, keys, values, scale=call.scale, key_value_seq_lengths=visible, implementation=inner
        )
        if visible is not None:  # without a key cuDNN leaves what it finds
            out = jnp.where((visible > 0)[:, None, None, None], out, jnp.zeros((), out.dtype))
        parts.append(rearrange(out, "(b c) l n k -> b c l n k", c=len(members)))
    if len(parts) == 1:
        return rearrange(parts[0], "b c l n k -> b (c l) n k")
    back = np.argsort(np.concatenate(order))
    return rearrange(jnp.concatenate(parts, axis=1)[:, back], "b c l n k -> b (c l) n k")


def _side_by_side(x_BSNK, pattern: Pattern, members):
    """The chunks that some query chunks list, in the order of their lists: [B query chunks, keys, N, K]."""
    index = np.array([pattern.table[i] for i in members])
    if index.shape == (1, pattern.num_k_chunks) and (index == np.arange(pattern.num_k_chunks)).all():
        return x_BSNK
    chunks = rearrange(x_BSNK, "b (c s) n k -> b c s n k", s=pattern.k_chunk)
    return rearrange(chunks[:, index], "b c p s n k -> (b c) (p s) n k")


BACKEND = Backend("cudnn", why_not, attend, partitionable=False)
