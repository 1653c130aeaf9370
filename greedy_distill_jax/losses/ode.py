"""Regression on the states of a teacher's ODE: how a student is started for few denoising steps."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.ranges import Count


def ode(
    net: Callable, batch: Mapping[str, Any], key: PRNGKeyArray, *, per_frame: bool = False, group: Count = 1
) -> tuple[Float[Array, " B"], dict[str, tuple[Float[Array, ""], Float[Array, ""]]]]:
    """mean over T, H, W, C of (x - sigma v(x, sigma) - x0)^2, x a stored state on the way from noise to x0.

    Every group of frames draws one of the stored noise levels on its own, as a student meets them when streaming.

    Args:
      net: ``velocity = net(x, sigma, batch)``; gradients flow through it.
      batch: "latents" [B, T, H, W, C], the end x0 of a trajectory; "states" [B, K, T, H, W, C] before it, and "levels"
        [B, K], their noise levels.
      key: PRNG key.
      per_frame: one level per group of frames instead of one per video.
      group: frames that share a level when ``per_frame`` (the student's chunk).

    Returns:
      loss [B], and metrics: the error at the highest and the lowest level, as (sum, count).

    References:
      Yin et al., From slow bidirectional to fast autoregressive video diffusion models, arXiv 2412.07772, section 4.3.
    """
    x0, states, levels = (batch[name].astype(jnp.float32) for name in ("latents", "states", "levels"))
    count, frames = x0.shape[:2]
    group = group if per_frame else frames
    if frames % group:
        raise ValueError(f"ode: {frames} frames do not divide into groups of {group}; use the student's chunk.")
    number = jax.random.randint(key, (count, frames // group), 0, states.shape[1])
    number = jnp.repeat(number, group, axis=1)  # [B, T]
    sigma = jnp.take_along_axis(levels, number, axis=1)
    x = jnp.take_along_axis(states, number[:, None, :, None, None, None], axis=1)[:, 0]
    v = net(x, sigma if per_frame else sigma[:, :1], batch)
    error = jnp.mean(jnp.square(flow.x0_from_velocity(x, v, sigma) - x0), axis=(2, 3, 4))
    metrics = {}
    for name, level in (("first_level", 0), ("last_level", states.shape[1] - 1)):
        here = (number == level).astype(jnp.float32)
        metrics[name] = (jnp.sum(error * here), jnp.sum(here))
    return jnp.mean(error, axis=1), metrics
