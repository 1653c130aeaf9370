"""The oracle reads the truth back from pixels, also through the codec, and accepts nothing else."""

import numpy as np
import pytest

from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.data.sources.moving_shapes import COLOUR_RGB, MovingShapes, draw
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval import oracle


def _sample(count, frames, size=16, split="held_out", seed=1):
    source = MovingShapes(size=size, frames=frames, split=split, seed=seed)
    items, states = [source[i] for i in range(count)], [source.state(i) for i in range(count)]
    return np.stack([item["video"] for item in items]), [item["caption"] for item in items], states


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("size", [16, 32])
def test_truth_is_read_from_raw_and_coded_pixels(size, split):
    video, captions, states = _sample(96, 24, size, split)
    codec = PatchCodec.fit(_sample(256, 4, size, "train", 0)[0])
    position = np.stack([state.position_T2 for state in states])
    for pixels, error in ((video, 0.3), (codec.decode(codec.encode(video)), 0.4)):
        reading = oracle.read(pixels)
        assert oracle.valid(reading, captions).mean() >= 0.99
        assert (reading.shape_VT == np.array([[state.shape] for state in states])).mean() >= 0.99
        assert (reading.colour_VT == np.array([[state.colour] for state in states])).mean() >= 0.99
        assert np.abs(reading.position_VT2 - position).max() < error
        assert np.abs(reading.velocity_VT2[:, 1:] - np.diff(position, axis=1)).max() < 2 * error
        assert not reading.velocity_VT2[:, 0].any()
        assert np.abs(reading.mass_VT - 1).max() < 0.1
    rgb = COLOUR_RGB[[state.colour for state in states]][:, None] / 255
    assert np.abs(oracle.read(video).rgb_VT3 - rgb).max() < 0.05


def test_wrong_videos_are_invalid():
    video, captions, _ = _sample(48, 8)
    rng = np.random.default_rng(0)
    empty, full = np.full_like(video, 20), np.broadcast_to(COLOUR_RGB[0].astype(np.uint8), video.shape)
    two = np.maximum(video, video[:, :, ::-1, ::-1])  # the object and its mirror image
    two = two[np.abs(video.astype(int) - two).max((1, 2, 3, 4)) > 100]
    for name, bad in {"noise": rng.integers(0, 256, video.shape, np.uint8), "empty": empty, "full": full}.items():
        assert oracle.valid(oracle.read(bad), captions).mean() < 0.01, name
    assert oracle.valid(oracle.read(two), captions[: len(two)]).mean() < 0.3
    wrong = captions[1:] + captions[:1]
    assert not oracle.valid(oracle.read(video), wrong).any()
    assert oracle.valid(oracle.read((video * 0.6).astype(np.uint8)), captions).mean() < 0.05  # faded


def test_every_frame_is_read_on_its_own(monkeypatch):
    video, _, _ = _sample(10, 8)
    whole = oracle.read(video)
    monkeypatch.setattr(oracle, "_PIXELS_PER_CHUNK", 16 * 16 * 7)
    chunked = oracle.read(video)
    for name in ("shape_VT", "colour_VT", "position_VT2", "iou_VT", "mass_VT", "rgb_VT3"):
        np.testing.assert_allclose(getattr(whole, name), getattr(chunked, name), atol=1e-4)


def test_object_over_the_border_is_found():
    frame = draw(1, 2, np.array([15.0, 8.0]), 16)
    reading = oracle.read(frame[None, None])
    assert reading.colour_VT[0, 0] == 2 and reading.position_VT2[0, 0, 0] > 12


def test_bad_input():
    video, captions, _ = _sample(3, 4)
    with pytest.raises(UserError, match="16x12"):
        oracle.read(video[:, :, :12])
    with pytest.raises(UserError, match="2 captions for 3 videos"):
        oracle.valid(oracle.read(video), captions[:2])
    with pytest.raises(TypeError, match=r"(?i)uint8"):
        oracle.read(video.astype(np.float32))
