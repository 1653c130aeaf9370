"""Chunk attention on NVIDIA GPUs by cuDNN's fused attention on exact slices: the safe default there.

Query chunks with equally long lists are one batch: their keys are gathered side by side and nothing is masked, so no
pair outside the table is computed. Where only the first chunks of a list are visible, cuDNN is told the number of keys.
The copies of the keys are what a kernel of our own will save; a list of all chunks in their order, as a stream has it,
needs none.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec

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

    def dense(q, k, v, visible):
        lengths = dict(key_value_seq_lengths=visible)
        return jax.nn.dot_product_attention(q, k, v, scale=call.scale, implementation=inner, **lengths)

    return _on_slices(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call, dense)


def stand_in(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call: Call):
    """See ``record.Backend``: XLA asks cuDNN, and that its card, for the plan of a call when it compiles one."""
    return _on_slices(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call, _nothing)


def _on_slices(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call: Call, dense: Callable):
    """Attention by ``dense(q, k, v, visible)``: all queries see all keys, or the first ``visible`` of an example."""
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
        out = dense(queries, keys, values, visible)
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


# Operands and results as jax's lowering has them, in its order: q, k, v, (log-sum-exp, the output's gradient, output),
# (lengths of queries and keys); output, log-sum-exp, (dq, dk, dv, workspace).
@jax.custom_vjp
def _nothing(q_BLNK, k_BSNK, v_BSNK, visible):
    """Where cuDNN's calls would be."""
    return _call_nothing("forward", (q_BLNK, k_BSNK, v_BSNK), visible, (_like(q_BLNK),))[0]


def _nothing_forward(q_BLNK, k_BSNK, v_BSNK, visible):
    batch, length, heads, _ = q_BLNK.shape
    results = _like(q_BLNK), _like(q_BLNK, (batch, heads, length), jnp.float32)
    out, lse_BNL = _call_nothing("forward", (q_BLNK, k_BSNK, v_BSNK), visible, results)
    return out, (q_BLNK, k_BSNK, v_BSNK, visible, lse_BNL, out)


def _nothing_backward(residual, g_BLNK):
    q, k, v, visible, lse_BNL, out = residual
    # cuDNN sums the queries' gradient in float32, and keeps a sum of every row of logits.
    workspace = _like(q, (4 * (q.size + lse_BNL.size),), jnp.uint8)
    operands, results = (q, k, v, lse_BNL, g_BLNK, out), (_like(q), _like(k), _like(v), workspace)
    *grads, _ = _call_nothing("backward", operands, visible, results)
    return *grads, None


_nothing.defvjp(_nothing_forward, _nothing_backward)


def _like(x, shape=None, dtype=None):
    """The type of a result that varies over the same mesh axes as ``x`` (inside ``shard_map``)."""
    kind = jax.typeof(x)
    place = NamedSharding(kind.sharding.mesh, PartitionSpec()) if kind.manual_axis_type.varying else None
    like = dict(sharding=place, manual_axis_type=kind.manual_axis_type)
    return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype, **like)


def _call_nothing(which: str, operands, visible, results):
    if visible is not None:
        operands = (*operands, jnp.full_like(visible, operands[0].shape[1]), visible)
    return jax.ffi.ffi_call(f"stand_in_{which}", results, vmap_method="broadcast_all")(*operands)


BACKEND = Backend("cudnn", why_not, attend, partitionable=False, stand_in=stand_in)
