"""What holds a student near the one it started from."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from greedy_distill_jax.losses.rl.episode import Episode
from greedy_distill_jax.losses.rl.policy import frame_mean, recorded_steps, where_counted


def kl(
    net: Callable | None,
    batch: Mapping[str, Any] | None,
    key: PRNGKeyArray | None,
    *,
    episode: Episode,
    current: Callable,
    reference: Callable,
) -> tuple[Float[Array, " B"], dict[str, Any]]:
    """KL from the student's step to the reference's, alpha^2 / (2 s^2) mean (x0 - x0_reference)^2, frames weighted.

    Both steps are Gaussian policies of one variance, N(alpha x0, s^2), alpha = 1 - next_sigma, s = next_sigma, so this
    is exact, as a mean over elements. A last step (s = 0) draws nothing and has no KL; 1 stands in for its s: half the
    squared distance of what both make of the chunk.

    Beside any of the losses it is the one pull to the reference. It counts every video that was judged, those of groups
    judged all alike too.

    Args:
      net, batch, key: unused.
      episode: with the recorded steps.
      current: ``x0 = current(x, sigma)`` of the student; gradients flow through it.
      reference: the same of the student that the stage started from; none flow.

    Returns:
      loss [B], and no metrics.

    References:
      RAVEN, arXiv 2605.15190; for steps without noise as in Astrolabe, arXiv 2603.17051.
    """
    del net, batch, key
    judged_B = episode.judged_B
    episode = episode.only(judged_B)
    alpha_T, s_T, _ = recorded_steps(episode)
    x0, kept = (policy(episode.x_BTHWC, episode.sigma_T) for policy in (current, reference))
    weight_T = episode.weight_T * 0.5 * jnp.square(alpha_T / s_T)
    return where_counted(frame_mean(jnp.square(x0 - jax.lax.stop_gradient(kept)), weight_T), judged_B), {}
