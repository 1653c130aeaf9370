"""Flow ODE solvers for whole videos; the streaming form has its own loop in ``stream``."""

import jax
import jax.numpy as jnp


def euler(velocity, noise, sigmas: tuple[float, ...]):
    """Euler's method from noise to data.

    Args:
      velocity: ``v = velocity(x, sigma [B, 1])``.
      noise: x at sigmas[0], [B, ...].
      sigmas: decreasing levels without the closing 0.

    Returns:
      x at sigma 0, float32.
    """
    levels = jnp.asarray((*sigmas, 0.0), jnp.float32)

    def body(n, x):
        sigma = jnp.broadcast_to(levels[n], (x.shape[0], 1))
        return x + (levels[n + 1] - levels[n]) * velocity(x, sigma)

    return jax.lax.fori_loop(0, len(sigmas), body, noise.astype(jnp.float32))
