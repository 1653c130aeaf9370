"""The one attention function of the project."""

import functools
import math
from typing import Any

import jax
from jaxtyping import Array, Float, Int32

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ops.attention import select
from greedy_distill_jax.ops.attention.backends.record import Backend, Call
from greedy_distill_jax.ops.attention.pattern import Pattern
from greedy_distill_jax.ops.attention.tuning import Blocks
from greedy_distill_jax.ops.varying import varying_alike

DERIVATIVES = ("vjp", "jvp")


def chunk_attention(
    q_BLNK: Float[Array, "B L N K"],
    k_BSNK: Float[Array, "B S N K"],
    v_BSNK: Float[Array, "B S N K"],
    pattern: Pattern,
    *,
    lengths_Q: Int32[Array, " Q"] | None = None,
    implementation: str | None = None,
    scale: float | None = None,
    derivative: str = "vjp",
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Float[Array, "B L N K"]:
    """Attention of query chunks over the key chunks that ``pattern`` lists for them.

    Works under jit, vmap, remat and shard_map over batch and heads.

    Args:
      q_BLNK: queries, L = query chunks x ``pattern.q_chunk``, head dim K.
      k_BSNK: keys, S = ``pattern.num_k_chunks`` x ``pattern.k_chunk``.
      v_BSNK: values.
      pattern: who sees whom, in chunks; static.
      lengths_Q: how many chunks of every query chunk's list, from its first one on, are visible, where that is known
        only at run time: the filled slots of a cache, put behind what is always there. None for whole lists.
      implementation: name of a backend (``backends.names()``), or None for the best one on this platform.
      scale: softmax scale, 1/sqrt(K) by default.
      derivative: "vjp" for gradients (a ``custom_vjp`` that keeps the output and the log-sum-exp and recomputes
        the rest; ``jax.jvp`` raises TypeError), "jvp" for tangents by ``jax.jvp``, as consistency losses need
        them under a stop-gradient.
      blocks: block sizes of a backend that has them; None takes the tuned ones.
      interpret: emulates Pallas kernels on any platform (True, ``pltpu.InterpretParams`` or
        ``plgpu.InterpretGPUParams``).

    Returns:
      [B, L, N, K] in the dtype of ``v``; the softmax is in float32. A query that sees no key gets zeros.

    Raises:
      ValueError: shapes that do not fit the pattern.
      UserError: an implementation that is unknown or cannot run here; the message says why and what can.
      TypeError: forward-mode differentiation with ``derivative="vjp"``.
    """
    if q_BLNK.shape[1] != pattern.q_tokens or k_BSNK.shape[1] != pattern.k_tokens:
        raise ValueError(
            f"chunk_attention: q has {q_BLNK.shape[1]} tokens and k {k_BSNK.shape[1]}, but the pattern has "
            f"{pattern.num_q_chunks} query chunks of {pattern.q_chunk} and {pattern.num_k_chunks} key chunks of "
            f"{pattern.k_chunk} (so {pattern.q_tokens} and {pattern.k_tokens}); build it from the tokens of one chunk."
        )
    if derivative not in DERIVATIVES:
        raise UserError(f'chunk_attention: derivative must be "vjp" or "jvp", got {derivative!r}.', field="derivative")
    backend = select.choose(
        implementation,
        q_BLNK,
        pattern,
        derivative=derivative,
        interpret=interpret,
        function="chunk_attention",
    )
    call = _call(backend, pattern, q_BLNK, scale, blocks, interpret)
    q_BLNK, k_BSNK, v_BSNK = varying_alike(q_BLNK, k_BSNK, v_BSNK)  # backends give gradients of one type
    if derivative == "jvp" or backend.backward is None:
        return backend.attend(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call)
    try:
        return _attend(q_BLNK, k_BSNK, v_BSNK, lengths_Q, backend, call)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            f"chunk_attention: implementation {backend.name!r} has gradients only. For jax.jvp call it with "
            f'derivative="jvp", and a network with Teacher(cfg, derivative="jvp") or make_student(cfg, '
            f'derivative="jvp").'
        ) from error


def _call(backend: Backend, pattern: Pattern, q_BLNK, scale: float | None, blocks: Blocks | None, interpret) -> Call:
    """The static part of a call, scale and block sizes filled in."""
    scale = 1.0 / math.sqrt(q_BLNK.shape[-1]) if scale is None else scale
    if blocks is None and backend.blocks is not None:
        blocks = backend.blocks(select.device()[1], pattern, q_BLNK.shape[-1], str(q_BLNK.dtype))
    return Call(pattern, scale, blocks, interpret)


# Reverse mode keeps the output and the log-sum-exp instead of every block's logits, which JAX would keep if it
# differentiated the loop; what is not differentiated runs ``attend`` and keeps nothing.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q_BLNK, k_BSNK, v_BSNK, lengths_Q, backend: Backend, call: Call):
    return backend.attend(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call)


def _attend_forward(q_BLNK, k_BSNK, v_BSNK, lengths_Q, backend: Backend, call: Call):
    return backend.forward(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call)


def _attend_backward(backend: Backend, call: Call, residual, g_BLNK):
    return *backend.backward(residual, g_BLNK, call), None  # lengths have no gradient


_attend.defvjp(_attend_forward, _attend_backward)
