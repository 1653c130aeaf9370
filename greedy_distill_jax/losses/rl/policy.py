"""What losses of stage "rl" share: the student's step as a Gaussian policy, the clipped ratio, means of what counts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.losses.rl.episode import Episode


def frame_mean(x_BTHWC: Float[Array, "B T H W C"], weight_T: Float[Array, " T"]) -> Float[Array, " B"]:
    """Mean over the elements of every video, its frames weighted."""
    return jnp.mean(jnp.mean(x_BTHWC, axis=(2, 3, 4)) * weight_T[None], axis=1)


def where_counted(value_B: Float[Array, " B"], mask_B: Float[Array, " B"]) -> Float[Array, " B"]:
    """The values, exactly 0 where the mask is."""
    return jnp.where(mask_B > 0, value_B, 0.0)


def mean_of(value: Float[Array, "*shape"], mask: Float[Array, "*shape"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """A metric: (sum, count) of the values that the mask counts."""
    return jnp.sum(jnp.where(mask > 0, value, 0.0)), jnp.sum(mask)


def recorded_steps(episode: Episode) -> tuple[Float[Array, " T"], Float[Array, " T"], Float[Array, " T"]]:
    """(alpha, s, random), each [T], of the policy N(alpha x0, s^2) behind every frame's recorded step.

    alpha = 1 - next_sigma, s = next_sigma. A last step, whose next_sigma is 0, draws nothing: there random is 0 instead
    of 1, and 1 stands in for s.
    """
    drawn = episode.next_sigma_T > 0
    return 1.0 - episode.next_sigma_T, jnp.where(drawn, episode.next_sigma_T, 1.0), drawn.astype(jnp.float32)


def log_ratio(episode: Episode, x0_BTHWC: Float[Array, "B T H W C"]) -> Float[Array, "B T"]:
    """log pi(next | x) - log pi_predicted(next | x) of every frame, the mean over its elements.

    The densities' difference is taken before their mean, as a product with x0 - predicted: it is exactly 0 where the
    policy predicts what it predicted, and keeps its digits beside clip ranges of 1e-4.

    Args:
      episode: with the frames' recorded steps. What it says of a last step means nothing.
      x0_BTHWC: the policy's prediction at the episode's inputs.
    """
    alpha_T, s_T, _ = recorded_steps(episode)
    alpha, s = flow.expand(alpha_T[None], x0_BTHWC), flow.expand(s_T[None], x0_BTHWC)
    moved, between = x0_BTHWC - episode.predicted_BTHWC, 0.5 * (x0_BTHWC + episode.predicted_BTHWC)
    density = alpha * moved * (episode.next_BTHWC - alpha * between) / jnp.square(s)
    return jnp.mean(density, axis=(2, 3, 4))


def surrogate(
    log_ratio: Float[Array, "B N"], advantage: Float[Array, "B N"], clip: float
) -> tuple[Float[Array, "B N"], Float[Array, "B N"], Float[Array, "B N"]]:
    """(max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho, 1 where the clip stopped the gradient).

    References:
      Schulman et al., Proximal policy optimization algorithms, arXiv 1707.06347.
    """
    ratio = jnp.exp(log_ratio)
    free, kept = -advantage * ratio, -advantage * jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
    return jnp.maximum(free, kept), ratio, (kept > free).astype(jnp.float32)


def squared_gap(x_BTHWC: Float[Array, "B T H W C"], other_BTHWC: Float[Array, "B T H W C"]) -> Float[Array, " B"]:
    """Mean squared difference of two predictions, for the logs."""
    return jnp.mean(jnp.square(jax.lax.stop_gradient(x_BTHWC) - other_BTHWC), axis=(1, 2, 3, 4))
