"""Gradient accumulation: a batch in microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax import config as configuration
from greedy_distill_jax.steps import accumulate
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.types import UserError

LATENT = (4, 4, 4, 16)


def test_the_mean_over_microbatches_is_the_mean_over_the_batch():
    rng = np.random.default_rng(0)
    batch = {"a": jnp.asarray(rng.standard_normal((8, 3)), jnp.float32), "b": jnp.arange(8, dtype=jnp.float32)}
    keys = jax.random.split(jax.random.key(0), 2)

    def gradients(batch, keys):
        assert keys.shape == (2,)
        return {"mean": jnp.mean(jnp.square(batch["a"]) * batch["b"][:, None], axis=0)}

    whole = gradients(batch, keys)["mean"]
    for count in (1, 2, 4, 8):
        np.testing.assert_allclose(accumulate(gradients, batch, keys, count)["mean"], whole, rtol=2e-6)


def test_every_microbatch_has_noise_of_its_own():
    batch, keys = {"a": jnp.zeros((4, 1))}, jax.random.split(jax.random.key(0), 1)

    def gradients(batch, keys):
        noise = jax.random.normal(keys[0])
        return noise, jnp.square(noise)

    mean, square = accumulate(gradients, batch, keys, 4)
    assert square - mean**2 > 1e-3


@pytest.mark.parametrize("stage", ["teacher", "dmd"])
def test_an_update_in_microbatches(stage):
    built, params, critic = tiny.stage_of(tiny.train_config(stage, data__batch=4, data__accumulate=2), LATENT)
    rng = np.random.default_rng(0)
    batch = {
        "latents": jnp.asarray(rng.standard_normal((4, *LATENT)), jnp.float32),
        "text": jnp.asarray(rng.standard_normal((4, 6, 8)), jnp.float32),
    }
    state = built.state(params, critic)
    for part in built.parts:
        state, metrics = jax.jit(part.call)(state, built.frozen, batch)
        assert all(np.isfinite(float(x)) for x in metrics.values())
    assert int(state.step) == 1


def test_what_does_not_divide_is_refused():
    with pytest.raises(UserError, match="does not divide config.data.batch = 8; choose a divisor"):
        configuration.validate(tiny.train_config(data__accumulate=3))
    with pytest.raises(UserError, match="config.data.accumulate=1"):
        configuration.validate(tiny.train_config("dmd", data__accumulate=2, distill__pg="actor_critic"))
