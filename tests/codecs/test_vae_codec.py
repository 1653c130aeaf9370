"""The video autoencoders as streams and as codecs (their numbers are tested in tests/parity)."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.codecs.protocol import StreamDecoder, VideoCodec
from greedy_distill_jax.codecs.tiles import Tiles, tiled
from greedy_distill_jax.codecs.vae import VAEConfig, WanVAE
from greedy_distill_jax.codecs.vae_codec import VAECodec, to_pixels, whole
from greedy_distill_jax.codecs.vae_tiny import TinyVAE, TinyVAEConfig
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.testing.vae import SMALL, TINY, random_params

VAES = {"wan": SMALL, "tiny": TINY}


@pytest.fixture(scope="module", params=list(VAES))
def given(request):
    """(autoencoder, parameters, latents of four frames)."""
    vae = VAES[request.param]
    latents = np.random.default_rng(0).standard_normal((2, 4, 3, 2, vae.cfg.channels)).astype(np.float32)
    return vae, random_params(vae), jnp.asarray(latents)


def videos(vae, latent_frames, seed=1, batch=(2,), grid=(3, 2)):
    """uint8 videos that encode to so many latent frames."""
    side, frames = vae.cfg.spatial_stride, 1 + (latent_frames - 1) * vae.cfg.temporal_stride
    shape = (*batch, frames, grid[0] * side, grid[1] * side, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def streamed(step, x, sizes):
    """Outputs of a jitted step over parts of x of the given numbers of frames."""
    cache, outs, start = None, [], 0
    for size in sizes:
        cache, out = step(cache, x[:, start : start + size])
        outs.append(np.asarray(out))
        start += size
    assert start == x.shape[1]
    return np.concatenate(outs, axis=1)


def test_decoding_as_a_stream_equals_decoding_the_whole(given):
    vae, params, latents = given
    step = functools.partial(vae.decode_step, params)
    full = np.asarray(jax.jit(lambda z: whole(step, z, 1, 1))(latents))
    np.testing.assert_allclose(streamed(jax.jit(step), latents, (1, 1, 1, 1)), full, atol=1e-6, rtol=0)
    # Several latent frames in a step are other convolutions: the same up to the order of sums.
    np.testing.assert_allclose(streamed(jax.jit(step), latents, (1, 3)), full, atol=1e-5, rtol=0)


def test_encoding_as_a_stream_equals_encoding_the_whole(given):
    vae, params, _ = given
    first, stride = vae.first_frames, vae.cfg.temporal_stride
    rng = np.random.default_rng(3)
    video = jnp.asarray(rng.uniform(-1, 1, (2, first + 2 * stride, 16, 8, 3)), jnp.float32)
    step = functools.partial(vae.encode_step, params)
    full = np.asarray(jax.jit(lambda x: whole(step, x, first, stride))(video))
    np.testing.assert_allclose(streamed(jax.jit(step), video, (first, stride, stride)), full, atol=1e-6, rtol=0)
    np.testing.assert_allclose(streamed(jax.jit(step), video, (first, 2 * stride)), full, atol=1e-5, rtol=0)


def test_the_tiny_one_in_parallel_equals_in_sequence():
    """Other shapes of convolutions, other orders of sums: pixels reach from -1 to 1, latents further."""
    params, rng = random_params(TINY), np.random.default_rng(0)
    latents = jnp.asarray(rng.standard_normal((2, 4, 3, 2, 4)), jnp.float32)
    decode, encode = (jax.jit(functools.partial(f, params)) for f in (TINY.decode_step, TINY.encode_step))
    parallel = np.asarray(decode(None, latents)[1])
    assert parallel.shape == (2, 13, 24, 16, 3)
    np.testing.assert_allclose(streamed(decode, latents, (1, 1, 1, 1)), parallel, atol=5e-6, rtol=0)
    video = jnp.asarray(rng.uniform(-1, 1, (2, 12, 24, 16, 3)), jnp.float32)
    parallel = np.asarray(encode(None, video)[1])
    np.testing.assert_allclose(streamed(encode, video, (4, 4, 4)), parallel, atol=5e-6, rtol=0)


def test_a_frame_depends_on_no_later_one(given):
    vae, params, latents = given
    codec = VAECodec(vae, params)
    changed = latents.at[:, 2:].add(1.0)
    before, after = codec.decode(np.asarray(latents)), codec.decode(np.asarray(changed))
    unchanged = 1 + vae.cfg.temporal_stride
    assert np.array_equal(before[:, :unchanged], after[:, :unchanged])
    assert not np.array_equal(before[:, unchanged:], after[:, unchanged:])


def test_the_cache_is_given_away_and_keeps_its_size(given):
    vae, params, latents = given
    codec = VAECodec(vae, params)
    decode_next = jax.jit(codec.decode_next, donate_argnums=1)
    state, frames = decode_next(codec.params, codec.open_decoder(), latents[:, 0])
    assert frames.shape == (2, 1, 3 * vae.cfg.spatial_stride, 2 * vae.cfg.spatial_stride, 3)
    shapes = jax.tree.map(jnp.shape, state)
    for i in (1, 2, 3):
        old = jax.tree.leaves(state)
        state, frames = decode_next(codec.params, state, latents[:, i])
        assert frames.shape[1] == vae.cfg.temporal_stride and frames.dtype == jnp.uint8
        assert jax.tree.map(jnp.shape, state) == shapes and all(x.is_deleted() for x in old)
    assert decode_next._cache_size() == 2  # the first frame, and all others


def test_a_codec_encodes_decodes_and_streams(given):
    vae, params, _ = given
    codec = VAECodec(vae, params)
    assert isinstance(codec, VideoCodec)
    video = videos(vae, 3, batch=(2, 1))
    latents = codec.encode(video)
    assert latents.shape == (2, 1, 3, *codec.latent_shape(*video.shape[-3:-1])) and latents.dtype == np.float32
    back = codec.decode(latents)
    assert back.shape == video.shape and back.dtype == np.uint8
    assert np.array_equal(codec.decode(latents[0, 0]), back[0, 0])
    decode = StreamDecoder(codec)
    frames = [decode(jnp.asarray(latents[:, 0, chunk])) for chunk in (slice(0, 2), slice(2, 3))]
    levels = np.abs(np.concatenate(frames, 1).astype(int) - back[:, 0].astype(int))
    assert levels.max() <= 1 and levels.mean() < 1e-3  # a rounding may fall the other way


def test_a_stream_needs_no_encoder(given):
    vae, params, latents = given
    codec = VAECodec(vae, {"decoder": params["decoder"]})
    assert codec.decode(np.asarray(latents)).shape[:2] == (2, 1 + 3 * vae.cfg.temporal_stride)


def test_the_patch_codec_streams_as_it_decodes():
    rng = np.random.default_rng(0)
    codec = PatchCodec.fit(rng.integers(0, 256, (4, 3, 8, 8, 3), dtype=np.uint8))
    assert isinstance(codec, VideoCodec)
    latents = codec.encode(rng.integers(0, 256, (2, 3, 8, 12, 3), dtype=np.uint8))
    levels = np.abs(StreamDecoder(codec)(jnp.asarray(latents)).astype(int) - codec.decode(latents).astype(int))
    assert levels.max() <= 1 and levels.mean() < 1e-2


def test_pixels():
    values = jnp.asarray([-2.0, -1.0, 0.0, 1.0, 2.0], jnp.float32)
    assert to_pixels(values).tolist() == [0, 0, 128, 255, 255]


def test_bad_inputs_are_one_line(given):
    vae, params, _ = given
    codec = VAECodec(vae, params)
    side = vae.cfg.spatial_stride
    for call, part in [
        (lambda: codec.encode(np.zeros((vae.cfg.temporal_stride, side, side, 3), np.uint8)), "use 1 +"),
        (lambda: codec.encode(np.zeros((1, side, side + 1, 3), np.uint8)), f"multiples of {side}"),
        (lambda: codec.decode(np.zeros((1, 1, 1, 5), np.float32)), "5 channels"),
        (lambda: codec.decode_next(params, None, jnp.zeros((1, 1, 1, 5))), "5 channels"),
    ]:
        with pytest.raises(UserError, match=part) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="takes one"):
        SMALL.decode_step(random_params(SMALL), None, jnp.zeros((1, 2, 1, 1, 4)))
    with pytest.raises(ValueError, match="takes one"):
        SMALL.encode_step(random_params(SMALL), None, jnp.zeros((1, 2, 4, 4, 3)))
    with pytest.raises(ValueError, match="one entry less"):
        VAEConfig(temporal=(True,))
    with pytest.raises(ValueError, match="need 8 entries"):
        VAEConfig(channels=8)
    with pytest.raises(ValueError, match="one stage less"):
        TinyVAEConfig(pool=(True, True, True))


@pytest.mark.parametrize("vae", [SMALL, TINY], ids=["wan", "tiny"])
def test_half_precision_is_near(vae):
    params = random_params(vae)
    latents = np.random.default_rng(0).standard_normal((1, 3, 3, 2, 4)).astype(np.float32)
    half = type(vae)(dataclasses.replace(vae.cfg, dtype="bfloat16"))
    exact, near = (VAECodec(v, params).decode(latents).astype(int) for v in (vae, half))
    assert 0 < np.abs(exact - near).mean() < 3  # of 255 levels


# --- tiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extent", [3, 8, 9, 13, 30])
@pytest.mark.parametrize("size, overlap", [(8, 3), (5, 4), (4, 1)])
def test_tiles_cover_and_their_weights_sum_to_one(extent, size, overlap):
    tiles, scale = Tiles((size, size), overlap), 2
    starts, weights = tiles.starts(extent, 0), tiles.weights(extent, 0, scale)
    assert starts[0] == 0 and starts[-1] == max(extent - size, 0)
    assert all(b - a <= size - overlap for a, b in itertools.pairwise(starts))
    total = np.zeros(extent * scale)
    for start, weight in zip(starts, weights, strict=True):
        total[start * scale : start * scale + len(weight)] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_tiles_of_a_pointwise_step_change_nothing():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 13, 6, 4)), jnp.float32)

    def step(cache, x):
        return (0 if cache is None else cache + 1), jnp.repeat(jnp.repeat(2 * x, 2, 2), 2, 3)

    run = tiled(step, Tiles((5, 4), 2), 1, 2)
    cache, out = run(None, x)
    np.testing.assert_allclose(out, step(None, x)[1], atol=1e-6, rtol=0)
    assert cache.shape == (8,)  # 4 rows of 2 tiles


def test_large_tiles_are_the_whole_frame(given):
    vae, params, latents = given
    for tiles in (Tiles((3, 2), 1), Tiles((8, 8), 2)):
        ours = VAECodec(vae, params, tiles).decode(np.asarray(latents))
        levels = np.abs(ours.astype(int) - VAECodec(vae, params).decode(np.asarray(latents)).astype(int))
        assert levels.max() <= 1 and levels.mean() < 1e-3


def test_tiles_equal_the_whole_frame_away_from_their_borders():
    """The tiny decoder sees at most 13 latent pixels to a side, and only the first tile covers the first ten."""
    params = random_params(TINY)
    latents = np.random.default_rng(0).standard_normal((1, 2, 4, 40, 4)).astype(np.float32)
    full, ours = (VAECodec(TINY, params, tiles).decode(latents).astype(int) for tiles in (None, Tiles((4, 30), 2)))
    assert np.abs(full - ours)[..., : 10 * 8, :].max() <= 1
    assert np.abs(full - ours).mean() < 2


def test_tiles_stream_and_encode(given):
    vae, params, _ = given
    codec = VAECodec(vae, params, Tiles((4, 3), 1))
    video = videos(vae, 2, grid=(6, 5), batch=(1,))
    latents = codec.encode(video)
    assert latents.shape == (1, 2, 6, 5, vae.cfg.channels)
    levels = np.abs(StreamDecoder(codec)(jnp.asarray(latents)).astype(int) - codec.decode(latents).astype(int))
    assert levels.max() <= 1 and levels.mean() < 1e-3


def test_sizes_of_the_real_ones():
    for vae, grid, count in ((WanVAE(), (60, 104, 16), 126_892_531), (TinyVAE(), (60, 104, 16), None)):
        codec = VAECodec(vae, None)
        assert codec.latent_shape(480, 832) == grid and codec.temporal_stride == 4
        if count:
            shapes = jax.eval_shape(vae.init, jax.random.key(0))
            assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes)) == count
