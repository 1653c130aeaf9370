"""The patch codec: exact where it can be, good on real data, strict about what it reads."""

import numpy as np
import pytest

from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.data.sources.moving_shapes import MovingShapes
from greedy_distill_jax.errors import UserError


def _videos(count, **options):
    source = MovingShapes(**options)
    return np.stack([source[i]["video"] for i in range(count)])


@pytest.fixture(scope="module")
def codec():
    return PatchCodec.fit(_videos(512))


def test_latents_have_the_contract_and_the_scale(codec):
    videos = _videos(256, split="held_out", seed=1)
    latents = codec.encode(videos)
    assert latents.shape == (256, 8, 4, 4, 16) and latents.dtype == np.float32
    assert codec.latent_shape(16, 16) == (4, 4, 16) and codec.temporal_stride == 1
    assert abs(latents.std() - 1) < 0.05 and abs(latents.mean()) < 0.05
    variances = codec.encode(_videos(512)).reshape(-1, 16).var(0)
    assert (np.diff(variances) < 1e-3).all()  # largest first


def test_round_trip_is_good_on_unseen_videos(codec):
    videos = _videos(256, split="held_out", seed=1)
    decoded = codec.decode(codec.encode(videos))
    assert decoded.dtype == np.uint8
    assert 10 * np.log10(255**2 / ((decoded.astype(float) - videos) ** 2).mean()) > 28


def test_all_channels_lose_nothing():
    videos = np.random.default_rng(0).integers(0, 256, (4, 2, 8, 12, 3), np.uint8)
    codec = PatchCodec.fit(videos, patch=2, channels=12)
    np.testing.assert_array_equal(codec.decode(codec.encode(videos)), videos)
    np.testing.assert_array_equal(codec.decode(codec.encode(videos[0, 0])), videos[0, 0])  # any leading axes


def test_one_frame_is_encoded_on_its_own(codec):
    videos = _videos(3)
    np.testing.assert_allclose(codec.encode(videos)[1, 4], codec.encode(videos[1, 4]), atol=1e-6)


def test_fit_is_deterministic_and_saved_exactly(codec, tmp_path):
    again = PatchCodec.fit(_videos(512))
    codec.save(tmp_path / "codec.npz")
    loaded = PatchCodec.load(tmp_path / "codec.npz")
    videos = _videos(8, seed=5)
    for other in (again, loaded):
        np.testing.assert_array_equal(codec.encode(videos), other.encode(videos))
    assert [path.name for path in tmp_path.iterdir()] == ["codec.npz"]


def test_load_refuses_what_is_no_codec(codec, tmp_path):
    path = tmp_path / "codec.npz"
    with pytest.raises(UserError, match="does not exist"):
        PatchCodec.load(path)
    codec.save(path)
    whole = path.read_bytes()
    pickled, missing, misshapen = tmp_path / "p.npz", tmp_path / "m.npz", tmp_path / "s.npz"
    np.savez(pickled, mean=np.array([{}], object), components=codec.components, scale=1.0, patch=4, format=1)
    np.savez(missing, mean=codec.mean)
    np.savez(misshapen, mean=codec.mean, components=codec.components, scale=1.0, patch=8, format=1)
    path.write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("codec")
    for bad in (path, pickled, missing, misshapen, tmp_path / "text.npz", tmp_path):
        with pytest.raises(UserError, match="is not a patch codec"):
            PatchCodec.load(bad)
    with pytest.raises(UserError, match="cannot be written"):
        codec.save(tmp_path / "no" / "codec.npz")


def test_sizes_that_do_not_divide(codec):
    for call in (
        lambda: codec.encode(np.zeros((2, 16, 18, 3), np.uint8)),
        lambda: codec.latent_shape(16, 18),
        lambda: PatchCodec.fit(np.zeros((1, 2, 16, 18, 3), np.uint8)),
    ):
        with pytest.raises(UserError, match=r"18x16.*multiples of 4"):
            call()
    with pytest.raises(UserError, match="without any variation"):
        PatchCodec.fit(np.full((1, 2, 16, 16, 3), 7, np.uint8))
    with pytest.raises(UserError, match="channels=49"):
        PatchCodec.fit(np.zeros((1, 2, 16, 16, 3), np.uint8), channels=49)
    with pytest.raises(UserError, match="8 channels"):
        codec.decode(np.zeros((1, 4, 4, 8), np.float32))
