"""Distribution matching, read as a policy gradient with a reverse-KL reward (docs/method.md)."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.losses.pair import Pair
from greedy_distill_jax.ranges import one_of

NORMALIZERS, WEIGHTINGS = ("real", "none"), ("none", "score")


def dmd(
    net: Callable | None,
    batch: Mapping[str, Any],
    key: PRNGKeyArray | None,
    *,
    pair: Pair,
    normalizer: Annotated[str, one_of(*NORMALIZERS)] = "real",
    weighting: Annotated[str, one_of(*WEIGHTINGS)] = "none",
) -> tuple[Float[Array, " B"], dict[str, Float[Array, ""]]]:
    """Surrogate whose gradient in the action x is that of the reverse KL between noised student and teacher videos.

    g = x0_fake(x_sigma) - x0_real(x_sigma), the mean over the pair's draws; with the normaliser "real" every draw is
    divided by the example's mean |x - x0_real|. The loss is 1/2 mean (x - sg(x - g))^2 over the frames that count, so
    that dloss/dx = g / size(x). With ``weighting="score"`` and no normaliser, g = (1 - sigma) (score_fake -
    score_real): the gradient of KL(student_sigma || teacher_sigma) itself, its negative the action gradient of the
    deterministic policy.

    Args:
      net, key: unused; the action comes with the batch, the noise with the pair.
      batch: "action" [B, T, H, W, C], the generated video, through which the gradient flows.
      pair: of that video; no gradient flows through it.
      normalizer: "real" or "none".
      weighting: "none" (as published, differences of x0) or "score", (1 - sigma)^2 / sigma^2.

    Returns:
      loss [B], and metrics: mean |g|, and the mean |x - x0_real| that normalises it.

    References:
      Yin et al., One-step diffusion with distribution matching distillation, arXiv 2311.18828.
      Huang et al., Self forcing, arXiv 2506.08009.
    """
    del net, key
    if normalizer not in NORMALIZERS or weighting not in WEIGHTINGS:
        raise ValueError(
            f"dmd: normalizer is {normalizer!r}, weighting {weighting!r}; choose from {NORMALIZERS} and {WEIGHTINGS}."
        )
    action = batch["action"]
    x, weight = (
        jax.lax.stop_gradient(action),
        flow.expand(pair.mask / jnp.mean(pair.mask, axis=1, keepdims=True), action),
    )

    def direction(sigma, x0_real, x0_fake):
        g, distance = x0_fake - x0_real, jnp.mean(weight * jnp.abs(x - x0_real), axis=(1, 2, 3, 4))
        if weighting == "score":
            g = g * flow.expand(jnp.square((1.0 - sigma) / sigma), g)
        if normalizer == "real":
            g = g / flow.expand(jnp.maximum(distance, 1e-6), g)
        return g, distance

    g, distance = jax.vmap(direction)(pair.sigma, pair.x0_real, pair.x0_fake)
    g = jax.lax.stop_gradient(jnp.mean(g, axis=0))
    loss_B = 0.5 * jnp.mean(weight * jnp.square(action - (x - g)), axis=(1, 2, 3, 4))
    metrics = {"gradient": jnp.mean(weight * jnp.abs(g)), "distance": jnp.mean(jax.lax.stop_gradient(distance))}
    return loss_B, metrics
