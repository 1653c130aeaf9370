"""Policy gradient on the re-noising step, which is a Gaussian policy as it is."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.losses.rl.episode import Episode
from greedy_distill_jax.losses.rl.policy import (
    log_ratio,
    mean_of,
    recorded_steps,
    squared_gap,
    surrogate,
    where_counted,
)
from greedy_distill_jax.ranges import NotNegative, one_of

STEP_WEIGHTS = ("none", "snr")


def cm_grpo(
    net: Callable | None,
    batch: Mapping[str, Any] | None,
    key: PRNGKeyArray | None,
    *,
    episode: Episode,
    current: Callable,
    step_weight: Annotated[str, one_of(*STEP_WEIGHTS)] = "none",
    clip: NotNegative = 0.0,
) -> tuple[Float[Array, " B"], dict[str, Any]]:
    """Regression whose gradient is -A grad log N(next; alpha x0, s^2), the log density a mean over elements.

    alpha = 1 - next_sigma, s = next_sigma, A the advantage:
    mean || x0 - sg(x0 + A alpha / (2 s^2) (next - alpha x0)) ||^2, frames weighted. It needs no other sampler than the
    student's own. Frames whose recorded step was the last (s = 0) count 0: nothing was drawn there.

    With ``clip`` it is max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) of every frame, rho the ratio of the densities
    under the student and under the policy that made the episode: for several updates per episode. Both have the same
    gradient where the two policies agree.

    Args:
      net, batch, key: unused.
      episode: with the recorded steps and the advantages.
      current: ``x0 = current(x, sigma)`` of the student; gradients flow through it.
      step_weight: "none", or "snr": frames are weighted by s / alpha, without which the gradient, alpha / s in units of
        the noise, trains the last noise levels most.
      clip: range of the ratio; 0 for no ratio. As densities are means over elements, published ranges are about 1e-4.

    Raises:
      ValueError: another step weight.

    Returns:
      loss [B], and metrics: the mean ratio and the largest deviation of one from 1 (of several microbatches their
      mean), the share of clipped ratios (with ``clip``), and the mean squared gap between the predictions of the
      student and of the episode's policy.

    References:
      RAVEN, arXiv 2605.15190: the policy and the regression, which it scales by 100 (the term's weight).
      Flow-GRPO, arXiv 2505.05470: means over elements and the range of their ratio.
    """
    del net, batch, key
    if step_weight not in STEP_WEIGHTS:
        raise ValueError(f"cm_grpo: step_weight is {step_weight!r}; choose from {STEP_WEIGHTS}.")
    counts_B = episode.counts_B
    episode = episode.only(counts_B)
    alpha_T, s_T, random_T = recorded_steps(episode)
    weight_T = episode.weight_T * random_T
    if step_weight == "snr":
        weight_T = weight_T * s_T / alpha_T
    x0 = current(episode.x_BTHWC, episode.sigma_T)
    log_ratio_BT = log_ratio(episode, x0)
    advantage_BT = jnp.broadcast_to(episode.advantage_B[:, None], log_ratio_BT.shape)
    counts_BT = counts_B[:, None] * random_T[None]
    metrics = {}
    if clip:
        loss_BT, ratio_BT, clipped_BT = surrogate(log_ratio_BT, advantage_BT, clip)
        metrics["clipped"] = mean_of(clipped_BT, counts_BT)
    else:
        alpha, s = flow.expand(alpha_T[None], x0), flow.expand(s_T[None], x0)
        push = flow.expand(advantage_BT, x0) * alpha / (2.0 * jnp.square(s)) * (episode.next_BTHWC - alpha * x0)
        loss_BT = jnp.mean(jnp.square(x0 - jax.lax.stop_gradient(x0 + push)), axis=(2, 3, 4))
        ratio_BT = jnp.exp(log_ratio_BT)
    metrics["ratio"] = mean_of(ratio_BT, counts_BT)
    metrics["ratio_deviation"] = jnp.max(jnp.where(counts_BT > 0, jnp.abs(ratio_BT - 1.0), 0.0))
    metrics["gap"] = mean_of(squared_gap(x0, episode.predicted_BTHWC), counts_B)
    return where_counted(jnp.mean(loss_BT * weight_T[None], axis=1), counts_B), metrics
