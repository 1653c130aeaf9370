"""Wan's 3-D rotary embedding (docs/method.md, section 2.4), exact at any frame index.

The head dim is split into interleaved pairs: time gets what height and width (a third of the pairs each) leave.
Angles are formed in float64 where positions are known at trace time. A traced frame index is split as
``1024 * high + low`` and looked up in two float64-made tables whose rotations multiply, so a stream that runs for
hours (up to 2**20 chunks) keeps full precision; ``index * frequency`` in float32 would lose it after minutes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from greedy_distill_jax.distribution import parallel

THETA = 10_000.0
_LEVEL = 1024


class Rope(NamedTuple):
    """cos and sin of the rotation of every token: [S, K/2] float32."""

    cos: Float32[Array, "S pairs"]
    sin: Float32[Array, "S pairs"]


def split_pairs(head_dim: int) -> tuple[int, int, int]:
    """Pairs for (time, height, width); 128 -> (22, 21, 21)."""
    pairs = head_dim // 2
    if head_dim % 2 or pairs < 3:
        raise ValueError(f"head dim {head_dim} must be even and at least 6 for 3-D RoPE.")
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def _angles(position: np.ndarray, pairs: int) -> np.ndarray:
    frequency = THETA ** (-np.arange(pairs, dtype=np.float64) / pairs)
    return np.asarray(position, np.float64)[..., None] * frequency


@functools.lru_cache(maxsize=16)
def _spatial(grid: tuple[int, int], head_dim: int) -> np.ndarray:
    """float64 angles [h*w, pairs_h + pairs_w]."""
    _, pairs_h, pairs_w = split_pairs(head_dim)
    row, col = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    return np.concatenate([_angles(row.ravel(), pairs_h), _angles(col.ravel(), pairs_w)], axis=-1)


@functools.lru_cache(maxsize=16)
def _time_levels(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit complex rotations for low (0..1023) and high (0, 1024, 2048, ...) parts of a frame index."""
    low = np.exp(1j * _angles(np.arange(_LEVEL), pairs))
    high = np.exp(1j * _angles(np.arange(_LEVEL) * _LEVEL, pairs))
    return tuple(np.stack([x.real, x.imag]).astype(np.float32) for x in (low, high))


def _time_rotation(frame_T, pairs: int) -> tuple[jax.Array, jax.Array]:
    """cos, sin of the time angles, [T, pairs]."""
    if not isinstance(frame_T, jax.core.Tracer):
        angle = _angles(np.asarray(frame_T), pairs)
        return jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)
    low, high = (jnp.asarray(x) for x in _time_levels(pairs))
    (cos_l, sin_l), (cos_h, sin_h) = low[:, frame_T % _LEVEL], high[:, frame_T // _LEVEL]
    return cos_l * cos_h - sin_l * sin_h, sin_l * cos_h + cos_l * sin_h


def rope_table(frame_T: Int[Array | np.ndarray, " T"], grid: tuple[int, int], head_dim: int) -> Rope:
    """Rotation of every token of the given frames, frame-major, then rows, then columns.

    Args:
      frame_T: integer frame positions >= 0 [T]; numpy (exact float64 angles) or traced.
      grid: rows and columns of the patch grid.
      head_dim: K.
    """
    pairs_t, _, _ = split_pairs(head_dim)
    cos_t, sin_t = _time_rotation(frame_T, pairs_t)
    frames, tokens = cos_t.shape[0], grid[0] * grid[1]
    whole = grid[0], parallel.whole_columns(grid[1])
    spatial = _spatial(whole, head_dim)

    def join(time, space):
        time = jnp.broadcast_to(time[:, None], (frames, tokens, pairs_t))
        space = parallel.stripe(jnp.asarray(space, jnp.float32).reshape(*whole, -1), 1).reshape(1, tokens, -1)
        space = jnp.broadcast_to(space, (frames, *space.shape[1:]))
        return jnp.concatenate([time, space], axis=-1).reshape(frames * tokens, head_dim // 2)

    return Rope(join(cos_t, np.cos(spatial)), join(sin_t, np.sin(spatial)))


def apply_rope(x_BSNK: Float[Array, "*B S N K"], rope: Rope) -> Float[Array, "*B S N K"]:
    """Rotates interleaved pairs (2j, 2j+1) in float32 and casts back; any leading axes."""
    leading = range(x_BSNK.ndim - 3)
    cos, sin = (jnp.expand_dims(table, (*leading, -2)) for table in rope)
    pairs = x_BSNK.astype(jnp.float32).reshape(*x_BSNK.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    out = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return out.reshape(x_BSNK.shape).astype(x_BSNK.dtype)
