"""Gradient accumulation: a batch in microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from greedy_distill_jax.config import read_settings
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.distribution.parallel import on_mesh
from greedy_distill_jax.distribution.sharding import shardings
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.training import policy_gradient, rollout, update
from greedy_distill_jax.training.update import accumulate, logged

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


def test_a_mean_over_some_values_is_that_of_the_batch():
    batch, keys = {"a": jnp.asarray([1.0, 2.0, 3.0, 6.0])}, jax.random.split(jax.random.key(0), 1)

    def gradients(batch, keys):
        some = (batch["a"] > 2.5).astype(jnp.float32)  # microbatches have different numbers of them
        return {"some": (jnp.sum(batch["a"] * some), jnp.sum(some)), "none": (jnp.float32(0), jnp.float32(0))}

    for count in (1, 2, 4):
        found = logged(accumulate(gradients, batch, keys, count))
        assert float(found["some"]) == 4.5 and float(found["none"]) == 0.0


def _by_hand(gradients, batch, keys, count, *, keeps=False):
    """The mean of the gradients of the microbatches, each with its own keys; with ``keeps`` their examples, too."""
    parts = []
    for i in range(count):
        own = jnp.stack([jax.random.fold_in(key, i) for key in keys])
        parts.append(gradients({name: x[i::count] for name, x in batch.items()}, own))
    means, kept = zip(*parts) if keeps else (parts, None)
    mean = jax.tree.map(lambda *xs: sum(xs) / count, *means)
    if not keeps:
        return mean
    return mean, jax.tree.map(lambda *xs: jnp.stack(xs, axis=1).reshape(-1, *xs[0].shape[1:]), *kept)


@pytest.mark.parametrize("stage", ["teacher", "dmd"])
def test_an_update_is_the_mean_of_its_microbatches(stage, monkeypatch):
    # Plain gradient descent: the update is the gradient.
    tiny.descend(monkeypatch, 1.0)
    built, params = tiny.stage_of(tiny.train_config(stage, data__accumulate=2), LATENT)
    rng, state = np.random.default_rng(0), built.state(params)
    batch = {
        "latents": jnp.asarray(rng.standard_normal((8, *LATENT)), jnp.float32),
        "text": jnp.asarray(rng.standard_normal((8, 6, 8)), jnp.float32),
    }
    seen, roll_out = [], rollout.roll_out
    monkeypatch.setattr(rollout, "roll_out", lambda *args: seen.append(args[-1]) or roll_out(*args))

    def run(part, mesh=None):
        trees = (state, built.frozen, batch)
        if mesh is None:
            return jax.jit(tiny.call_of(part))(*trees)
        return jax.jit(on_mesh(tiny.call_of(part), mesh))(*(jax.device_put(x, shardings(x, mesh)) for x in trees))

    for part in built.parts:
        with monkeypatch.context() as m:
            for module in (update, policy_gradient):
                m.setattr(module, "accumulate", _by_hand)
            seen.clear()
            expected = run(part)
        if stage == "dmd":  # every rollout of an update ends at the same step
            assert len(seen) == 2 and seen[0] is seen[1]
        found = [run(part)]
        if stage == "teacher":
            found.append(run(part, make_mesh({"data": 4}, jax.devices()[:4])))
        for after, metrics in found:
            for name, value in expected[1].items():
                np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
            name = {"dmd": "student"}.get(part.name, part.name)
            moved, wanted = (
                jax.tree.map(jnp.subtract, jax.device_get(x.nets[name].params), jax.device_get(state.nets[name].params))
                for x in (after, expected[0])
            )
            difference = optax.tree.norm(jax.tree.map(jnp.subtract, moved, wanted))
            assert optax.tree.norm(wanted) > 1e-3 and difference <= 1e-5 * optax.tree.norm(wanted)


def test_what_does_not_divide_is_refused():
    with pytest.raises(UserError, match="does not divide config.data.batch = 8; choose a divisor"):
        read_settings(tiny.train_config(data__accumulate=3))
    with pytest.raises(UserError, match="config.data.accumulate=1"):
        read_settings(tiny.train_config("dmd", data__accumulate=2, distill__pg="actor_critic"))
