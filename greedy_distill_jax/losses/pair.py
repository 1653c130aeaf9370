"""What the real and the fake score say of the same noised videos: drawn once per update, for every loss that asks."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from greedy_distill_jax.diffusion import flow, noise_levels


class Pair(NamedTuple):
    """R noisings of B videos, and both scores' answers to each; no gradient flows through any of it.

    x_sigma: (1 - sigma) x + sigma noise. sigma: one level per video, or per frame. x0_real, x0_fake: what either score
    takes x to be. mask: weight of every frame in a loss, 0 where the scores have nothing to say.
    """

    x_sigma: Float[Array, "R B T H W C"]
    sigma: Float[Array, "R B _"]
    x0_real: Float[Array, "R B T H W C"]
    x0_fake: Float[Array, "R B T H W C"]
    mask: Float[Array, "B T"]


def draw_pair(
    key: PRNGKeyArray,
    x: Float[Array, "B T H W C"],
    real: Callable,
    fake: Callable,
    batch: Mapping[str, Any],
    *,
    shift: float = 5.0,
    low: float = 0.02,
    high: float = 0.98,
    group: int | None = None,
    draws: int = 1,
    skip: int = 0,
) -> Pair:
    """Noises videos and asks both scores about the same inputs.

    Args:
      key: PRNG key.
      x: the videos.
      real, fake: ``velocity = score(x, sigma, batch)`` of the teacher (with its guidance) and of the student's own
        distribution.
      batch: of the videos: text, and the history that scores look back on, which is the same for both.
      shift, low, high: noise levels are drawn uniformly before the shift and clipped to [low, high].
      group: frames that share a level; None for one level per video, as a bidirectional teacher has seen.
      draws: R.
      skip: first frames that no loss counts.

    Raises:
      ValueError: frames that do not divide into groups.
    """
    count, frames = x.shape[:2]
    if group and frames % group:
        raise ValueError(f"{frames} frames do not divide into groups of {group} that share a noise level.")
    x = jax.lax.stop_gradient(x)

    def draw(key):
        key_sigma, key_noise = jax.random.split(key)
        shape = (count, frames // group if group else 1)
        sigma = jnp.clip(noise_levels.draw_sigma(key_sigma, shape, shift=shift), low, high)
        sigma = jnp.repeat(sigma, group, axis=1) if group else sigma
        x_sigma = flow.add_noise(x, jax.random.normal(key_noise, x.shape, jnp.float32), sigma)
        x0 = (flow.x0_from_velocity(x_sigma, score(x_sigma, sigma, batch), sigma) for score in (real, fake))
        return x_sigma, sigma, *x0

    if draws > 1:
        drawn = jax.lax.map(draw, jax.random.split(key, draws))
    else:
        drawn = jax.tree.map(lambda a: a[None], draw(key))
    mask = jnp.broadcast_to((jnp.arange(frames) >= skip).astype(jnp.float32), (count, frames))
    return jax.lax.stop_gradient(Pair(*drawn, mask))
