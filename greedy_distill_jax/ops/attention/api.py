"""The one attention function of the project (DESIGN.md, "One attention op"), and its form for streaming."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ops.attention import cudnn, decode, pallas_tpu, reference, select, tuning, xla
from greedy_distill_jax.ops.attention.pattern import Pattern


def chunk_attention(
    q_BLNK: Float[Array, "B L N K"],
    k_BSNK: Float[Array, "B S N K"],
    v_BSNK: Float[Array, "B S N K"],
    pattern: Pattern,
    *,
    visible_QS: Bool[Array, "Q C"] | None = None,
    implementation: str | None = None,
    scale: float | None = None,
    derivative: str = "vjp",
    blocks: tuning.Blocks | None = None,
    interpret: Any = False,
) -> Float[Array, "B L N K"]:
    """Attention of query chunks over the key chunks that ``pattern`` lists for them.

    Works under jit, vmap, remat and shard_map over batch and heads.

    Args:
      q_BLNK: queries, L = query chunks x ``pattern.q_chunk``, head dim K.
      k_BSNK: keys, S = ``pattern.num_k_chunks`` x ``pattern.k_chunk``.
      v_BSNK: values.
      pattern: who sees whom, in chunks; static.
      visible_QS: optional traced [query chunks, key chunks] mask on top of the table: which cache slots are
        filled is known only while streaming.
      implementation: "pallas_tpu", "cudnn", "xla", "reference" (dense), or None for the best one on this platform.
      scale: softmax scale, 1/sqrt(K) by default.
      derivative: "vjp" for gradients (a ``custom_vjp`` that keeps the output and the log-sum-exp and recomputes
        the rest; ``jax.jvp`` raises TypeError), "jvp" for tangents by ``jax.jvp``, as consistency losses need
        them under a stop-gradient (FRONTIER_SPEC C.9.4).
      blocks: block sizes of the Pallas kernels; None takes the tuned ones.
      interpret: emulates Pallas kernels on any platform (True or ``pltpu.InterpretParams``).

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
    if derivative not in ("vjp", "jvp"):
        raise UserError(f'chunk_attention: derivative must be "vjp" or "jvp", got {derivative!r}.')
    name = select.choose(
        implementation, q_BLNK, visible_QS=visible_QS, interpret=interpret, function="chunk_attention",
        allowed=select.NAMES if derivative == "vjp" else ("xla", "reference"),
    )  # fmt: skip
    scale = 1.0 / math.sqrt(q_BLNK.shape[-1]) if scale is None else scale
    if name == "reference":
        return reference.attend(q_BLNK, k_BSNK, v_BSNK, pattern, visible_QS, scale=scale)
    if name == "cudnn":
        return cudnn.attend(q_BLNK, k_BSNK, v_BSNK, pattern, scale=scale)
    if derivative == "jvp":
        return xla.attend(q_BLNK, k_BSNK, v_BSNK, visible_QS, pattern, scale)
    call = _Call(name, pattern, scale)
    if name == "pallas_tpu":
        blocks = blocks or tuning.choose(
            select.device()[1], pattern.q_chunk, pattern.k_chunk, q_BLNK.shape[-1], str(q_BLNK.dtype)
        )
        call = dataclasses.replace(call, blocks=blocks, interpret=interpret)
    try:
        return _attend(q_BLNK, k_BSNK, v_BSNK, visible_QS, call)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            f'chunk_attention: implementation {name!r} has gradients only. For jax.jvp call it with derivative="jvp" '
            f"(plain XLA, for tangents under a stop-gradient)."
        ) from error


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of one call."""

    implementation: str
    pattern: Pattern
    scale: float
    blocks: tuning.Blocks | None = None
    interpret: Any = False

    def forward(self, *arrays):
        """(output, residual)."""
        if self.implementation == "xla":
            return xla.forward(*arrays, self.pattern, self.scale)
        return pallas_tpu.forward(*arrays, self.pattern, self.scale, self.blocks, self.interpret)

    def backward(self, residual, g_BLNK):
        """(dq, dk, dv)."""
        if self.implementation == "xla":
            return xla.backward(residual, g_BLNK, self.pattern, self.scale)
        return pallas_tpu.backward(residual, g_BLNK, self.pattern, self.scale, self.blocks, self.interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BLNK, k_BSNK, v_BSNK, visible_QS, call: _Call):
    if call.implementation == "xla":
        return xla.attend(q_BLNK, k_BSNK, v_BSNK, visible_QS, call.pattern, call.scale)
    return call.forward(q_BLNK, k_BSNK, v_BSNK, visible_QS)[0]


def _attend_forward(q_BLNK, k_BSNK, v_BSNK, visible_QS, call: _Call):
    return call.forward(q_BLNK, k_BSNK, v_BSNK, visible_QS)


def _attend_backward(call: _Call, residual, g_BLNK):
    return *call.backward(residual, g_BLNK), None


_attend.defvjp(_attend_forward, _attend_backward)


def decode_attention(
    q_BLNK: Float[Array, "B L N K"],
    k_BSNK: Float[Array, "B S N K"],
    v_BSNK: Float[Array, "B S N K"],
    length: Int[Array, ""] | int,
    *,
    implementation: str | None = None,
    scale: float | None = None,
    blocks: tuning.Pair | None = None,
    interpret: Any = False,
) -> Float[Array, "B L N K"]:
    """Attention of the chunk being made to a cache [sink | ring buffer] of which a prefix is filled.

    Softmax does not care about the order of keys, so a ring buffer needs no more than the number of filled slots, as
    long as keys carry their rotation. Slots fill from the front, sink first; once the ring wraps all are filled. Blocks
    beyond ``length`` are not visited. For inference: not meant to be differentiated.

    Args:
      q_BLNK: queries of one chunk of L tokens.
      k_BSNK: keys of the S slots (tokens), those of this chunk already written.
      v_BSNK: values.
      length: slots that are filled, at most S; may be traced. 0 gives zeros.
      implementation: "pallas_tpu", "xla", "reference", or None for the best one on this platform.
      scale: softmax scale, 1/sqrt(K) by default.
      blocks: (query, key) tokens of a block of the Pallas kernel.
      interpret: emulates the Pallas kernel.

    Returns:
      [B, L, N, K] in the dtype of ``v``.

    Raises:
      UserError: an implementation that is unknown or cannot run here.
    """
    allowed = ("pallas_tpu", "xla", "reference")
    name = select.choose(implementation, q_BLNK, allowed=allowed, interpret=interpret, function="decode_attention")
    scale = 1.0 / math.sqrt(q_BLNK.shape[-1]) if scale is None else scale
    length = jnp.asarray(length, jnp.int32)
    if name == "pallas_tpu":
        blocks = blocks or tuning.default_blocks(q_BLNK.shape[1], k_BSNK.shape[1])
        return decode.pallas(q_BLNK, k_BSNK, v_BSNK, length, scale, blocks, interpret)
    return (decode.dense if name == "reference" else decode.xla)(q_BLNK, k_BSNK, v_BSNK, length, scale)
