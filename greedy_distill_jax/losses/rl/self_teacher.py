"""A student that learns from itself with a better memory: no reward."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from greedy_distill_jax.losses.rl.episode import Episode
from greedy_distill_jax.losses.rl.policy import frame_mean, where_counted


def self_teacher(
    net: Callable | None,
    batch: Mapping[str, Any] | None,
    key: PRNGKeyArray | None,
    *,
    episode: Episode,
    current: Callable,
    corrected: Callable,
) -> tuple[Float[Array, " B"], dict[str, Any]]:
    """mean (v - v_corrected)^2 at the states that the student came by, frames weighted; v = (x - x0) / sigma.

    The target is the same network, with real frames in the place of its own older ones: what it would do had it not
    drifted. It is zero where the history is real.

    Args:
      net, batch, key: unused.
      episode: with the recorded steps' inputs.
      current: ``x0 = current(x, sigma)`` of the student; gradients flow through it.
      corrected: the same with real older frames in the history; none flow.

    Returns:
      loss [B], and no metrics.

    References:
      OPSD-V, arXiv 2607.08766.
    """
    del net, batch, key
    judged_B = episode.judged_B
    episode = episode.only(judged_B)
    x0, target = (policy(episode.x_BTHWC, episode.sigma_T) for policy in (current, corrected))
    weight_T = episode.weight_T / jnp.square(episode.sigma_T)  # v - v_corrected = (x0_corrected - x0) / sigma
    return where_counted(frame_mean(jnp.square(x0 - jax.lax.stop_gradient(target)), weight_T), judged_B), {}
