"""Flow ODE solvers for whole videos; the streaming form has its own loop in ``stream``."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from greedy_distill_jax.diffusion import noise_levels

SOLVERS = ("euler", "unipc", "unipc_wan")
_ONE = 1e-6  # distance to sigma 1, where the signal-to-noise ratio has no logarithm, that UniPC keeps


def solve(
    name: str, velocity: Callable, noise: Float[Array, " B *shape"], *, steps: int, shift: float
) -> Float32[Array, " B *shape"]:
    """Noise to data with a named solver at its own noise levels; ``steps`` network evaluations.

    Args:
      name: "euler"; "unipc", second order, at the levels of Wan's pipeline in diffusers (``diffusers_steps``); or
        "unipc_wan", the same at those of Wan's own program (``wan_steps``).
      velocity: ``v = velocity(x, sigma [B, 1])``, guidance included.
      noise: standard normal, [B, ...].
      steps: network evaluations (twice that with guidance).
      shift: of the noise levels, see ``schedules``.

    Returns:
      x at sigma 0, float32.
    """
    if name == "euler":
        return euler(velocity, noise, noise_levels.uniform_steps(steps, shift))
    if name == "unipc":
        return unipc(velocity, noise, noise_levels.diffusers_steps(steps, shift))
    if name == "unipc_wan":
        return unipc(velocity, noise, noise_levels.wan_steps(steps, shift))
    raise ValueError(f"solver {name!r} is unknown; choose from {', '.join(SOLVERS)}.")


def euler(
    velocity: Callable, noise: Float[Array, " B *shape"], sigmas: tuple[float, ...]
) -> Float32[Array, " B *shape"]:
    """Euler's method from noise to data.

    Args:
      velocity: ``v = velocity(x, sigma [B, 1])``.
      noise: x at sigmas[0], [B, ...].
      sigmas: decreasing levels without the closing 0.

    Returns:
      x at sigma 0, float32.
    """
    return euler_states(velocity, noise, sigmas, ())[0]


def euler_states(
    velocity: Callable, noise: Float[Array, " B *shape"], sigmas: tuple[float, ...], kept: tuple[float, ...]
) -> tuple[Float32[Array, " B *shape"], Float32[Array, "K B *shape"]]:
    """Euler's method, with the states at some of its levels (for ODE regression, docs/method.md, section 8.1).

    Args:
      velocity, noise, sigmas: as for ``euler``.
      kept: levels whose state is wanted, each one of ``sigmas``, decreasing.

    Returns:
      (x at sigma 0, states [K, B, ...] at ``kept``), float32.
    """
    if not set(kept) <= set(sigmas):
        raise ValueError(f"euler_states: kept levels {sorted(set(kept) - set(sigmas))} are not among the solver's.")
    levels = jnp.asarray((*sigmas, 0.0), jnp.float32)
    slots = np.searchsorted(-np.asarray(kept), -np.asarray(sigmas))  # the next kept level, this one included
    slots = jnp.asarray(np.minimum(slots, max(len(kept) - 1, 0)))
    is_kept = jnp.asarray([sigma in kept for sigma in sigmas])

    def body(n, carry):
        x, states = carry
        if kept:
            states = states.at[slots[n]].set(jnp.where(is_kept[n], x, states[slots[n]]))
        sigma = jnp.broadcast_to(levels[n], (x.shape[0], 1))
        return x + (levels[n + 1] - levels[n]) * velocity(x, sigma), states

    x = noise.astype(jnp.float32)
    return jax.lax.fori_loop(0, len(sigmas), body, (x, jnp.zeros((len(kept), *x.shape), jnp.float32)))


def unipc(
    velocity: Callable, noise: Float[Array, " B *shape"], sigmas: tuple[float, ...]
) -> Float32[Array, " B *shape"]:
    """UniPC of order 2 (arXiv 2302.04867; B(h) = e^h - 1, data prediction, first order at both ends), for flows.

    With m_n the network's x0 at its input x_n, every step is linear in what is known (lambda = log((1 - s) / s)):
      corrector  y_n = p . (x_n, y_{n-1}, m_n, m_{n-1}, m_{n-2})
      predictor  x_{n+1} = q . (y_n, m_n, m_{n-1})
    and the coefficients depend on the levels alone. The same numbers as diffusers' ``UniPCMultistepScheduler`` with
    ``use_flow_sigmas``, which Wan's pipeline uses and Wan's own program has a copy of, two habits included: sigma 1 is
    1 - 1e-6, and the network is told the level in whole thousandths, rounded down.

    Args:
      velocity: ``v = velocity(x, sigma [B, 1])``.
      noise: x at sigmas[0], [B, ...].
      sigmas: decreasing levels without the closing 0.

    Returns:
      x at sigma 0, float32.
    """
    levels, told, correct, predict = (jnp.asarray(table, jnp.float32) for table in _unipc_tables(tuple(sigmas)))

    def body(n, carry):
        x, last, m1, m2 = carry
        m0 = x - levels[n] * velocity(x, jnp.broadcast_to(told[n], (x.shape[0], 1)))
        c, p = correct[n], predict[n]
        corrected = c[0] * x + c[1] * last + c[2] * m0 + c[3] * m1 + c[4] * m2
        return p[0] * corrected + p[1] * m0 + p[2] * m1, corrected, m0, m1

    x, zero = noise.astype(jnp.float32), jnp.zeros(noise.shape, jnp.float32)
    return jax.lax.fori_loop(0, len(sigmas), body, (x, zero, zero, zero))[0]


@functools.lru_cache(maxsize=32)
def _unipc_tables(sigmas: tuple[float, ...]) -> tuple[np.ndarray, ...]:
    """(levels [n], levels the network is told [n], corrector [n, 5], predictor [n, 3]), computed in float64.

    Levels are rounded to float32 first: they are what the float32 samples are combined with, and near 1 the logarithm
    of 1 - sigma would feel the difference.
    """
    exact = np.minimum(np.asarray(sigmas, np.float64), 1 - _ONE)
    told = np.floor(exact * noise_levels.TABLE_SIZE) / noise_levels.TABLE_SIZE
    s = exact.astype(np.float32).astype(np.float64)
    lam, count = np.log1p(-s) - np.log(s), len(s)
    correct, predict = np.zeros((count, 5)), np.zeros((count, 3))
    correct[0, 0] = 1.0  # nothing to correct yet
    predict[-1] = 0.0, 1.0, 0.0  # at sigma 0 the data prediction itself
    for n in range(count - 1):  # the step from level n to n + 1, and its correction once the network was asked there
        h = lam[n + 1] - lam[n]
        phi = np.expm1(-h)
        ratio, gain = s[n + 1] / s[n], -(1 - s[n + 1]) * phi
        b1 = -phi / h - 1
        predict[n] = ratio, gain, 0.0
        correct[n + 1] = 0.0, ratio, 0.5 * gain, 0.5 * gain, 0.0
        if n:
            r = (lam[n - 1] - lam[n]) / h
            predict[n] = ratio, gain * (1 - 0.5 / r), gain * 0.5 / r
            b = np.asarray([b1, 2 * (-b1 / h - 0.5)]) / phi
            older, newest = np.linalg.solve([[1.0, 1.0], [r, 1.0]], b)
            correct[n + 1] = 0.0, ratio, gain * newest, gain * (1 - older / r - newest), gain * older / r
    return s, told, correct, predict
