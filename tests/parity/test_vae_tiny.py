"""The tiny autoencoder against the same in PyTorch, which goes frame by frame; float32, random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.codecs.vae_tiny import TinyVAE, TinyVAEConfig
from greedy_distill_jax.testing.vae import TINY, TorchTaehv, random_params
from greedy_distill_jax.weights import vae as weights

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")

SIZES = {
    "tiny": TINY,
    "other_times": TinyVAE(TinyVAEConfig(6, (8, 6, 4), blocks=1, pool=(True, False), grow=(True, False), channels=3)),
}


@pytest.mark.parametrize("size", list(SIZES))
def test_encode_and_decode(size):
    vae = SIZES[size]
    cfg, params, rng = vae.cfg, random_params(vae), np.random.default_rng(0)
    other = TorchTaehv(weights.foreign_tensors(vae, params, "original"), cfg)
    video = rng.uniform(-1, 1, (2, 3 * cfg.temporal_stride, 2 * cfg.spatial_stride, 3 * cfg.spatial_stride, 3))
    video = video.astype(np.float32)
    _, ours = jax.jit(functools.partial(vae.encode_step, params))(None, jnp.asarray(video))
    theirs = other.encode(torch.from_numpy((video + 1) / 2).permute(0, 1, 4, 2, 3)).permute(0, 1, 3, 4, 2).numpy()
    assert ours.shape == (2, 3, 2, 3, cfg.channels) and theirs.std() > 0.1
    print("encode", np.abs(np.asarray(ours) - theirs).max())
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=2e-5, rtol=0)

    latents = rng.standard_normal((2, 3, 2, 3, cfg.channels)).astype(np.float32)
    _, ours = jax.jit(functools.partial(vae.decode_step, params))(None, jnp.asarray(latents))
    theirs = other.decode(torch.from_numpy(latents).permute(0, 1, 4, 2, 3)).permute(0, 1, 3, 4, 2).numpy()
    assert ours.shape == (2, 1 + 2 * cfg.temporal_stride, *video.shape[2:])
    assert theirs.std() > 0.1 and ((theirs > 0) & (theirs < 1)).mean() > 0.2
    print("decode", np.abs(np.asarray(ours) / 2 + 0.5 - theirs).max())
    np.testing.assert_allclose(np.asarray(ours) / 2 + 0.5, theirs, atol=2e-5, rtol=0)
