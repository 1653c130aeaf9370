"""Distribution matching in which better videos weigh more."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from greedy_distill_jax.losses.dmd import NORMALIZERS, WEIGHTINGS, dmd
from greedy_distill_jax.losses.pair import Pair
from greedy_distill_jax.losses.rl.episode import Episode
from greedy_distill_jax.losses.rl.policy import mean_of
from greedy_distill_jax.ranges import Fraction, NotNegative, at_least, one_of

BASELINES = ("none", "batch")


def re_dmd(
    net: Callable | None,
    batch: Mapping[str, Any],
    key: PRNGKeyArray | None,
    *,
    episode: Episode,
    pair: Pair,
    beta: NotNegative = 2.0,
    low: Fraction = 0.1,
    high: Annotated[float, at_least(1)] = 10.0,
    baseline: Annotated[str, one_of(*BASELINES)] = "none",
    normalizer: Annotated[str, one_of(*NORMALIZERS)] = "real",
    weighting: Annotated[str, one_of(*WEIGHTINGS)] = "none",
) -> tuple[Float[Array, " B"], dict[str, Any]]:
    """w times the loss ``dmd``, w = clip(exp(beta (r - b)), low, high), r the episode's reward.

    A video whose reward is not known is neither favoured nor held back: its w is 1. So is every w at beta = 0, which
    makes this ``dmd``. The paper does not clip, and a reward two above the rest then weighs 55 times as much.

    Args:
      net, key: unused.
      batch: "action", as for ``dmd``.
      episode: with the reward of every video, on a scale of order 1 (the paper's is normalised by the statistics of
        its judge).
      pair: of the videos.
      beta: how much a reward counts; the paper's exp(r / beta) with 1/2.
      low, high: range of w, around 1.
      baseline: b, "none" (0, as published) or "batch", the mean reward of the videos that are computed together.
      normalizer, weighting: of ``dmd``.

    Raises:
      ValueError: another baseline, and as ``dmd``.

    Returns:
      loss [B], and metrics: those of ``dmd``, the mean weight, and the share of weights that were clipped.

    References:
      Reward Forcing, arXiv 2512.04678.
    """
    if baseline not in BASELINES:
        raise ValueError(f"re_dmd: baseline is {baseline!r}; choose from {BASELINES}.")
    judged_B = episode.judged_B
    reward_B = episode.only(judged_B).reward_B
    if baseline == "batch":
        reward_B = reward_B - jnp.sum(reward_B) / jnp.maximum(jnp.sum(judged_B), 1.0)
    free_B = jnp.exp(beta * reward_B)
    weight_B = jnp.where(judged_B > 0, jnp.clip(free_B, low, high), 1.0)
    loss_B, metrics = dmd(net, batch, key, pair=pair, normalizer=normalizer, weighting=weighting)
    clipped_B = ((free_B < low) | (free_B > high)).astype(jnp.float32)
    return weight_B * loss_B, {
        **metrics,
        "weight": mean_of(weight_B, judged_B),
        "clipped": mean_of(clipped_B, judged_B),
    }
