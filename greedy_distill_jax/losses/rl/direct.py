"""The gradient of a differentiable reward, through one denoising step."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Float, PRNGKeyArray

from greedy_distill_jax.losses.rl.episode import Episode
from greedy_distill_jax.losses.rl.policy import mean_of, where_counted


def direct(
    net: Callable | None,
    batch: Mapping[str, Any] | None,
    key: PRNGKeyArray | None,
    *,
    episode: Episode,
    current: Callable,
    rewarded: Callable,
) -> tuple[Float[Array, " B"], dict[str, Any]]:
    """-r(x0(x, sigma)): minus the reward of what the student makes of the recorded steps' inputs.

    The fastest way up a reward, and into its gaps: keep ``dmd`` beside it. Frames count as the reward counts them.

    Args:
      net, batch, key: unused.
      episode: with the recorded steps.
      current: ``x0 = current(x, sigma)`` of the student; gradients flow through it.
      rewarded: ``r_B = rewarded(x0)``, through which they flow, too.

    Returns:
      loss [B], and metrics: the mean reward.

    References:
      Xu et al., ImageReward (ReFL), arXiv 2304.05977. Clark et al., DRaFT, arXiv 2309.17400: DRaFT-1.
    """
    del net, batch, key
    judged_B = episode.judged_B
    episode = episode.only(judged_B)
    reward_B = rewarded(current(episode.x_BTHWC, episode.sigma_T))
    return where_counted(-reward_B, judged_B), {"reward": mean_of(reward_B, judged_B)}
