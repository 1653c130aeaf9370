"""Advantages: what a reward says of a stream beside the others of its group. The one place that makes them."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

MODES = ("std", "global_std", "mean_only", "quasi_norm")
COMBINATIONS = ("normalise_then_sum", "sum_then_normalise", "advantage_sum")
ALIKE = 1e-4  # standard deviation of a group's rewards below which they say nothing
POWER = 0.8  # of the quasi-norm


class Combined(NamedTuple):
    """What several rewards say together; the fields are those of ``Episode``.

    reward: the weighted sum, 0 where it is not known. metrics: for the logs, each a pair (sum, count).
    """

    reward_B: Float32[Array, " B"]
    advantage_B: Float32[Array, " B"]
    counts_B: Float32[Array, " B"]
    judged_B: Float32[Array, " B"]
    metrics: dict[str, Any]


def group_advantages(
    reward_B: Float[Array, " B"], group: int, mode: str = "std", clip: float = 5.0
) -> tuple[Float32[Array, " B"], Float32[Array, " B"]]:
    """(advantage, counts), each [B]: rewards less the mean of their group, made comparable between groups.

    A stream without a reward (NaN) is left out of its group's mean and deviation. A group with fewer than two rewards,
    or whose standard deviation is below 1e-4, is dead: nothing in it counts. Both have the advantage 0.

    Args:
      reward_B: of the streams, those of a group side by side.
      group: streams per group.
      mode: what the difference d to the group's mean is divided by. "std": the group's standard deviation.
        "global_std": that of all rewards. "mean_only": nothing. "quasi_norm": (sum |d|^p)^(1/p) / sqrt(n), p = .8, over
        the group's n rewards, which with p = 2 is "std".
      clip: largest magnitude of an advantage.

    Raises:
      ValueError: another mode, streams that do not divide into groups.

    References:
      "std": Shao et al., DeepSeekMath (GRPO), arXiv 2402.03300. "global_std", the clip: Flow-GRPO, arXiv 2505.05470.
      "mean_only": Liu et al., Understanding R1-Zero-like training, arXiv 2503.20783. "quasi_norm": Neighbor GRPO, arXiv
      2511.16955. Published code adds 1e-4 to a deviation; here groups below that are dead instead.
    """
    if mode not in MODES:
        raise ValueError(f"group_advantages: mode is {mode!r}; choose from {MODES}.")
    reward_PG = _in_groups(reward_B, group)
    known_PG = jnp.isfinite(reward_PG)
    d_PG, std_P, alive_P = _within(reward_PG, known_PG)
    if mode == "std":
        size = std_P[:, None]
    elif mode == "global_std":
        size = _within(reward_PG.reshape(1, -1), known_PG.reshape(1, -1))[1][:, None]
    elif mode == "quasi_norm":
        count_P = jnp.sum(known_PG, axis=1).astype(jnp.float32)
        norm_P = jnp.sum(jnp.abs(d_PG) ** POWER, axis=1) ** (1.0 / POWER)
        size = (norm_P / jnp.sqrt(jnp.maximum(count_P, 1.0)))[:, None]
    else:
        size = jnp.ones((1, 1), jnp.float32)
    counts_PG = known_PG & alive_P[:, None]
    advantage_PG = jnp.clip(d_PG / jnp.where(size > 0, size, 1.0), -clip, clip)
    return jnp.where(counts_PG, advantage_PG, 0.0).reshape(-1), counts_PG.astype(jnp.float32).reshape(-1)


def combine(
    rewards: Mapping[str, Float[Array, " B"]],
    weights: Mapping[str, float],
    group: int,
    how: str = "normalise_then_sum",
    mode: str = "std",
    clip: float = 5.0,
) -> Combined:
    """One reward and one advantage out of several rewards of the same streams.

    A stream that one of the weighted rewards does not judge (NaN) is judged by none.

    Args:
      rewards: by name, of the streams, those of a group side by side. Those without a weight are judges: only logged.
      weights: by name; at least one.
      group: streams per group.
      how: what becomes an advantage. "normalise_then_sum": the weighted sum of the rewards divided by their deviation
        within the group, which makes their scales alike. "sum_then_normalise": the weighted sum of the rewards
        themselves. "advantage_sum": the weighted sum of the rewards' own advantages, not normalised again.
      mode, clip: of ``group_advantages``.

    Raises:
      ValueError: another way, a weight without a reward or none at all, and as ``group_advantages``.

    Returns:
      Combined; its metrics are, for every reward, NAME/mean and NAME/spread, the mean deviation within a group; for
      every two, agreement/A/B, of the pairs of streams in a group that both rewards tell apart the share that they
      order alike less the share that they do not; and the shares of dead groups, "dead", and of streams that were not
      judged, "masked".

    References:
      RAVEN, arXiv 2605.15190: "normalise_then_sum". MixGRPO, arXiv 2507.21802: "advantage_sum".
    """
    if how not in COMBINATIONS:
        raise ValueError(f"combine: how is {how!r}; choose from {COMBINATIONS}.")
    if not weights or set(weights) - set(rewards):
        raise ValueError(
            f"combine: weights of {sorted(weights)}, rewards {sorted(rewards)}; weigh at least one of them."
        )
    known = {name: jnp.isfinite(rewards[name]) for name in weights}
    judged_B = jnp.all(jnp.stack(list(known.values())), axis=0)
    masked = {name: jnp.where(judged_B, rewards[name].astype(jnp.float32), jnp.nan) for name in weights}
    total_B = sum(weights[name] * reward for name, reward in masked.items())
    parts = masked
    if how == "normalise_then_sum":
        parts = {name: group_advantages(reward, group, "std", jnp.inf)[0] for name, reward in masked.items()}
    elif how == "advantage_sum":
        parts = {name: group_advantages(reward, group, mode, clip)[0] for name, reward in masked.items()}
    merged_B = jnp.where(judged_B, sum(weights[name] * part for name, part in parts.items()), jnp.nan)
    advantage_B, counts_B = group_advantages(merged_B, group, mode, clip)
    if how == "advantage_sum":
        advantage_B = jnp.where(counts_B > 0, jnp.clip(merged_B, -clip, clip), 0.0)
    alive_P = jnp.any(counts_B.reshape(-1, group) > 0, axis=1)
    metrics = {
        **_statistics(rewards, group),
        "dead": (jnp.sum(~alive_P).astype(jnp.float32), jnp.float32(alive_P.size)),
        "masked": (jnp.sum(~judged_B).astype(jnp.float32), jnp.float32(judged_B.size)),
    }
    return Combined(jnp.where(judged_B, total_B, 0.0), advantage_B, counts_B, judged_B.astype(jnp.float32), metrics)


def _in_groups(reward_B, group: int):
    if group < 1 or reward_B.shape[0] % group:
        raise ValueError(f"{reward_B.shape[0]} streams do not divide into groups of {group}.")
    return reward_B.astype(jnp.float32).reshape(-1, group)


def _within(reward_PG: Float[Array, "P G"], known_PG: Bool[Array, "P G"]):
    """(difference to the group's mean [P, G], 0 where unknown; standard deviation [P]; whether that says anything)."""
    count_P = jnp.maximum(jnp.sum(known_PG, axis=1).astype(jnp.float32), 1.0)
    reward_PG = jnp.where(known_PG, reward_PG, 0.0)
    mean_P = jnp.sum(reward_PG, axis=1) / count_P
    d_PG = jnp.where(known_PG, reward_PG - mean_P[:, None], 0.0)
    std_P = jnp.sqrt(jnp.sum(jnp.square(d_PG), axis=1) / count_P)
    return d_PG, std_P, (count_P >= 2) & (std_P >= ALIKE)


def _statistics(rewards: Mapping[str, Float[Array, " B"]], group: int) -> dict[str, Any]:
    metrics, signs = {}, {}
    for name, reward_B in rewards.items():
        reward_PG = _in_groups(reward_B, group)
        known_PG = jnp.isfinite(reward_PG)
        several_P = jnp.sum(known_PG, axis=1) >= 2
        std_P = _within(reward_PG, known_PG)[1]
        metrics[f"{name}/mean"] = _mean(reward_PG, known_PG)
        metrics[f"{name}/spread"] = _mean(std_P, several_P)
        ahead = jnp.sign(reward_PG[:, :, None] - reward_PG[:, None, :])
        signs[name] = jnp.where(jnp.isfinite(ahead), ahead, 0.0)
    for a, b in itertools.combinations(rewards, 2):
        alike = signs[a] * signs[b]
        metrics[f"agreement/{a}/{b}"] = _mean(alike, alike != 0)
    return metrics


def _mean(value, mask):
    return jnp.sum(jnp.where(mask, value, 0.0)), jnp.sum(mask).astype(jnp.float32)
