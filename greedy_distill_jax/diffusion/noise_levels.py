"""Noise levels: the shifted 1000-entry table of Wan, its step lists, and random draws (docs/method.md, section 1.3)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Float32, Float64, PRNGKeyArray

TABLE_SIZE = 1000
DISTRIBUTIONS = ("uniform", "logit_normal")


def shift_sigma(sigma: Float[ArrayLike, "*shape"], shift: float) -> Float[ArrayLike, "*shape"]:
    """sigma' = shift sigma / (1 + (shift - 1) sigma): more weight on high noise for shift > 1."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def sigma_table(shift: float) -> Float64[np.ndarray, "1000"]:
    """The 1000 shifted levels from 1 down to shift(.001); there is no zero entry (float64)."""
    return shift_sigma((TABLE_SIZE - np.arange(TABLE_SIZE)) / TABLE_SIZE, shift)


def warp_steps(raw: tuple[float | int, ...], shift: float) -> tuple[float, ...]:
    """Raw step list such as (1000, 750, 500, 250) -> noise levels; shift 5 gives (1, .9375, .8333, .625)."""
    return tuple(_shifted(r / TABLE_SIZE, shift) for r in raw)


def uniform_steps(steps: int, shift: float) -> tuple[float, ...]:
    """``steps`` shifted levels from 1, equally spaced before the shift; the closing 0 is left to the solver."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    return tuple(_shifted(1.0 - i / steps, shift) for i in range(steps))


def _shifted(sigma: float, shift: float) -> float:
    return 1.0 if sigma == 1 else float(shift_sigma(sigma, shift))  # which rounds 1 up for some shifts below 1


def wan_steps(steps: int, shift: float) -> tuple[float, ...]:
    """``steps`` shifted levels as Wan's own program has them: equally spaced from .999 towards 0 before the shift."""
    return _spaced(1.0 - 1.0 / TABLE_SIZE, 0.0, steps, shift)


def diffusers_steps(steps: int, shift: float) -> tuple[float, ...]:
    """``steps`` shifted levels as diffusers' UniPC has them for Wan: equally spaced from 1 towards .001 before it."""
    return _spaced(1.0, 1.0 / TABLE_SIZE, steps, shift)


def _spaced(first: float, end: float, steps: int, shift: float) -> tuple[float, ...]:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    raw = np.linspace(first, end, steps + 1)[:-1]
    return tuple(float(sigma) for sigma in shift_sigma(raw, shift))


def draw_sigma(
    key: PRNGKeyArray, shape: tuple[int, ...], *, distribution: str = "uniform", shift: float = 5.0
) -> Float32[Array, "*shape"]:
    """Random noise levels in (0, 1], float32.

    Args:
      key: PRNG key.
      shape: shape of the draw.
      distribution: "uniform" draws from the shifted 1000-entry table; "logit_normal" a shifted logit-normal(0, 1).
      shift: of the table.
    """
    if distribution == "uniform":
        index = jax.random.randint(key, shape, 0, TABLE_SIZE)
        return jnp.asarray(sigma_table(shift), jnp.float32)[index]
    if distribution == "logit_normal":
        return shift_sigma(jax.nn.sigmoid(jax.random.normal(key, shape, jnp.float32)), shift)
    raise ValueError(f"sigma distribution {distribution!r} is unknown; choose from {', '.join(DISTRIBUTIONS)}.")


def bell_weight(sigma: Float[Array, "*shape"], shift: float) -> Float[Array, "*shape"]:
    """Wan's training weight exp(-2 (sigma - .5)^2) minus its minimum, mean 1 over the table."""
    table = sigma_table(shift)
    bell = np.exp(-2.0 * (table - 0.5) ** 2)
    low, mean = bell.min(), (bell - bell.min()).mean()
    return (jnp.exp(-2.0 * jnp.square(sigma - 0.5)) - np.float32(low)) / np.float32(mean)
