"""Classifier-free guidance (METHOD_SPEC A.9)."""

import jax.numpy as jnp


def guided(net, text, null_text, scale: float):
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


def guided_score(score, null_MC, scale: float):
    """The same for ``score(x, sigma, batch)``, whose batch carries "text" and other arrays with a leading B."""

    def velocity(x, sigma, batch):
        def conditioned(x, sigma, text):
            repeats = text.shape[0] // batch["text"].shape[0]
            rows = {name: jnp.concatenate([value] * repeats) for name, value in batch.items()}
            return score(x, sigma, {**rows, "text": text})

        null = jnp.broadcast_to(null_MC[None], batch["text"].shape)
        return guided(conditioned, batch["text"], null, scale)(x, sigma)

    return velocity
