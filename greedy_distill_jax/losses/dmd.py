"""Distribution matching, read as a policy gradient with a reverse-KL reward (docs/method.md, section 7.4)."""

import jax
import jax.numpy as jnp

from greedy_distill_jax.diffusion import flow, noise_levels

NORMALIZERS = ("real", "none")


def dmd(
    net,
    batch,
    key,
    *,
    real,
    fake,
    shift: float = 5.0,
    low: float = 0.02,
    high: float = 0.98,
    per_frame: bool = False,
    group: int = 1,
    draws: int = 1,
    normalizer: str = "real",
    weighting: str = "none",
):
    """Surrogate whose gradient in the action x is that of the reverse KL between noised student and teacher videos.

    x_sigma = (1 - sigma) x + sigma noise; g = x0_fake(x_sigma) - x0_real(x_sigma); with the normaliser "real" g is
    divided by the example's mean |x - x0_real|. The loss is 1/2 mean (x - sg(x - g))^2, so that dloss/dx = g / size(x).
    With ``weighting="score"`` and no normaliser, g = (1 - sigma) (score_fake - score_real): the gradient of
    KL(student_sigma || teacher_sigma) itself, its negative the action gradient of the deterministic policy.

    Args:
      net: unused; the action comes with the batch.
      batch: "action" [B, T, H, W, C], the generated video, through which the gradient flows.
      key: PRNG key.
      real, fake: ``velocity = score(x, sigma, batch)`` of the teacher (with its guidance) and of the student's own
        distribution; no gradient flows through either.
      shift, low, high: noise levels are drawn uniformly before the shift and clipped to [low, high].
      per_frame, group: one level per ``group`` frames instead of one per video (autoregressive scores only: a
        bidirectional teacher has seen one level per video).
      draws: noise draws per action, averaged.
      normalizer: "real" or "none".
      weighting: "none" (as published, differences of x0) or "score", (1 - sigma)^2 / sigma^2.

    Returns:
      loss [B], and metrics: mean |g|, and the mean |x - x0_real| that normalises it.

    References:
      Yin et al., One-step Diffusion with Distribution Matching Distillation, 2023, arXiv 2311.18828.
      Huang et al., Self Forcing, 2025, arXiv 2506.08009 (of videos that the student makes itself).
    """
    del net
    if normalizer not in NORMALIZERS or weighting not in ("none", "score"):
        raise ValueError(
            f"dmd: normalizer is {normalizer!r}, weighting {weighting!r}; choose from {NORMALIZERS}, and 'none' or "
            f"'score'."
        )
    action = batch["action"]
    if per_frame and action.shape[1] % group:
        raise ValueError(f"dmd: {action.shape[1]} frames do not divide into groups of {group}.")
    x = jax.lax.stop_gradient(action)

    def direction(key):
        key_sigma, key_noise = jax.random.split(key)
        levels = (x.shape[0], x.shape[1] // group if per_frame else 1)
        sigma = jnp.clip(noise_levels.draw_sigma(key_sigma, levels, shift=shift), low, high)
        sigma = jnp.repeat(sigma, group, axis=1) if per_frame else sigma
        x_sigma = flow.add_noise(x, jax.random.normal(key_noise, x.shape, jnp.float32), sigma)
        x0_real, x0_fake = (flow.x0_from_velocity(x_sigma, s(x_sigma, sigma, batch), sigma) for s in (real, fake))
        g, distance = x0_fake - x0_real, jnp.mean(jnp.abs(x - x0_real), axis=(1, 2, 3, 4))
        if weighting == "score":
            g = g * flow.expand(jnp.square((1.0 - sigma) / sigma), g)
        if normalizer == "real":
            g = g / flow.expand(jnp.maximum(distance, 1e-6), g)
        return g, distance

    g, distance = jax.lax.map(direction, jax.random.split(key, draws)) if draws > 1 else direction(key)
    if draws > 1:
        g, distance = jnp.mean(g, axis=0), jnp.mean(distance, axis=0)
    g = jax.lax.stop_gradient(g)
    loss_B = 0.5 * jnp.mean(jnp.square(action - (x - g)), axis=(1, 2, 3, 4))
    return loss_B, {"gradient": jnp.mean(jnp.abs(g)), "distance": jnp.mean(jax.lax.stop_gradient(distance))}
