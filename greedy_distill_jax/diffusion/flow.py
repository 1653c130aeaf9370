"""Rectified-flow conventions of Wan2.1: x_sigma = (1 - sigma) x0 + sigma noise, v = noise - x0.

All arithmetic is float32. ``sigma`` is [B] or [B, T] or [B, 1] and is broadcast over the trailing axes of x.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def expand(sigma: Float[Array, "..."], x: Float[Array, "..."]) -> Float32[Array, "..."]:
    """sigma with trailing unit axes so that it broadcasts against x."""
    return sigma.astype(jnp.float32).reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def add_noise(
    x0: Float[Array, "*shape"], noise: Float[Array, "*shape"], sigma: Float[Array, "..."]
) -> Float32[Array, "*shape"]:
    """x_sigma = (1 - sigma) x0 + sigma noise."""
    s = expand(sigma, x0)
    return (1.0 - s) * x0.astype(jnp.float32) + s * noise.astype(jnp.float32)


def velocity(x0: Float[Array, "*shape"], noise: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The flow-matching target v = noise - x0."""
    return noise.astype(jnp.float32) - x0.astype(jnp.float32)


def x0_from_velocity(
    x: Float[Array, "*shape"], v: Float[Array, "*shape"], sigma: Float[Array, "..."]
) -> Float32[Array, "*shape"]:
    """x0 = x - sigma v."""
    return x.astype(jnp.float32) - expand(sigma, x) * v.astype(jnp.float32)


def velocity_from_x0(
    x: Float[Array, "*shape"], x0: Float[Array, "*shape"], sigma: Float[Array, "..."]
) -> Float32[Array, "*shape"]:
    """v = (x - x0) / sigma; sigma must be positive."""
    return (x.astype(jnp.float32) - x0.astype(jnp.float32)) / expand(sigma, x)


def score_from_x0(
    x: Float[Array, "*shape"], x0: Float[Array, "*shape"], sigma: Float[Array, "..."]
) -> Float32[Array, "*shape"]:
    """score = -(x - (1 - sigma) x0) / sigma^2; sigma must be positive."""
    s = expand(sigma, x)
    return -(x.astype(jnp.float32) - (1.0 - s) * x0.astype(jnp.float32)) / jnp.square(s)
