"""Distribution matching of motion: what changes from frame to frame, weighted towards what comes late."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.losses.dmd import NORMALIZERS
from greedy_distill_jax.losses.pair import Pair
from greedy_distill_jax.ranges import Fraction, Positive, one_of


def motion(
    net: Callable | None,
    batch: Mapping[str, Any],
    key: PRNGKeyArray | None,
    *,
    pair: Pair,
    normalizer: Annotated[str, one_of(*NORMALIZERS)] = "real",
    dynamic: Fraction = 0.7,
    growth: Positive = 1.2,
) -> tuple[Float[Array, " B"], dict[str, Float[Array, ""]]]:
    """Surrogate whose gradient in the motion y = x[1:] - x[:-1] is h g, g that of distribution matching in y.

    g = D x0_fake(x_sigma) - D x0_real(x_sigma) with D the difference of neighbouring frames, the mean over the pair's
    draws; with the normaliser "real" every draw is divided by the example's mean |y - D x0_real|. The loss is
    1/2 mean h (y - sg(y - g))^2, so that dloss/dx = D^T (h g) / size(y), a high-pass in time of what ``dmd`` follows.
    The published terms have the same numbers and no gradient: g and h are made, and the square is taken, where none is
    kept.

    Frame weights h = dynamic (1 + share of mean g^2 up to the frame) + (1 - dynamic) growth^f / mean: later motion, and
    motion behind much that is wrong, counts more.

    Args:
      net, key: unused; the action comes with the batch, the noise with the pair.
      batch: "action" [B, T, H, W, C], the generated video, through which the gradient flows; T of at least 2.
      pair: of that video. Motion counts where both of its frames do.
      normalizer: "real" or "none".
      dynamic: weight of the share of g^2 against the growth.
      growth: factor from frame to frame.

    Raises:
      ValueError: a video of one frame.

    Returns:
      loss [B], and metrics: mean |g|, and the mean |y - D x0_real| that normalises it.

    References:
      Diagonal Distillation, arXiv 2603.09488, flow distribution matching; the weights are those of its first code.
    """
    del net, key
    action = batch["action"]
    if action.shape[1] < 2:
        raise ValueError("motion: a video of one frame has no motion; use at least 2 latent frames.")
    y = jnp.diff(action, axis=1)
    still, counts = jax.lax.stop_gradient(y), pair.mask[:, 1:] * pair.mask[:, :-1]
    counts = counts / jnp.maximum(jnp.mean(counts, axis=1, keepdims=True), 1e-6)
    size = flow.expand(counts, y)

    def of_draw(x0_real, x0_fake):
        real, fake = jnp.diff(x0_real, axis=1), jnp.diff(x0_fake, axis=1)
        distance = jnp.mean(size * jnp.abs(still - real), axis=(1, 2, 3, 4))
        g = fake - real
        return g / flow.expand(jnp.maximum(distance, 1e-6), g) if normalizer == "real" else g, distance

    g, distance = jax.vmap(of_draw)(pair.x0_real, pair.x0_fake)
    g = jax.lax.stop_gradient(jnp.mean(g, axis=0))
    weight = size * flow.expand(frame_weights(g, dynamic, growth), y)
    loss_B = 0.5 * jnp.mean(weight * jnp.square(y - (still - g)), axis=(1, 2, 3, 4))
    metrics = {"gradient": jnp.mean(size * jnp.abs(g)), "distance": jnp.mean(jax.lax.stop_gradient(distance))}
    return loss_B, metrics


def frame_weights(
    g: Float[Array, "B F H W C"], dynamic: float | int = 0.7, growth: float | int = 1.2
) -> Float[Array, "B F"]:
    """h of ``motion`` for F differences of frames; no gradient flows through it."""
    power = jnp.mean(jnp.square(jax.lax.stop_gradient(g)), axis=(2, 3, 4))
    share = jnp.cumsum(power, axis=1) / jnp.maximum(jnp.sum(power, axis=1, keepdims=True), 1e-12)
    rising = jnp.asarray(growth, jnp.float32) ** jnp.arange(g.shape[1], dtype=jnp.float32)
    return dynamic * (1.0 + share) + (1.0 - dynamic) * (rising / jnp.mean(rising))[None]
