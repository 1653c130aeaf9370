"""The metrics pass real videos and fail every control that should fail."""

import numpy as np
import pytest

from greedy_distill_jax.data.sources.moving_shapes import MovingShapes
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval import metrics

KEYS = {"direction", "valid_first", "valid_last", "valid_by_frame", "caption", "fd_first", "fd_last"}
KEYS |= {"step_std", "step_std_last", "flicker", "wobble", "colour_change_by_frame"}
KEYS |= {"direction_se", "valid_first_se", "valid_last_se", "caption_se", "flicker_se"}
LISTS = ("valid_by_frame", "colour_change_by_frame")


def _sample(seed, frames=24, count=192):
    source = MovingShapes(frames=frames, split="held_out", seed=seed)
    items = [source[i] for i in range(count)]
    return np.stack([item["video"] for item in items]), [item["caption"] for item in items]


@pytest.fixture(scope="module")
def real():
    return _sample(1)


@pytest.fixture(scope="module")
def reference():
    return _sample(2)[0]


@pytest.fixture(scope="module")
def result(real, reference):
    return metrics.evaluate_videos(*real, reference_VTHWC=reference)


def test_real_videos_pass(result):
    assert set(result) == KEYS
    assert all(isinstance(value, float) for key, value in result.items() if key not in LISTS)
    assert all(len(result[key]) == 24 for key in LISTS) and max(result["colour_change_by_frame"]) < 0.01
    for key in ("direction", "valid_first", "valid_last", "caption"):
        assert result[key] >= 0.99, key
    assert abs(result["step_std"] - 0.635) < 0.05 and abs(result["step_std_last"] - 0.635) < 0.05
    assert result["fd_first"] < 0.02 and result["fd_last"] < 0.02
    assert result["flicker"] < 0.02 and result["wobble"] < 0.05


def test_the_standard_error_of_a_mean():
    values = np.asarray([True, True, True, False])
    assert metrics.standard_error(values) == pytest.approx((0.25 / 4) ** 0.5)  # variance 3/4 * 1/4 * 4/3, of 4 values
    assert np.isnan(metrics.standard_error([1.0])) and np.isnan(metrics.standard_error([]))


def test_permuted_captions_fail(real, reference):
    video, captions = real
    permuted = metrics.evaluate_videos(video, captions[5:] + captions[:5], reference_VTHWC=reference)
    assert permuted["direction"] < 0.5 and permuted["caption"] < 0.1 and permuted["valid_first"] < 0.1


def test_permuted_directions_fail_direction_alone(real, reference):
    video, captions = real
    swap = {"left": "right", "right": "left", "up": "down", "down": "up"}
    turned = [" ".join([*caption.split()[:-1], swap[caption.split()[-1]]]) for caption in captions]
    wrong = metrics.evaluate_videos(video, turned, reference_VTHWC=reference)
    assert wrong["direction"] < 0.01 and wrong["caption"] < 0.01 and wrong["valid_first"] > 0.99


def test_noise_fails(real, reference):
    noise = np.random.default_rng(0).integers(0, 256, real[0].shape, np.uint8)
    noisy = metrics.evaluate_videos(noise, real[1], reference_VTHWC=reference)
    assert noisy["direction"] < 0.1 and noisy["valid_last"] < 0.01 and noisy["fd_first"] > 1
    assert np.isnan(noisy["step_std"]) and np.isnan(noisy["wobble"])


def test_frozen_shuffled_and_blurred_videos_are_told_apart(real, reference, result):
    video, captions = real

    def evaluate(changed):
        return metrics.evaluate_videos(changed, captions, reference_VTHWC=reference)

    frozen = evaluate(np.repeat(video[:, :1], video.shape[1], 1))
    assert frozen["direction"] == 0 and frozen["step_std"] == 0 and frozen["fd_first"] > 2 * result["fd_first"]
    shuffled = evaluate(video[:, np.random.default_rng(0).permutation(video.shape[1])])
    assert shuffled["direction"] < 0.6 and shuffled["fd_first"] > 2 * result["fd_first"]
    means = (video + np.roll(video, 1, 2).astype(int) + np.roll(video, 1, 3)) // 3
    assert evaluate(means.astype(np.uint8))["fd_last"] > 2 * result["fd_last"]
    late = video.copy()
    late[:, -8:] = 20
    gone = evaluate(late)
    assert gone["valid_last"] == 0 and gone["valid_first"] > 0.99 and gone["valid_by_frame"][-8:] == [0] * 8
    flashing = video.copy()
    flashing[:, ::2] = (flashing[:, ::2] * 0.85).astype(np.uint8)
    assert evaluate(flashing)["flicker"] > 5 * result["flicker"]
    shaking = video.copy()
    shaking[:, ::2] = np.roll(np.roll(shaking[:, ::2], 1, 2), 1, 3)
    assert evaluate(shaking)["wobble"] > 0.5


def test_frechet_distance_of_gaussians_with_known_answer():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40000, 3)), 2 * rng.standard_normal((40000, 3)) + np.array([1, 0, 0])
    assert abs(metrics.frechet_distance(a, b) - (1 + 3 * (2 - 1) ** 2)) < 0.1
    assert metrics.frechet_distance(a, a) < 1e-9
    assert metrics.frechet_distance(a[:5, :2], np.ones((4, 2))) > 0  # singular covariances are fine


def test_floor_shrinks_with_the_sample(reference):
    small, large = (metrics.real_vs_real(reference[:n]) for n in (48, 192))
    assert 0 < large < small


def test_features_are_fixed_and_independent_of_the_chunking(real):
    features = metrics.random_conv_features(real[0])
    assert features.shape == (192 * 23, 64) and features.dtype == np.float32
    np.testing.assert_allclose(metrics.random_conv_features(real[0][3:4]), features[3 * 23 : 4 * 23], atol=1e-5)
    covariance = np.cov(features, rowvar=False)
    assert np.linalg.cond(covariance) < 1e6


def test_short_reference_stands_for_both_ends(real, result, reference):
    short = metrics.evaluate_videos(*real, reference_VTHWC=reference[:, :8])
    assert short["fd_first"] == result["fd_first"] and short["fd_last"] < 0.05


def test_bad_input(real, reference):
    video, captions = real
    with pytest.raises(UserError, match="window=32"):
        metrics.evaluate_videos(video, captions, window=32, reference_VTHWC=reference)
    with pytest.raises(UserError, match="same size"):
        metrics.evaluate_videos(video, captions, reference_VTHWC=reference[:, :, :12, :12])
    with pytest.raises(UserError, match="dog"):
        metrics.evaluate_videos(video[:1], ["a dog"], reference_VTHWC=reference)
    with pytest.raises(UserError, match="1 rows"):
        metrics.frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))


def test_wandering_shapes_keep_their_own_colour():
    source = MovingShapes(frames=24, split="held_out", motion="wandering", seed=1)
    video, captions = (list(x) for x in zip(*(source[i].values() for i in range(96)), strict=True))
    video = np.stack(video)
    result = metrics.evaluate_videos(video, captions, reference_VTHWC=video)
    assert np.isnan(result["direction"]) and np.isnan(result["caption"])
    assert result["valid_first"] > 0.99 and result["valid_last"] > 0.99 and result["wobble"] < 0.05
    assert 0.55 < result["step_std"] < 0.75 and max(result["colour_change_by_frame"]) < 0.01

    # Half of the videos turn into others half-way: their colour is no longer the one they began with.
    swapped = video.copy()
    swapped[:48, 12:] = video[1:49, 12:]
    result = metrics.evaluate_videos(swapped, captions, reference_VTHWC=video)
    assert result["valid_first"] > 0.99 and result["valid_last"] < 0.6
    assert result["colour_change_by_frame"][-1] > 0.05 > 0.01 > result["colour_change_by_frame"][0]
