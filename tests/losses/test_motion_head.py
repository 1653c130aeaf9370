"""The motion loss in a learned feature, and what the feature is trained by, on problems with a known answer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from greedy_distill_jax.losses.contrast import contrast
from greedy_distill_jax.losses.motion import Head, frame_weights, motion, motion_head
from greedy_distill_jax.losses.pair import Pair
from greedy_distill_jax.models.motion_head import MotionHead, MotionHeadConfig

SHAPE = (3, 5, 3, 4, 4)  # B T H W C
IDENTITY = Head(lambda y: y, lambda y: y)


def pair_of(draws=2, same=False):
    x_sigma, real, fake = jax.random.normal(jax.random.key(0), (3, draws, *SHAPE))
    return Pair(x_sigma, jnp.full((draws, SHAPE[0], 1), 0.5), real, real if same else fake, jnp.ones(SHAPE[:2]))


X = jax.random.normal(jax.random.key(7), SHAPE)


def loss_and_gradient(loss, pair, **options):
    def summed(x):
        loss_B, metrics = loss(None, {"action": x}, None, pair=pair, **options)
        return jnp.sum(loss_B), (loss_B, metrics)

    (_, told), gradient = jax.value_and_grad(summed, has_aux=True)(X)
    return *told, gradient


def network(mix=0.3, layers=2):
    """A head, and parameters of which the last layer is not zero."""
    model = MotionHead(MotionHeadConfig(SHAPE[-1], width=8, layers=layers))
    params = model.init(jax.random.key(1), SHAPE[1:])
    kernel = params["mix"]["kernel"]
    return model, params | {
        "mix": {**params["mix"], "kernel": mix * jax.random.normal(jax.random.key(2), kernel.shape)}
    }


@pytest.mark.parametrize("normalizer", ["real", "none"])
def test_it_starts_as_the_motion_loss(normalizer):
    model = MotionHead(MotionHeadConfig(SHAPE[-1]))
    params = model.init(jax.random.key(1), SHAPE[1:])
    expected = loss_and_gradient(motion, pair_of(), normalizer=normalizer)
    at_start = Head(lambda y: model(params, y), lambda y: model(params, y))
    for head in (IDENTITY, at_start):
        found = loss_and_gradient(motion_head, pair_of(), head=head, normalizer=normalizer)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_its_gradient_passes_through_the_feature_of_the_action_alone():
    """Against the closed form D^T J^T (h g) / size, J of a convolution written out as a matrix."""
    size = int(np.prod(SHAPE[2:]))
    kernels = 0.3 * jax.random.normal(jax.random.key(3), (2, 3, 3, SHAPE[-1], SHAPE[-1]))

    def convolve(kernel, frames):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(frames, kernel, (1, 1), "SAME", dimension_numbers=dimensions)

    units = jnp.eye(size).reshape(size, *SHAPE[2:])
    phi, target = (np.asarray(convolve(kernel, units)).reshape(size, size) for kernel in kernels)  # y -> y @ phi

    def flat(x):
        return np.diff(np.asarray(x), axis=1).reshape(SHAPE[0], SHAPE[1] - 1, size)

    pair = pair_of(draws=1)
    g = (flat(pair.x0_fake[0]) - flat(pair.x0_real[0])) @ target
    g /= np.abs((flat(X) - flat(pair.x0_real[0])) @ target).mean(axis=(1, 2), keepdims=True)
    h = np.asarray(frame_weights(jnp.asarray(g.reshape(SHAPE[0], SHAPE[1] - 1, *SHAPE[2:]))))[..., None]
    back = ((h * g) @ phi.T).reshape(SHAPE[0], SHAPE[1] - 1, *SHAPE[2:]) / g[0].size
    padded = np.pad(back, [(0, 0), (1, 1), (0, 0), (0, 0), (0, 0)])

    def feature(kernel):
        return lambda y: convolve(kernel, y.reshape(-1, *SHAPE[2:])).reshape(y.shape)

    *_, found = loss_and_gradient(motion_head, pair, head=Head(*map(feature, kernels)))
    np.testing.assert_allclose(found, padded[:, :-1] - padded[:, 1:], atol=2e-6)


def test_scores_that_agree_give_no_gradient():
    model, params = network()
    other = jax.tree.map(lambda x: 0.9 * x, params)
    head = Head(lambda y: model(params, y), lambda y: model(other, y))
    loss_B, metrics, gradient = loss_and_gradient(motion_head, pair_of(same=True), head=head)
    np.testing.assert_array_equal(gradient, 0.0)
    np.testing.assert_array_equal(loss_B, 0.0)
    assert float(metrics["gradient"]) == 0 and float(metrics["distance"]) > 0


def test_every_difference_of_frames_is_seen_by_itself():
    model, params = network()
    y = jnp.diff(X, axis=1)
    whole = model(params, y)
    np.testing.assert_allclose(whole[:, 1:2], model(params, y[:, 1:2]), atol=1e-5)
    np.testing.assert_allclose(whole[1:2], model(params, y[1:2]), atol=1e-5)
    assert float(jnp.abs(whole - y).max()) > 0.1


def test_the_contrast_of_known_features():
    basis = jnp.eye(6).reshape(2, 3, 1, 1, 6)
    loss_B, metrics = contrast(basis, 2.0 * basis, temperature=0.5)
    np.testing.assert_allclose(loss_B, -np.log(np.exp(2) / (np.exp(2) + 5)), rtol=1e-5)
    assert float(metrics["accuracy"]) == 1.0
    swapped, metrics = contrast(basis, basis[:, ::-1], temperature=0.5)  # the middle one alone keeps its place
    assert float(metrics["accuracy"]) == pytest.approx(1 / 3) and float(swapped.min()) > float(loss_B.max())
    constant, _ = contrast(jnp.ones_like(basis), basis, temperature=0.5)
    np.testing.assert_allclose(constant, np.log(6), rtol=1e-5)


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (5, 7), (60, 104)])
def test_frames_of_any_size_are_averaged_on_one_grid(grid):
    flat = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 3, 1, 1, 4)), (1, 3, *grid, 4))
    loss_B, _ = contrast(flat, flat)
    same, _ = contrast(flat[:, :, :1, :1], flat[:, :, :1, :1])
    np.testing.assert_allclose(loss_B, same, rtol=1e-4)


def test_still_frames_do_no_harm():
    still = jnp.zeros((1, 3, 4, 4, 2))
    gradient = jax.grad(lambda y: jnp.sum(contrast(y, still)[0]))(still)
    assert bool(jnp.all(jnp.isfinite(gradient)))


def test_a_head_learns_to_recognise_motion_through_noise():
    """Motions in some channels under noise in the others, of one video: the head has to leave the noise out."""
    channels, frames = 6, 8
    model = MotionHead(MotionHeadConfig(channels, width=16, layers=1))
    params = model.init(jax.random.key(0), (frames, 8, 8, channels))
    optimizer = optax.adam(1e-2)
    carries = jnp.asarray([1.0, 1.0, 0.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 1, channels)

    def drawn(key):
        content, *noises = jax.random.split(key, 3)
        # Four by four cells of 2 x 2 latents move together.
        moved, *noise = (jax.random.normal(k, (1, frames, 4, 4, channels)) for k in (content, *noises))
        seen = (0.5 * carries * moved + (1.0 - carries) * n for n in noise)
        return [jnp.repeat(jnp.repeat(y, 2, axis=2), 2, axis=3) for y in seen]

    @jax.jit
    def loss_of(params, ema, key):
        feature, target = drawn(key)
        return jnp.mean(contrast(model(params, feature), model(ema, target))[0])

    @jax.jit
    def update(params, ema, opt_state, key):
        grads = jax.grad(loss_of)(params, ema, key)
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        return params, jax.tree.map(lambda e, p: 0.95 * e + 0.05 * p, ema, params), opt_state

    ema, opt_state, before = params, optimizer.init(params), params
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for i in range(150):
            params, ema, opt_state = update(params, ema, opt_state, jax.random.key(i))
    held = [jax.random.key(1000 + i) for i in range(10)]
    first, last = (np.mean([loss_of(p, e, key) for key in held]) for p, e in ((before, before), (params, ema)))
    assert last < 0.6 * first and last < np.log(frames)
