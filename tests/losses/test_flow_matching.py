"""The flow-matching loss with networks whose error is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.diffusion import flow, noise_levels
from greedy_distill_jax.losses import resolve
from greedy_distill_jax.losses.flow_matching import flow_matching

B, T = 3, 6
LATENTS = jax.random.normal(jax.random.key(7), (B, T, 2, 2, 4), jnp.float32)
BATCH = {"latents": LATENTS, "text": jnp.zeros((B, 2, 3), jnp.float32)}
KEY = jax.random.key(0)


class Net:
    """Answers the true velocity plus a constant, and remembers what it was asked."""

    def __init__(self, offset=0.0):
        self.offset = offset

    def __call__(self, x, sigma, batch):
        assert batch is BATCH
        self.x, self.sigma = x, sigma
        x0 = jnp.tile(batch["latents"], (1, x.shape[1] // T, 1, 1, 1))
        return flow.velocity_from_x0(x, x0, sigma) + self.offset


def test_it_is_a_built_in():
    assert resolve("flow_matching") is flow_matching


@pytest.mark.parametrize("weighting", ["none", "bell", "x0"])
@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_the_true_velocity_has_no_loss(weighting, distribution):
    loss, metrics = flow_matching(Net(), BATCH, KEY, weighting=weighting, distribution=distribution, per_frame=True)
    assert loss.shape == (B,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    assert set(metrics) == {"low_noise", "high_noise"}


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("weighting", ["none", "bell", "x0"])
def test_a_constant_error_costs_its_square_times_the_weight(weighting, per_frame):
    net = Net(offset=0.5)
    loss, metrics = flow_matching(net, BATCH, KEY, weighting=weighting, per_frame=per_frame, shift=5.0)
    sigma = np.asarray(net.sigma)
    weight = {
        "none": np.ones_like(sigma),
        "bell": np.asarray(noise_levels.bell_weight(net.sigma, 5.0)),
        "x0": sigma**2,
    }[weighting]
    np.testing.assert_allclose(loss, 0.25 * weight.mean(1), rtol=1e-3)
    half = noise_levels.shift_sigma(0.5, 5.0)
    for name, some in (("low_noise", (sigma < half).any()), ("high_noise", (sigma >= half).any())):
        total, count = map(float, metrics[name])
        assert total == pytest.approx(0.25 * count, rel=1e-3) and (count > 0) == some  # not weighted


def test_x0_weighting_is_the_squared_error_of_x0():
    def net(x, sigma, batch):
        return flow.velocity_from_x0(x, batch["latents"] + 0.3, sigma)

    loss, _ = flow_matching(net, BATCH, KEY, weighting="x0", per_frame=True)
    np.testing.assert_allclose(loss, 0.09, rtol=1e-3)


def test_a_net_that_answers_zero_pays_for_the_whole_target():
    batch = {"latents": jnp.full((8, 16, 4, 4, 4), 2.0), "text": None}
    loss, _ = flow_matching(lambda x, sigma, batch: jnp.zeros_like(x), batch, KEY)
    assert float(loss.mean()) == pytest.approx(1.0 + 4.0, rel=0.05)  # variance of the noise, square of the data


def test_levels_of_videos_frames_groups_and_draws():
    net = Net()
    flow_matching(net, BATCH, KEY)
    assert net.sigma.shape == (B, 1) and len(np.unique(net.sigma)) == B and net.x.shape == LATENTS.shape
    flow_matching(net, BATCH, KEY, per_frame=True)
    assert net.sigma.shape == (B, T) and len(np.unique(net.sigma)) > B * T - 3
    flow_matching(net, BATCH, KEY, per_frame=True, group=3)
    grouped = np.asarray(net.sigma).reshape(B, 2, 3)
    assert (grouped == grouped[..., :1]).all() and len(np.unique(grouped)) == 2 * B
    flow_matching(net, BATCH, KEY, per_frame=True, group=2, draws=4)
    assert net.sigma.shape == (B, 4 * T) and net.x.shape == (B, 4 * T, 2, 2, 4)
    assert len(np.unique(np.asarray(net.sigma)[:, ::2])) > 4 * B * T // 2 - 4


def test_draws_are_copies_of_the_video_under_noise_of_their_own():
    net = Net(offset=0.5)
    loss, _ = flow_matching(net, BATCH, KEY, per_frame=True, draws=2)
    np.testing.assert_allclose(loss, 0.25, rtol=1e-3)  # the net finds the velocity of every draw: draws are tiled
    first, second = (np.asarray(net.x)[:, part] for part in (slice(None, T), slice(T, None)))
    assert np.abs(first - second).mean() > 0.1


def test_noise_and_levels_follow_the_key():
    nets = [Net(), Net(), Net()]
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        flow_matching(net, BATCH, jax.random.key(seed))
    np.testing.assert_array_equal(nets[0].x, nets[1].x)
    assert not np.allclose(nets[0].x, nets[2].x) and not np.allclose(nets[0].sigma, nets[2].sigma)


def test_the_gradient_is_that_of_the_mean_square():
    def total(offset):
        return flow_matching(Net(offset), BATCH, KEY)[0].mean()

    assert float(jax.grad(total)(jnp.float32(0.5))) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(weighting="snr"), "weighting is 'snr'"),
        (dict(distribution="beta"), "'beta' is unknown"),
        (dict(low=0.9, high=0.1), "low is 0.9, above high = 0.1"),
        (dict(per_frame=True, group=4), "6 frames do not divide into groups of 4"),
    ],
)
def test_wrong_options_name_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        flow_matching(Net(), BATCH, KEY, **options)
