"""The motion loss on problems with a known answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax import losses
from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses.dmd import dmd
from greedy_distill_jax.losses.motion import frame_weights, motion
from greedy_distill_jax.losses.pair import Pair, draw_pair
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.testing.gaussian import gaussian
from greedy_distill_jax.training import audit
from greedy_distill_jax.training.update import value_and_gradients

SHAPE = (3, 5, 2, 2, 4)  # B T H W C


def pair_of(seed=0, draws=2, mask=None):
    x_sigma, real, fake = jax.random.normal(jax.random.key(seed), (3, draws, *SHAPE))
    return Pair(x_sigma, jnp.full((draws, SHAPE[0], 1), 0.5), real, fake, jnp.ones(SHAPE[:2]) if mask is None else mask)


def gradient(loss, x, pair, **options):
    return jax.grad(lambda x: jnp.sum(loss(None, {"action": x}, None, pair=pair, **options)[0]))(x)


def transposed(differences):
    """D^T of the difference of neighbouring frames."""
    padded = np.pad(differences, [(0, 0), (1, 1), (0, 0), (0, 0), (0, 0)])
    return padded[:, :-1] - padded[:, 1:]


def test_its_gradient_is_the_weighted_high_pass_of_distribution_matching():
    x, pair = jax.random.normal(jax.random.key(7), SHAPE), pair_of()
    g = np.mean(pair.x0_fake - pair.x0_real, axis=0)
    of_dmd = gradient(dmd, x, pair, normalizer="none") * x[0].size
    np.testing.assert_allclose(of_dmd, g, atol=1e-6)
    motion_g = np.diff(g, axis=1)
    h = np.asarray(frame_weights(jnp.asarray(motion_g)))[..., None, None, None]
    found = gradient(motion, x, pair, normalizer="none") * motion_g[0].size
    np.testing.assert_allclose(found, transposed(h * motion_g), atol=1e-5)
    np.testing.assert_allclose(np.sum(found, axis=1), 0.0, atol=1e-5)  # nothing of what all frames share


def test_the_normaliser_is_the_distance_of_the_motion():
    x, pair = jax.random.normal(jax.random.key(7), SHAPE), pair_of(draws=1)
    g = np.diff(pair.x0_fake[0] - pair.x0_real[0], axis=1)
    distance = np.abs(np.diff(x, axis=1) - np.diff(pair.x0_real[0], axis=1)).mean(axis=(1, 2, 3, 4), keepdims=True)
    h = np.asarray(frame_weights(jnp.asarray(g / distance)))[..., None, None, None]
    np.testing.assert_allclose(gradient(motion, x, pair) * g[0].size, transposed(h * g / distance), atol=1e-5)
    _, metrics = motion(None, {"action": x}, None, pair=pair)
    np.testing.assert_allclose(metrics["distance"], distance.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient"], np.abs(g / distance).mean(), rtol=1e-5)


def test_the_weights_of_frames():
    g = jnp.sqrt(jnp.asarray([[1.0, 3.0, 4.0]]))[..., None, None, None]
    rising = np.asarray([1.0, 1.2, 1.44])
    expected = 0.7 * (1 + np.asarray([1, 4, 8]) / 8) + 0.3 * rising / rising.mean()
    np.testing.assert_allclose(frame_weights(g), expected[None], rtol=1e-6)


def test_motion_counts_where_both_frames_do():
    mask = jnp.ones(SHAPE[:2]).at[:, :2].set(0.0)
    found = gradient(motion, jax.random.normal(jax.random.key(7), SHAPE), pair_of(mask=mask))
    np.testing.assert_array_equal(found[:, :2], 0.0)
    assert float(jnp.abs(found[:, 2:]).min(axis=(2, 3, 4)).max()) > 0


def test_gaussian_videos_have_no_gradient_at_the_optimum_and_move_there():
    moving = jnp.arange(SHAPE[1], dtype=jnp.float32)[
        None, :, None, None, None
    ]  # a mean that changes from frame to frame
    x = jax.random.normal(jax.random.key(1), SHAPE)

    def of(pace):
        pair = draw_pair(jax.random.key(2), pace * moving + x, gaussian(moving, 1.0), gaussian(pace * moving, 1.0), {})
        return gradient(motion, pace * moving + x, pair)

    assert float(jnp.abs(of(1.0)).max()) < 1e-6
    for pace, sign in ((0.5, -1), (1.5, 1)):  # a student that is too slow is to speed up
        assert np.sign(jnp.sum(of(pace) * moving)) == sign


def first_published(net, batch, key, *, pair):
    """The first code's term: made where no gradient is kept, the video too."""
    x = jax.lax.stop_gradient(batch["action"])
    g = jax.lax.stop_gradient(pair.x0_fake[0] - pair.x0_real[0])
    g = g / jnp.mean(jnp.abs(x - pair.x0_real[0]), axis=(1, 2, 3, 4), keepdims=True)
    return jnp.mean(flow.expand(frame_weights(g), g) * jnp.square(g), axis=(1, 2, 3, 4)), {}


def official_published(net, batch, key, *, pair):
    """The official code's term: differences of latents, g and its weights detached."""
    y = jnp.diff(batch["action"], axis=1)
    g = jnp.diff(pair.x0_fake[0] - pair.x0_real[0], axis=1)
    g = jax.lax.stop_gradient(
        g / jnp.mean(jnp.abs(y - jnp.diff(pair.x0_real[0], axis=1)), axis=(1, 2, 3, 4), keepdims=True)
    )
    return jnp.mean(flow.expand(frame_weights(g), g) * jnp.square(g), axis=(1, 2, 3, 4)), {}


@pytest.mark.parametrize("published", [first_published, official_published])
def test_the_published_forms_train_nothing_and_the_audit_names_them(published):
    x, pair = jax.random.normal(jax.random.key(7), SHAPE), pair_of(draws=1)
    value, _ = published(None, {"action": x}, None, pair=pair)
    assert float(value.min()) > 0
    np.testing.assert_array_equal(gradient(published, x, pair), 0.0)

    def objective(params):
        terms = {"ours": motion, "published": published}
        by_term = {
            name: jnp.mean(loss(None, {"action": params["x"]}, None, pair=pair)[0]) for name, loss in terms.items()
        }
        return sum(by_term.values()), by_term

    with audit.watching() as found:
        value_and_gradients(objective, {"x": x})
    assert audit.idle_terms(found) == ["published"]


def test_stage_2_takes_it_beside_distribution_matching():
    config = tiny.train_config("dmd", sample__sampler="renoise", sample__steps="diagonal-43", sample__shift=5.0)
    config.distill.exit, config.distill.generator_every = "random_but_first", 1
    config.losses.motion = dict(loss="motion", weight=0.5, options={"dynamic": 0.5})
    latent = (4, 4, 4, 16)
    stage, params = tiny.stage_of(config, latent)
    text = jax.random.normal(jax.random.key(0), (2, 6, 8))
    _, metrics = jax.jit(tiny.call_of(stage.parts[0]))(stage.state(params), stage.frozen, {"text": text})
    assert float(metrics["motion"]) > 0 and float(metrics["motion/gradient"]) > 0
    assert int(metrics["exit/0"]) == 3 and int(metrics["exit/1"]) in (0, 1, 2)


def test_what_is_refused():
    one = jnp.zeros((1, 1, 2, 2, 4))
    pair = Pair(one[None], jnp.ones((1, 1, 1)), one[None], one[None], jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="a video of one frame has no motion"):
        motion(None, {"action": one}, None, pair=pair)
    with pytest.raises(UserError, match="option growth is 0"):
        losses.check_options("motion", motion, {"growth": 0})
