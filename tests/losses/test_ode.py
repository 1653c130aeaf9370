"""Regression on a teacher's trajectories with networks whose error is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.losses.motion import frame_weights
from greedy_distill_jax.losses.ode import ode

SHAPE = (3, 4, 2, 2, 5)  # B T H W C
X0, NOISE = jax.random.normal(jax.random.key(0), (2, *SHAPE))
LEVELS = jnp.asarray([1.0, 0.8, 0.4])


def samples_of():
    s = LEVELS[None, :, None, None, None, None]
    states = (1 - s) * X0[:, None] + s * NOISE[:, None]
    return {"latents": X0, "states": states, "levels": jnp.broadcast_to(LEVELS[None], (3, 3))}


def missing_by(error):
    """A network whose estimate of x0 is wrong by so much at every level."""
    return lambda x, sigma, batch: NOISE - X0 - error / sigma[..., None, None, None]


def test_a_level_per_group_and_no_error_for_the_teacher_itself():
    seen = []

    def net(x, sigma, batch):
        seen.append(sigma)
        return NOISE - X0

    loss, metrics = ode(net, None, jax.random.key(0), samples=samples_of(), per_frame=True, group=2, motion=1.0)
    np.testing.assert_allclose(loss, 0.0, atol=1e-10)
    (sigma,) = seen
    np.testing.assert_array_equal(sigma[:, ::2], sigma[:, 1::2])
    assert set(np.unique(sigma)) <= set(np.asarray(LEVELS)) and len(np.unique(sigma)) > 1
    assert float(metrics["first_level"][1]) == float((sigma == 1.0).sum())


@pytest.mark.parametrize("per_frame", [False, True])
def test_both_parts_in_closed_form(per_frame):
    error = jax.random.normal(jax.random.key(1), SHAPE)
    moved = np.diff(error, axis=1)
    h = np.asarray(frame_weights(jnp.asarray(moved)))[..., None, None, None]
    plain, of_motion = (np.mean(x, axis=(1, 2, 3, 4)) for x in (np.square(error), h * np.square(moved)))
    for weight in (0.0, 0.5):
        options = dict(samples=samples_of(), per_frame=per_frame, motion=weight)
        loss, metrics = ode(missing_by(error), None, jax.random.key(2), **options)
        np.testing.assert_allclose(loss, plain + weight * of_motion, rtol=1e-4)
        assert ("motion" in metrics) == (weight > 0)
    np.testing.assert_allclose(metrics["motion"], of_motion.mean(), rtol=1e-4)


def test_an_error_that_all_frames_share_is_none_of_motion():
    error = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (3, 1, *SHAPE[2:])), SHAPE)
    _, metrics = ode(missing_by(error), None, jax.random.key(2), samples=samples_of(), motion=1.0)
    np.testing.assert_allclose(metrics["motion"], 0.0, atol=1e-8)


def test_its_gradient_keeps_the_frame_weights_fixed():
    error = jax.random.normal(jax.random.key(1), SHAPE)
    options = dict(samples=samples_of(), motion=0.5)

    def summed(error):
        return jnp.sum(ode(missing_by(error), None, jax.random.key(2), **options)[0])

    moved = np.diff(error, axis=1)
    back = 0.5 * np.asarray(frame_weights(jnp.asarray(moved)))[..., None, None, None] * 2 * moved / moved[0].size
    padded = np.pad(back, [(0, 0), (1, 1), (0, 0), (0, 0), (0, 0)])
    expected = 2 * np.asarray(error) / error[0].size + padded[:, :-1] - padded[:, 1:]
    np.testing.assert_allclose(jax.grad(summed)(error), expected, atol=1e-5)


def test_a_video_of_one_frame_has_no_motion():
    one = {name: x[:, :1] if name == "latents" else x for name, x in samples_of().items()}
    one["states"] = one["states"][:, :, :1]
    with pytest.raises(ValueError, match="ode: a video of one frame has no motion"):
        ode(lambda x, sigma, batch: x, None, jax.random.key(0), samples=one, motion=1.0)
