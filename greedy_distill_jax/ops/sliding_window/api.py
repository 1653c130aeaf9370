"""The one attention function of the project (DESIGN.md, "One attention op")."""

import math
from collections.abc import Callable

from jaxtyping import Array, Bool, Float

from greedy_distill_jax.ops.sliding_window import reference, xla
from greedy_distill_jax.ops.sliding_window.schedule import Schedule

_IMPLEMENTATIONS: dict[str, Callable] = {"xla": xla.attend, "reference": reference.attend}


def chunk_attention(
    q_BLNK: Float[Array, "B L N K"],
    k_BSNK: Float[Array, "B S N K"],
    v_BSNK: Float[Array, "B S N K"],
    schedule: Schedule,
    *,
    visible_QS: Bool[Array, "Q C"] | None = None,
    implementation: str | None = None,
    scale: float | None = None,
) -> Float[Array, "B L N K"]:
    """Attention of query chunks over the key chunks that ``schedule`` lists for them.

    Args:
      q_BLNK: queries, L = query chunks x ``schedule.q_chunk``, head dim K.
      k_BSNK: keys, S = ``schedule.num_k_chunks`` x ``schedule.k_chunk``.
      v_BSNK: values.
      schedule: the static chunk table.
      visible_QS: optional traced [query chunks, key chunks] mask on top of the table: which cache slots are
        filled is known only while streaming.
      implementation: "xla", "reference" (dense), or None for the best one on this platform.
      scale: softmax scale, 1/sqrt(K) by default.

    Returns:
      [B, L, N, K] in the dtype of ``v``; the softmax is in float32. A query that sees no key gets zeros.

    Raises:
      ValueError: shapes that do not fit the schedule, or an unknown implementation.
    """
    expected_q = schedule.num_q_chunks * schedule.q_chunk
    expected_k = schedule.num_k_chunks * schedule.k_chunk
    if q_BLNK.shape[1] != expected_q or k_BSNK.shape[1] != expected_k:
        raise ValueError(
            f"chunk_attention: q has {q_BLNK.shape[1]} tokens and k {k_BSNK.shape[1]}, but the schedule has "
            f"{schedule.num_q_chunks} query chunks of {schedule.q_chunk} and {schedule.num_k_chunks} key chunks of "
            f"{schedule.k_chunk} (so {expected_q} and {expected_k}). Build the schedule from the tokens of one chunk."
        )
    name = implementation or "xla"
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"chunk_attention: unknown implementation {name!r}; choose from {sorted(_IMPLEMENTATIONS)}.")
    scale = 1.0 / math.sqrt(q_BLNK.shape[-1]) if scale is None else scale
    return _IMPLEMENTATIONS[name](q_BLNK, k_BSNK, v_BSNK, schedule, visible_QS, scale=scale)
