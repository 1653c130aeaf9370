"""Policy gradient for steps without noise: the policy is how near a group's videos are to the one in their centre."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from greedy_distill_jax.losses.rl.episode import Episode
from greedy_distill_jax.losses.rl.policy import frame_mean, mean_of, squared_gap, surrogate
from greedy_distill_jax.ranges import Momentum, Positive


def neighbor(
    net: Callable | None,
    batch: Mapping[str, Any] | None,
    key: PRNGKeyArray | None,
    *,
    episode: Episode,
    current: Callable,
    tau: Positive = 0.1,
    clip: Momentum = 0.2,
) -> tuple[Float[Array, " B"], dict[str, Any]]:
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = pi(i) / pi_old(i), of every neighbour i of a group's centre.

    log pi(i) = log_softmax_i(-d_i / tau), d_i = mean (x0_i - c)^2 over elements, frames weighted. x0_i is what the
    episode's policy predicted for neighbour i, c what the student predicts for the centre, and c_old, for pi_old, what
    the episode's policy predicted for it. So c moves to the neighbours that were judged better: where both policies
    agree, the gradient in c is that of A_i (d_i - sum_j pi(j) d_j) / tau. It needs no density, hence no noise in the
    step.

    The centre is the first stream of every group (the papers' anchor), and the noises of the others are its own with
    some mixed in. It has no part in the softmax, of which it would take the most. Where it does not count, nor does its
    group.

    Args:
      net, batch, key: unused.
      episode: of whole groups, with the recorded steps and the advantages.
      current: ``x0 = current(x, sigma)`` of the student; gradients flow through it.
      tau: of the softmax, on the scale of d. The papers' is not for means over elements; this default is the project's
        own.
      clip: range of the ratio.

    Returns:
      loss [B], 0 for a centre, and metrics: the mean ratio and the largest deviation of one from 1 (of several
      microbatches their mean), the share of clipped ratios, and the mean squared gap between the predictions of the
      student and of the episode's policy.

    References:
      Neighbor GRPO, arXiv 2511.16955. AR-CoPO, arXiv 2603.17461: a group forks at one chunk of a stream. KVPO, arXiv
      2605.14278, has the same softmax over branches whose histories differ.
    """
    del net, batch, key
    group, counts_PG = episode.group, episode.counts_B.reshape(-1, episode.group)
    counts_PN = counts_PG[:, 1:] * counts_PG[:, :1]
    episode = episode.only(episode.counts_B)
    x0, predicted = current(episode.x_BTHWC, episode.sigma_T), episode.predicted_BTHWC

    def of_neighbours(x_BTHWC):
        return frame_mean(x_BTHWC, episode.weight_T).reshape(-1, group)[:, 1:]

    # log pi - log pi_old from the change of the distances, not from the distances: exactly 0 where there is none.
    c, c_old = (jnp.repeat(x[::group], group, axis=0) for x in (x0, predicted))
    distance_PN = of_neighbours(jnp.square(predicted - c_old))
    old_PN = jax.nn.softmax(jnp.where(counts_PN > 0, -distance_PN / tau, -1e9), axis=1)
    closer_PN = jnp.where(counts_PN > 0, of_neighbours((c - c_old) * (2.0 * predicted - c - c_old)) / tau, 0.0)
    closer_PN -= jax.lax.stop_gradient(jnp.max(closer_PN, axis=1, keepdims=True))  # which cancels: no overflow
    log_ratio_PN = closer_PN - jnp.log1p(jnp.sum(old_PN * jnp.expm1(closer_PN), axis=1, keepdims=True))
    advantage_PN = episode.advantage_B.reshape(-1, group)[:, 1:]
    loss_PN, ratio_PN, clipped_PN = surrogate(log_ratio_PN, advantage_PN, clip)
    loss_PG = jnp.pad(jnp.where(counts_PN > 0, loss_PN, 0.0), ((0, 0), (1, 0)))
    metrics = {
        "ratio": mean_of(ratio_PN, counts_PN),
        "ratio_deviation": jnp.max(jnp.where(counts_PN > 0, jnp.abs(ratio_PN - 1.0), 0.0)),
        "clipped": mean_of(clipped_PN, counts_PN),
        "gap": mean_of(squared_gap(x0, predicted), episode.counts_B),
    }
    return loss_PG.reshape(-1), metrics
