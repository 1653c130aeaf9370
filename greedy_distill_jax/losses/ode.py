"""Regression on the states of a teacher's ODE: how a student is started for few denoising steps."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.losses.motion import differences, frame_weights
from greedy_distill_jax.ranges import Count, NotNegative


def ode(
    net: Callable,
    batch: Mapping[str, Any] | None,
    key: PRNGKeyArray,
    *,
    samples: Mapping[str, Any],
    per_frame: bool = False,
    group: Count = 1,
    motion: NotNegative = 0.0,
) -> tuple[Float[Array, " B"], dict[str, Any]]:
    """mean over T, H, W, C of e^2, e = x - sigma v(x, sigma) - x0, x a stored state on the way from noise to x0.

    Every group of frames draws one of the stored noise levels on its own, as a student meets them when streaming. With
    ``motion`` the loss has a second part, motion mean h (D e)^2: D is the difference of neighbouring frames, h are the
    frame weights of the loss ``motion``, made of D e, without a gradient.

    Args:
      net: ``velocity = net(x, sigma, samples)``; gradients flow through it.
      batch: unused; the student's own videos in stage "dmd".
      key: PRNG key.
      samples: of the data: "latents" [B, T, H, W, C], the end x0 of a trajectory; "states" [B, K, T, H, W, C] before
        it, and "levels" [B, K], their noise levels.
      per_frame: one level per group of frames instead of one per video.
      group: frames that share a level when ``per_frame`` (the student's chunk).
      motion: weight of the second part; 0 leaves it out.

    Raises:
      ValueError: frames that do not divide into groups, a video of one frame with ``motion``.

    Returns:
      loss [B], and metrics: the error at the highest and the lowest level, as (sum, count), and the second part without
      its weight.

    References:
      Yin et al., From slow bidirectional to fast autoregressive video diffusion models, arXiv 2412.07772, section 4.3.
      Diagonal Distillation, arXiv 2603.09488: both parts, beside distribution matching.
    """
    del batch
    x0, states, levels = (samples[name].astype(jnp.float32) for name in ("latents", "states", "levels"))
    count, frames = x0.shape[:2]
    group = group if per_frame else frames
    if frames % group:
        raise ValueError(f"ode: {frames} frames do not divide into groups of {group}; use the student's chunk.")
    number = jax.random.randint(key, (count, frames // group), 0, states.shape[1])
    number = jnp.repeat(number, group, axis=1)  # [B, T]
    sigma = jnp.take_along_axis(levels, number, axis=1)
    x = jnp.take_along_axis(states, number[:, None, :, None, None, None], axis=1)[:, 0]
    v = net(x, sigma if per_frame else sigma[:, :1], samples)
    missed = flow.x0_from_velocity(x, v, sigma) - x0
    error = jnp.mean(jnp.square(missed), axis=(2, 3, 4))
    loss_B, metrics = jnp.mean(error, axis=1), {}
    for name, level in (("first_level", 0), ("last_level", states.shape[1] - 1)):
        here = (number == level).astype(jnp.float32)
        metrics[name] = (jnp.sum(error * here), jnp.sum(here))
    if motion:
        moved = differences(missed, "ode")
        weighted = frame_weights(moved) * jnp.mean(jnp.square(moved), axis=(2, 3, 4))
        loss_B, metrics["motion"] = loss_B + motion * jnp.mean(weighted, axis=1), jnp.mean(weighted)
    return loss_B, metrics
