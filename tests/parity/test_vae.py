"""Wan's autoencoder against diffusers' `AutoencoderKLWan`: encoding, decoding, names; float32, random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.codecs.vae import VAEConfig, WanVAE
from greedy_distill_jax.codecs.vae_codec import whole
from greedy_distill_jax.distribution.sharding import leaf_paths
from greedy_distill_jax.testing.vae import SMALL, STATISTICS, WAN, random_params
from greedy_distill_jax.weights import vae as weights, vae_names

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'greedy_distill_jax[parity]'")

TOLERANCE = 5e-5
SIZES = {
    "wan": WAN,
    "small": SMALL,
    "two_stages": WanVAE(VAEConfig(dim=4, multipliers=(1, 2), temporal=(True,), **STATISTICS)),
}


@pytest.fixture(scope="module", params=list(SIZES))
def pair(request, tmp_path_factory):
    """(ours, parameters, the same in diffusers, loaded from the folder that we wrote)."""
    vae = SIZES[request.param]
    params = random_params(vae)
    folder = tmp_path_factory.mktemp(request.param) / "vae"
    weights.write_vae(vae, params, folder, "diffusers")
    other, report = diffusers.AutoencoderKLWan.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return vae, params, other.eval()


def moved(x):
    """Channels last to channels first, or back."""
    return torch.from_numpy(np.array(x)).permute(0, 4, 1, 2, 3) if not torch.is_tensor(x) else x.permute(0, 2, 3, 4, 1)


def test_encode(pair):
    vae, params, other = pair
    cfg, rng = vae.cfg, np.random.default_rng(1)
    frames, side = 1 + 2 * cfg.temporal_stride, cfg.spatial_stride
    video = np.clip(0.5 * rng.standard_normal((2, frames, 3 * side, 2 * side, 3)), -1, 1).astype(np.float32)
    step = jax.jit(functools.partial(vae.encode_step, params))
    ours = np.asarray(whole(step, jnp.asarray(video), 1, cfg.temporal_stride))
    with torch.no_grad():
        mean = moved(other.encode(moved(video)).latent_dist.mode()).numpy()
    theirs = (mean - np.asarray(cfg.mean, np.float32)) / np.asarray(cfg.std, np.float32)
    assert ours.shape == (2, 3, 3, 2, cfg.channels) and 0.2 < theirs.std() < 3
    print("encode", np.abs(ours - theirs).max())
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def test_decode(pair):
    vae, params, other = pair
    cfg, rng = vae.cfg, np.random.default_rng(2)
    latents = rng.standard_normal((2, 4, 2, 3, cfg.channels)).astype(np.float32)
    step = jax.jit(functools.partial(vae.decode_step, params))
    ours = np.asarray(whole(step, jnp.asarray(latents), 1, 1))
    raw = latents * np.asarray(cfg.std, np.float32) + np.asarray(cfg.mean, np.float32)
    with torch.no_grad():
        theirs = moved(other.decode(moved(raw)).sample).numpy()
    assert ours.shape == (2, 1 + 3 * cfg.temporal_stride, 2 * cfg.spatial_stride, 3 * cfg.spatial_stride, 3)
    assert 0.2 < theirs.std() < 1 and (np.abs(theirs) < 1).mean() > 0.5  # most pixels are not clipped
    print("decode", np.abs(ours - theirs).max())
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def test_the_real_size_has_diffusers_tensors():
    with torch.device("meta"):
        other = diffusers.AutoencoderKLWan()
    vae = WanVAE()
    shapes = vae_names.parameter_shapes(vae)
    assert sum(int(np.prod(s)) for s in shapes.values()) == sum(p.numel() for p in other.parameters()) == 126_892_531
    named = {row.diffusers: row.foreign_shape(shapes[row.ours]) for row in vae_names.rows(vae)}
    assert named == {name: tuple(x.shape) for name, x in other.state_dict().items()} and len(named) == 194
    assert (vae.cfg.mean, vae.cfg.std) == (tuple(other.config.latents_mean), tuple(other.config.latents_std))


def test_original_names_are_those_that_diffusers_converts():
    """diffusers' own converter (for checkpoints of Wan 2.1's sizes) takes our original names to our diffusers names."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    vae = WAN
    params = random_params(vae)
    original = {n: torch.from_numpy(np.array(x)) for n, x in weights.foreign_tensors(vae, params, "original").items()}
    converted = convert_wan_vae_to_diffusers(original)
    expected = weights.foreign_tensors(vae, params, "diffusers")
    assert set(converted) == set(expected)
    assert all(np.array_equal(converted[name].numpy(), x) for name, x in expected.items())


def test_every_leaf_has_a_row(pair):
    vae, params, _ = pair
    assert sorted(row.ours for row in vae_names.rows(vae)) == sorted(path for path, _ in leaf_paths(params))
