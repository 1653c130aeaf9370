"""Which motion is which: what the feature of the loss ``motion_head`` is trained by (docs/method.md, section 9.4)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

CELLS = 4  # a side of the grid that a frame's feature is averaged on: coarse, so that frames of any size compare alike


def contrast(
    feature: Float[Array, "B F H W C"], target: Float[Array, "B F H W C"], *, temperature: float | int = 0.1
) -> tuple[Float[Array, " B"], dict[str, Float[Array, ""]]]:
    """InfoNCE over all N = B F motions of a batch: mean_F -log softmax_j(q_i k_j / temperature) at j = i.

    q_i and k_i are unit vectors: the feature and the target of motion i, averaged on a grid of ``CELLS`` x ``CELLS``.
    Every motion is to be told from the N - 1 others, of its own video and of the other ones. A feature that is constant
    cannot: its loss is log N, that of guessing.

    Args:
      feature: of motions, through which the gradient flows.
      target: of the same motions seen otherwise; no gradient flows through it.
      temperature: the smaller it is, the more the most similar of the others count.

    Returns:
      loss [B], and metrics: the share of motions that are nearest to themselves.

    References:
      van den Oord et al., Representation learning with contrastive predictive coding, arXiv 1807.03748.
      He et al., Momentum contrast, arXiv 1911.05722: the averaged network as the target.
    """
    count, frames = feature.shape[:2]
    q, k = _unit(feature), jax.lax.stop_gradient(_unit(target))
    logits = q @ k.T / temperature
    own = jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
    right = jnp.argmax(jax.lax.stop_gradient(logits), axis=1) == jnp.arange(count * frames)
    return -jnp.mean(own.reshape(count, frames), axis=1), {"accuracy": jnp.mean(right.astype(jnp.float32))}


def _unit(y):
    """Unit vectors [B F, cells C] of frames [B, F, H, W, C]."""
    rows, columns = (jnp.asarray(_cells(size)) for size in y.shape[2:4])
    vectors = jnp.einsum("bfhwc,ih,jw->bfijc", y, rows, columns).reshape(y.shape[0] * y.shape[1], -1)
    return vectors * jax.lax.rsqrt(jnp.sum(jnp.square(vectors), axis=1, keepdims=True) + 1e-12)


def _cells(size: int):
    """The matrix [cells, size] that averages neighbours, where a size need not divide into cells."""
    parts = np.array_split(np.arange(size), min(size, CELLS))
    return np.stack([np.isin(np.arange(size), part) / np.float32(len(part)) for part in parts]).astype(np.float32)
