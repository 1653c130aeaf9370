"""Chunk attention and its gradients in float64 numpy: an oracle that shares no code with the library."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

OUTPUTS = ("output", "dq", "dk", "dv")


def dense_attention(q_BLNK, k_BSNK, v_BSNK, mask_LS, scale: float, g_BLNK=None):
    """softmax(scale q k^T) v over the visible pairs, written out.

    Args:
      q_BLNK: queries.
      k_BSNK: keys.
      v_BSNK: values.
      mask_LS: bool, which pairs are visible; a query without any gets zeros.
      scale: softmax scale.
      g_BLNK: cotangent of the output, or None.

    Returns:
      The output [B, L, N, K], or with ``g`` (output, dq, dk, dv); float64.
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q_BLNK, k_BSNK, v_BSNK))
    z = np.where(mask_LS, scale * np.einsum("blnk,bsnk->bnls", q, k), -np.inf)
    peak = np.max(z, axis=-1, keepdims=True)
    p = np.exp(z - np.where(np.isfinite(peak), peak, 0.0))
    total = p.sum(-1, keepdims=True)
    p = p / np.where(total > 0, total, 1.0)
    out = np.einsum("bnls,bsnk->blnk", p, v)
    if g_BLNK is None:
        return out
    g = np.asarray(g_BLNK).astype(np.float64)
    dp = np.einsum("blnk,bsnk->bnls", g, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    dq, dk = np.einsum("bnls,bsnk->blnk", ds, k), np.einsum("bnls,blnk->bsnk", ds, q)
    return out, dq, dk, np.einsum("bnls,blnk->bsnk", p, g)


def relative_error(ours, exact) -> float:
    """Largest absolute difference over the largest value (over 1 if all are 0)."""
    ours, exact = np.asarray(ours).astype(np.float64), np.asarray(exact)
    return float(np.max(np.abs(ours - exact), initial=0.0) / (np.max(np.abs(exact), initial=0.0) or 1.0))


def errors(attend: Callable[..., Any], inputs: Sequence[Any], mask_LS) -> dict[str, float]:
    """Relative errors of the ``OUTPUTS`` of ``attend(q, k, v)``, whose scale is the usual one.

    Args:
      attend: makes the output [B, L, N, K].
      inputs: q, k, v and a cotangent of the output.
      mask_LS: as for ``dense_attention``.
    """
    q, k, v, g = inputs
    out, pull = jax.vjp(attend, q, k, v)
    exact = dense_attention(q, k, v, mask_LS, q.shape[-1] ** -0.5, g)
    return {name: relative_error(x, y) for name, x, y in zip(OUTPUTS, (out, *pull(g)), exact, strict=True)}
