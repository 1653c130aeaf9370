"""Contrast of better and worse videos on noised finished frames: no recorded step, no density."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses.rl.episode import Episode
from greedy_distill_jax.losses.rl.policy import frame_mean, mean_of, squared_gap, where_counted
from greedy_distill_jax.ranges import Positive


def nft(
    net: Callable | None,
    batch: Mapping[str, Any] | None,
    key: PRNGKeyArray,
    *,
    episode: Episode,
    current: Callable,
    old: Callable,
    beta: Positive = 0.1,
    advantage_max: Positive = 5.0,
) -> tuple[Float[Array, " B"], dict[str, Any]]:
    """r ||p+ - x||^2 + (1 - r) ||p- - x||^2, means over elements, frames weighted; x the finished frames.

    p+ = beta c + (1 - beta) o and p- = (1 + beta) o - beta c, where c and o are the predictions of the student and of
    its average at x noised to the episode's levels, and r = 1/2 + clip(A / advantage_max, -1, 1) / 2. Where c = o the
    gradient in c is 2 beta (2 r - 1) (o - x): towards x if and only if r > 1/2.

    While the average equals the student, c = o at every update, the loss is regression weighted by advantages; see
    ``check_gap``. The weighting by 1 / |p - x| of DiffusionNFT is left out: few-step students make it explode.

    Args:
      net, batch: unused.
      key: PRNG key of the noise.
      episode: with the finished frames, their noise levels and the advantages.
      current: ``x0 = current(x, sigma)`` of the student; gradients flow through it.
      old: the same of its average; none flow.
      beta: how far p+ and p- are apart.
      advantage_max: advantages from which on a video is all good or all bad.

    Returns:
      loss [B], and metrics: the mean squared gap between the predictions of student and average, over all videos, and
      the mean r.

    References:
      DiffusionNFT, arXiv 2509.16117. Astrolabe, arXiv 2603.17051: x0 instead of velocities, the student's own levels.
    """
    del net, batch
    counts_B = episode.counts_B
    episode = episode.only(counts_B)
    x, sigma_T = episode.x0_BTHWC, episode.sigma_T
    noise = jax.random.normal(key, x.shape, jnp.float32)
    noisy = flow.add_noise(x, noise, jnp.broadcast_to(sigma_T[None], x.shape[:2]))
    c, o = current(noisy, sigma_T), jax.lax.stop_gradient(old(noisy, sigma_T))
    good_B = 0.5 + 0.5 * jnp.clip(episode.advantage_B / advantage_max, -1.0, 1.0)
    positive_B = frame_mean(jnp.square(beta * c + (1.0 - beta) * o - x), episode.weight_T)
    negative_B = frame_mean(jnp.square((1.0 + beta) * o - beta * c - x), episode.weight_T)
    loss_B = good_B * positive_B + (1.0 - good_B) * negative_B
    metrics = {"gap": jnp.mean(squared_gap(c, o)), "good": mean_of(good_B, counts_B)}
    return where_counted(loss_B, counts_B), metrics


def check_gap(gap: float, updates: int) -> None:
    """Raises UserError (field "old_decay") where student and average predict the same after updates of the student.

    Args:
      gap: metric of ``nft``.
      updates: of the student before it was measured, at more than rate 0.
    """
    if updates > 0 and gap == 0:
        raise UserError(
            f"the average of the student still predicts what the student does after {updates} updates, so that nothing "
            f"sets good videos apart from bad ones; let it lag behind, or raise the learning rate.",
            "old_decay",
        )
