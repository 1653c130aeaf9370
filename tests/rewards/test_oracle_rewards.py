"""The oracle's rewards on drawn shapes, whose faults are known."""

import numpy as np
import pytest

from greedy_distill_jax import rewards
from greedy_distill_jax.data.sources.moving_shapes import MovingShapes
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.rewards import HostView

FIRST = 4
NAMES = ("validity", "oracle_colour_kept", "direction_kept")


def sample(motion, count=12):
    source = MovingShapes(frames=12, split="held_out", seed=1, motion=motion)
    items = [source[i] for i in range(count)]
    return np.stack([item["video"] for item in items]), [item["caption"] for item in items]


def judge(name, video, captions, later=None):
    """Values of the frames behind the first ones, or of others in their place."""
    reward = rewards.resolve(name)
    return reward(HostView(video[:, FIRST:] if later is None else later, video[:, :FIRST], captions, 8.0))


@pytest.mark.parametrize("motion", ["captioned", "wandering"])
def test_real_videos_keep_everything(motion):
    video, captions = sample(motion)
    validity, colour, direction = (judge(name, video, captions) for name in NAMES)
    assert validity.mean() > 0.98 and colour.min() > -0.03 and direction.min() > 0.8
    assert {x.dtype for x in (validity, colour, direction)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("motion", ["captioned", "wandering"])
def test_what_drifts_loses(motion):
    video, captions = sample(motion)
    later, empty = video[:, FIRST:], np.full_like(video[:, FIRST:], 20)
    other = later[..., [1, 2, 0]]  # every shape in another colour
    assert judge("validity", video, captions, other).mean() < 0.5
    assert judge("oracle_colour_kept", video, captions, other).max() < -0.1
    turned = later.swapaxes(2, 3)  # the other axis
    assert judge("direction_kept", video, captions, turned).mean() < 0.3
    for name in ("validity", "direction_kept"):
        np.testing.assert_array_equal(judge(name, video, captions, empty), 0.0)


def test_a_frozen_video_is_valid_and_keeps_no_direction():
    video, captions = sample("captioned")
    frozen = np.repeat(video[:, FIRST - 1 : FIRST], 6, axis=1)
    assert judge("validity", video, captions, frozen).mean() > 0.98
    np.testing.assert_array_equal(judge("direction_kept", video, captions, frozen), 0.0)


def test_other_captions_are_refused():
    video, _ = sample("captioned", 2)
    with pytest.raises(UserError, match="caption 'a cat' is none of its 51"):
        judge("validity", video, ["a cat", "a dog"])
