"""Preference of the best video of a group over its worst, chunk by chunk in their own histories."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.losses.rl.episode import Episode
from greedy_distill_jax.losses.rl.policy import frame_mean, mean_of
from greedy_distill_jax.ranges import NotNegative, Positive


def dpo_chunk(
    net: Callable | None,
    batch: Mapping[str, Any] | None,
    key: PRNGKeyArray,
    *,
    episode: Episode,
    current: Callable,
    reference: Callable,
    beta: Positive = 100.0,
    alpha: NotNegative = 0.5,
) -> tuple[Float[Array, " B"], dict[str, Any]]:
    """-log sigmoid(-beta / 2 [(e_w - e_w_reference) - (e_l - e_l_reference)]) + alpha e_w of every group.

    e = mean (v - v*)^2 over a whole video, frames weighted, v the velocity at its finished frames noised to the
    episode's levels, v* the one that leads there; w is the counted stream of the highest advantage, l that of the
    lowest. Both have the same noise. One sigmoid on the mean over all chunks, not one per chunk; alpha e_w holds the
    likelihood of the better video, which the margin alone lets fall.

    Args:
      net, batch: unused.
      key: PRNG key of the noise.
      episode: of whole groups, with the finished frames, their noise levels and the advantages.
      current: ``x0 = current(x, sigma)`` of the student; gradients flow through it.
      reference: the same of the student that the stage started from; none flow.
      beta: sharpness of the preference, for errors that are means over elements.
      alpha: weight of the better video's error.

    Returns:
      loss [B], half of a group's at its best and half at its worst stream, scaled so that the mean over B is that over
      the groups; and metrics: the mean margin, the difference in brackets, and the share of groups in which it is
      negative, as is wanted.

    References:
      Wallace et al., Diffusion model alignment using direct preference optimization, arXiv 2311.12908.
    """
    del net, batch
    counts_B, group = episode.counts_B, episode.group
    episode = episode.only(counts_B)
    x, sigma_T = episode.x0_BTHWC, episode.sigma_T
    shape = (x.shape[0] // group, *x.shape[1:])
    noise = jnp.repeat(jax.random.normal(key, shape, jnp.float32), group, axis=0)
    noisy = flow.add_noise(x, noise, jnp.broadcast_to(sigma_T[None], x.shape[:2]))
    weight_T = episode.weight_T / jnp.square(sigma_T)  # v - v* = (x - x0) / sigma

    def errors(policy):
        return frame_mean(jnp.square(policy(noisy, sigma_T) - x), weight_T)

    error_B = errors(current)
    closer_PG = (error_B - jax.lax.stop_gradient(errors(reference))).reshape(-1, group)
    counts_PG, advantage_PG = counts_B.reshape(-1, group) > 0, episode.advantage_B.reshape(-1, group)
    best_P = jnp.argmax(jnp.where(counts_PG, advantage_PG, -jnp.inf), axis=1)
    worst_P = jnp.argmin(jnp.where(counts_PG, advantage_PG, jnp.inf), axis=1)
    best_PG, worst_PG = (jax.nn.one_hot(i, group, dtype=jnp.float32) for i in (best_P, worst_P))
    margin_P = jnp.sum((best_PG - worst_PG) * closer_PG, axis=1)
    held_P = jnp.sum(best_PG * error_B.reshape(-1, group), axis=1)
    loss_P = jax.nn.softplus(0.5 * beta * margin_P) + alpha * held_P
    share_PG = jnp.where(counts_PG, 0.5 * group * (best_PG + worst_PG), 0.0)
    alive_P = jnp.any(counts_PG, axis=1).astype(jnp.float32)
    metrics = {
        "margin": mean_of(margin_P, alive_P),
        "preferred": mean_of((margin_P < 0).astype(jnp.float32), alive_P),
    }
    return (share_PG * loss_P[:, None]).reshape(-1), metrics
