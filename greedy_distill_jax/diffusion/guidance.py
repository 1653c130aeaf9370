"""Classifier-free guidance.

References:
  Ho and Salimans, Classifier-Free Diffusion Guidance, 2022, arXiv 2207.12598.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def guided(
    net: Callable, text: Float[Array, " B *text"], null_text: Float[Array, " B *text"], scale: float
) -> Callable:
    """``velocity(x, sigma)`` of ``net(x, sigma, text)`` with standard CFG: u + scale (c - u).

    One call on the doubled batch; scale 1 calls the conditional branch alone. ``null_text`` has the shape of ``text``.
    """
    if scale == 1.0:
        return lambda x, sigma: net(x, sigma, text)
    both = jnp.concatenate([text, null_text])

    def velocity(x, sigma):
        v = net(jnp.concatenate([x, x]), jnp.concatenate([sigma, sigma]), both)
        conditional, unconditional = jnp.split(v, 2)
        return unconditional + scale * (conditional - unconditional)

    return velocity


def guided_score(score: Callable, null_MC: Float[Array, "M C"], scale: float) -> Callable:
    """The same for ``score(x, sigma, batch)`` with batch["text"] [B, M, C].

    The two branches are two calls of one function, not one on a doubled batch: a score that draws noise of its own (on
    its history) draws the same for both, so that their difference is the text's alone.
    """
    if scale == 1.0:
        return score

    def velocity(x, sigma, batch):
        texts = jnp.stack([batch["text"], jnp.broadcast_to(null_MC[None], batch["text"].shape)])
        conditional, unconditional = jax.lax.map(lambda text: score(x, sigma, {**batch, "text": text}), texts)
        return unconditional + scale * (conditional - unconditional)

    return velocity
