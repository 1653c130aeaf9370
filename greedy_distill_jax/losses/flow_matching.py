"""Flow matching, for the teacher and (teacher-forced) for the student (docs/method.md, sections 2.7 and 6)."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from greedy_distill_jax.diffusion import flow, noise_levels
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ranges import Count, Fraction, NoiseLevel, Positive, one_of

WEIGHTINGS = ("none", "bell", "x0")


def flow_matching(
    net: Callable,
    batch: Mapping[str, Any],
    key: PRNGKeyArray,
    *,
    shift: Positive = 5.0,
    distribution: Annotated[str, one_of(*noise_levels.DISTRIBUTIONS)] = "uniform",
    per_frame: bool = False,
    group: Count = 1,
    draws: Count = 1,
    low: Fraction = 0.0,
    high: NoiseLevel = 1.0,
    weighting: Annotated[str, one_of(*WEIGHTINGS)] = "none",
) -> tuple[Float[Array, " B"], dict[str, tuple[Float[Array, ""], Float[Array, ""]]]]:
    """mean over T, H, W, C of w(sigma) (v(x_sigma, sigma) - (noise - x0))^2.

    Args:
      net: ``velocity = net(x, sigma, batch)``; gradients flow through it.
      batch: "latents" [B, T, H, W, C] is x0.
      key: PRNG key.
      shift, distribution: how noise levels are drawn, see ``noise_levels.draw_sigma``. In a configuration the shift is
        ``config.shift``, unless the options say another.
      per_frame: one noise level per group of frames instead of one per video.
      group: frames that share a level when ``per_frame`` (the student's chunk).
      draws: noise draws per example, laid out along the frames: ``net`` gets [B, draws * T, ...].
      low, high: noise levels are clipped to this range.
      weighting: "none"; "bell", Wan's training weight; "x0", sigma^2, which makes it the squared error of x0 and suits
        a network that predicts x0: unweighted, its rare low-noise draws (1 / sigma^2) would dominate the gradient.

    Raises:
      ValueError: frames that do not divide into groups, a weighting that there is not.
      UserError: low above high.

    Returns:
      loss [B], and metrics: the error in the lower and upper half of the noise levels, as (sum, count).

    References:
      Lipman et al., Flow Matching for Generative Modeling, 2022, arXiv 2210.02747.
      Wan: Open and Advanced Large-Scale Video Generative Models, 2025, arXiv 2503.20314 (weighting "bell").
    """
    x0 = jnp.tile(batch["latents"].astype(jnp.float32), (1, draws, 1, 1, 1))
    count, frames = x0.shape[:2]
    if per_frame and batch["latents"].shape[1] % group:
        raise ValueError(
            f"flow_matching: {batch['latents'].shape[1]} frames do not divide into groups of {group}; "
            f"use the student's chunk, or another frame count."
        )
    if low > high:
        raise UserError(f"flow_matching: low is {low}, above high = {high}; exchange them.", "options")
    key_sigma, key_noise = jax.random.split(key)
    shape = (count, frames // group if per_frame else 1)
    sigma = noise_levels.draw_sigma(key_sigma, shape, distribution=distribution, shift=shift)
    sigma = jnp.clip(sigma, low, high)
    sigma = jnp.broadcast_to(jnp.repeat(sigma, group if per_frame else 1, axis=1), (count, frames))
    noise = jax.random.normal(key_noise, x0.shape, jnp.float32)
    v = net(flow.add_noise(x0, noise, sigma), sigma if per_frame else sigma[:, :1], batch)
    error = jnp.mean(jnp.square(v - flow.velocity(x0, noise)), axis=(2, 3, 4))
    if weighting == "bell":
        weight = noise_levels.bell_weight(sigma, shift)
    elif weighting == "x0":
        weight = jnp.square(sigma)
    elif weighting == "none":
        weight = jnp.ones_like(sigma)
    else:
        raise ValueError(f"flow_matching: weighting is {weighting!r}; choose from {', '.join(WEIGHTINGS)}.")
    middle = float(noise_levels.shift_sigma(0.5, shift))
    is_low = (sigma < middle).astype(jnp.float32)
    metrics = {
        "low_noise": (jnp.sum(error * is_low), jnp.sum(is_low)),
        "high_noise": (jnp.sum(error * (1.0 - is_low)), jnp.sum(1.0 - is_low)),
    }
    return jnp.mean(weight * error, axis=1), metrics
