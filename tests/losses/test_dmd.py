"""Distribution matching on problems with a known answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.diffusion import flow, noise_levels
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses import check_options, resolve
from greedy_distill_jax.losses.dmd import dmd
from greedy_distill_jax.losses.pair import draw_pair
from greedy_distill_jax.testing.gaussian import gaussian

SHAPE = (3, 4, 2, 2, 5)  # B T H W C


def action_gradient(action, key, *, real, fake, normalizer="real", weighting="none", **draw):
    def loss(action):
        batch = {"action": action}
        pair = draw_pair(key, action, real, fake, batch, **draw)
        return jnp.sum(dmd(None, batch, None, pair=pair, normalizer=normalizer, weighting=weighting)[0])

    return jax.grad(loss)(action) * action[0].size


def noised(action, key, **draw):
    """The noise levels and inputs that ``draw_pair`` draws from this key."""
    key_sigma, key_noise = jax.random.split(key)
    sigma = jnp.clip(noise_levels.draw_sigma(key_sigma, (action.shape[0], 1), **draw), 0.02, 0.98)
    return sigma, flow.add_noise(action, jax.random.normal(key_noise, action.shape), sigma)


def test_gradient_is_that_of_the_reverse_kl_between_gaussians():
    # Student N(m, s^2), teacher N(M, S^2). At level sigma their noised versions have mean (1 - sigma) m and variance
    # a^2 = (1 - sigma)^2 s^2 + sigma^2, and d/dx of log p_student / p_teacher at x_sigma is analytic.
    m, s, mean, std = 0.3, 0.8, -0.5, 1.3
    key, key_action = jax.random.split(jax.random.key(0))
    action = m + s * jax.random.normal(key_action, SHAPE)
    g = action_gradient(
        action, key, real=gaussian(mean, std), fake=gaussian(m, s), normalizer="none", weighting="score"
    )
    sigma, x = noised(action, key, shift=5.0)
    e = flow.expand(sigma, x)

    def log_ratio(x, e):
        def log_normal(x, mean, variance):
            return -0.5 * (x - mean) ** 2 / variance - 0.5 * jnp.log(variance)

        def of(mean, std):
            return log_normal(x, (1 - e) * mean, (1 - e) ** 2 * std**2 + e**2)

        return of(m, s) - of(mean, std)

    expected = (1 - e) * jax.grad(lambda x: jnp.sum(log_ratio(x, e)))(x)  # chain rule: dx_sigma / dx = 1 - sigma
    np.testing.assert_allclose(g, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_in_expectation_it_is_the_gradient_of_the_kl_in_the_students_mean(sigma):
    # Equal variances: the two scores differ by a constant, so one draw is the expectation, and
    # KL(sigma) = (1 - sigma)^2 (m - M)^2 / (2 a^2).
    m, mean, std = 0.3, -0.5, 0.7
    action = m + std * jax.random.normal(jax.random.key(1), SHAPE)
    options = dict(real=gaussian(mean, std), fake=gaussian(m, std), normalizer="none", weighting="score")
    g = action_gradient(action, jax.random.key(2), low=sigma, high=sigma, **options)
    kl = jax.grad(lambda m: (1 - sigma) ** 2 * (m - mean) ** 2 / (2 * ((1 - sigma) ** 2 * std**2 + sigma**2)))(m)
    np.testing.assert_allclose(jnp.mean(g), kl, rtol=1e-4)


def test_no_gradient_where_student_and_teacher_agree():
    action = jax.random.normal(jax.random.key(1), SHAPE)
    g = action_gradient(action, jax.random.key(2), real=gaussian(0.0, 1.0), fake=gaussian(0.0, 1.0))
    assert float(jnp.max(jnp.abs(g))) < 1e-6


def test_descending_it_finds_the_teachers_mean():
    action = jax.random.normal(jax.random.key(1), (64, 1, 1, 1, 4))
    mean = jnp.float32(2.0)
    for i in range(200):
        options = dict(real=gaussian(0.0, 1.0), fake=gaussian(mean, 1.0))
        g = action_gradient(mean + action, jax.random.key(i), **options)
        mean = mean - 0.05 * jnp.mean(g)
    assert abs(float(mean)) < 0.15


def test_the_published_normaliser():
    action = jax.random.normal(jax.random.key(1), SHAPE)
    real, fake, key = gaussian(0.5, 1.0), gaussian(0.0, 1.0), jax.random.key(3)
    g = action_gradient(action, key, real=real, fake=fake, shift=5.0)
    sigma, x = noised(action, key, shift=5.0)
    x0_real, x0_fake = (flow.x0_from_velocity(x, net(x, sigma, {}), sigma) for net in (real, fake))
    normaliser = jnp.mean(jnp.abs(action - x0_real), axis=(1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(g, (x0_fake - x0_real) / normaliser, rtol=1e-4, atol=1e-6)
    # Invariant to a common scale of the difference to the teacher: what "normalised" is for.
    assert 0.1 < float(jnp.mean(jnp.abs(g))) < 10


def test_one_level_per_group_of_frames_and_several_draws():
    seen = []

    def score(x, sigma, batch):
        seen.append(sigma)
        return jnp.zeros_like(x)

    action = jax.random.normal(jax.random.key(1), SHAPE)
    pair = draw_pair(jax.random.key(0), action, score, score, {}, group=2)
    loss, metrics = dmd(None, {"action": action}, None, pair=pair)
    assert loss.shape == (3,) and set(metrics) == {"gradient", "distance"}
    assert seen[0].shape == (3, 4)
    np.testing.assert_array_equal(seen[0][:, 0], seen[0][:, 1])
    assert len(np.unique(seen[0])) == 6

    options = dict(real=gaussian(0.5, 1.0), fake=gaussian(0.0, 1.3), normalizer="none")
    key = jax.random.key(4)
    three = action_gradient(action, key, draws=3, **options)
    single = [action_gradient(action, k, **options) for k in jax.random.split(key, 3)]
    np.testing.assert_allclose(three, sum(single) / 3, rtol=1e-4, atol=1e-5)


def test_what_it_refuses():
    action = {"action": jnp.zeros(SHAPE)}
    score = gaussian(0.0, 1.0)
    pair = draw_pair(jax.random.key(0), action["action"], score, score, action)
    with pytest.raises(ValueError, match="normalizer is 'mean'"):
        dmd(None, action, None, pair=pair, normalizer="mean")
    with pytest.raises(ValueError, match="4 frames do not divide into groups of 3"):
        draw_pair(jax.random.key(0), action["action"], score, score, action, group=3)
    for name, said in (("pair", "takes 'pair' from the stage"), ("shift", "has no option 'shift'")):
        with pytest.raises(UserError, match=said):
            check_options("dmd", resolve("dmd"), {name: 1})


def test_skipped_frames_have_no_gradient_and_the_others_keep_the_scale():
    action = jax.random.normal(jax.random.key(1), SHAPE)
    scores = dict(real=gaussian(0.5, 1.0), fake=gaussian(0.0, 1.0), normalizer="none")
    whole, part = (action_gradient(action, jax.random.key(2), skip=skip, **scores) for skip in (0, 1))
    assert float(jnp.abs(part[:, 0]).max()) == 0.0
    np.testing.assert_allclose(part[:, 1:], whole[:, 1:] * 4 / 3, rtol=1e-5)
