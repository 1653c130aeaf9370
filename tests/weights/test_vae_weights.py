"""Weights of the video autoencoders: names, round trips bit by bit, and what is said of files that do not fit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from greedy_distill_jax.codecs.vae import WanVAE
from greedy_distill_jax.codecs.vae_tiny import TinyVAE
from greedy_distill_jax.distribution.sharding import leaf_paths
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.testing.vae import SMALL, TINY, random_params
from greedy_distill_jax.weights import vae as weights, vae_names

WAYS = {
    "wan-safetensors": (SMALL, "original", "Wan2.1_VAE.safetensors"),
    "wan-pth": (SMALL, "original", "Wan2.1_VAE.pth"),
    "diffusers": (SMALL, "diffusers", "vae"),
    "tiny-safetensors": (TINY, "original", "taew2_1.safetensors"),
    "tiny-pth": (TINY, "original", "taew2_1.pth"),
}


def bits(tree):
    return {path: (x.dtype, x.shape, np.asarray(x).tobytes()) for path, x in leaf_paths(tree)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", list(WAYS))
def test_round_trip(way, dtype, tmp_path):
    vae, form, name = WAYS[way]
    if name.endswith(".pth"):
        pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), random_params(vae))
    weights.write_vae(vae, params, tmp_path / name, form)
    found, back = weights.load_vae(tmp_path / name, vae)
    assert found == vae and bits(back) == bits(params)
    _, wide = weights.load_vae(tmp_path / name, vae, dtype="float32")
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(wide))
    with pytest.raises(UserError, match="exists"):
        weights.write_vae(vae, params, tmp_path / name, form)


def test_foreign_tensors_come_back_bit_by_bit(tmp_path):
    """The other way round: from a file under other names to a tree of ours and to the same file."""
    for vae, naming in ((SMALL, "original"), (SMALL, "diffusers"), (TINY, "original")):
        tensors = weights.foreign_tensors(vae, random_params(vae, seed=4), naming)
        save_file(tensors, tmp_path / f"{naming}.safetensors")
        _, params = weights.load_vae(tmp_path / f"{naming}.safetensors", vae)
        again = weights.foreign_tensors(vae, params, naming)
        assert {n: (x.shape, x.tobytes()) for n, x in again.items()} == {
            n: (x.shape, x.tobytes()) for n, x in tensors.items()
        }


def test_a_diffusers_pipeline_tells_the_sizes(tmp_path):
    params = random_params(SMALL)
    weights.write_vae(SMALL, params, tmp_path / "pipeline" / "vae", "diffusers")
    found, back = weights.load_vae(tmp_path / "pipeline")
    assert found == SMALL and bits(back) == bits(params)
    codec = weights.load_vae_codec(tmp_path / "pipeline")
    assert codec.vae.cfg == dataclasses.replace(SMALL.cfg, dtype="bfloat16") and codec.latent_shape(8, 12) == (2, 3, 4)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(codec.params))


def test_names_of_wan():
    shapes = vae_names.parameter_shapes(WanVAE())
    rows = vae_names.rows(WanVAE())
    named = {row.original: row.foreign_shape(shapes[row.ours]) for row in rows}
    assert len(named) == len({row.diffusers for row in rows}) == 194
    expected = {
        "conv1.weight": (32, 32, 1, 1, 1),
        "conv2.bias": (16,),
        "encoder.downsamples.3.shortcut.weight": (192, 96, 1, 1, 1),
        "encoder.downsamples.5.time_conv.weight": (192, 192, 3, 1, 1),
        "encoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
        "encoder.head.2.weight": (32, 384, 3, 3, 3),
        "decoder.middle.1.norm.gamma": (384, 1, 1),
        "decoder.upsamples.4.residual.2.weight": (384, 192, 3, 3, 3),
        "decoder.upsamples.7.time_conv.weight": (768, 384, 3, 1, 1),
        "decoder.upsamples.11.resample.1.weight": (96, 192, 3, 3),
        "decoder.upsamples.14.residual.3.gamma": (96, 1, 1, 1),
        "decoder.head.2.bias": (3,),
    }
    assert {name: named[name] for name in expected} == expected


def test_names_of_taehv():
    shapes = vae_names.parameter_shapes(TinyVAE())
    named = {row.original: row.foreign_shape(shapes[row.ours]) for row in vae_names.rows(TinyVAE())}
    assert len(named) == 128 and set(shapes) == {row.ours for row in vae_names.rows(TinyVAE())}
    expected = {
        "encoder.0.weight": (64, 3, 3, 3),
        "encoder.2.conv.weight": (64, 128, 1, 1),
        "encoder.3.weight": (64, 64, 3, 3),
        "encoder.4.conv.0.weight": (64, 128, 3, 3),
        "encoder.12.conv.weight": (64, 64, 1, 1),
        "encoder.16.conv.4.bias": (64,),
        "encoder.17.weight": (16, 64, 3, 3),
        "decoder.1.weight": (256, 16, 3, 3),
        "decoder.5.conv.4.weight": (256, 256, 3, 3),
        "decoder.7.conv.weight": (256, 256, 1, 1),
        "decoder.8.weight": (128, 256, 3, 3),
        "decoder.13.conv.weight": (256, 128, 1, 1),
        "decoder.19.conv.weight": (128, 64, 1, 1),
        "decoder.20.weight": (64, 64, 3, 3),
        "decoder.22.bias": (3,),
    }
    assert {name: named[name] for name in expected} == expected


def test_weights_of_a_doubling_in_time_that_is_not_there(tmp_path):
    tensors = weights.foreign_tensors(TINY, random_params(TINY), "original")
    name = "decoder.6.conv.weight"  # the first stage of the small one; it does not double
    longer = {**tensors, name: np.concatenate([tensors[name] + 1, tensors[name]])}
    save_file(longer, tmp_path / "taew2_1.safetensors")
    _, params = weights.load_vae(tmp_path / "taew2_1.safetensors", TINY)
    assert np.array_equal(weights.foreign_tensors(TINY, params, "original")[name], tensors[name])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("decoder.head.2.bias"), "tensor decoder.head.2.bias is missing"),
        (lambda t: t.update({"decoder.head.2.bias": np.zeros(4, np.float32)}), r"has shape \[4\], expected \[3\]"),
        (lambda t: t.update(other=np.zeros(4, np.float32)), "unexpected tensor other"),
        (lambda t: t.pop("decoder.middle.0.residual.0.gamma"), "are not those of Wan's VAE or of TAEHV"),
    ],
    ids=["missing", "shape", "unexpected", "something_else"],
)
def test_files_that_do_not_fit(change, message, tmp_path):
    file = tmp_path / "vae.safetensors"
    weights.write_vae(SMALL, random_params(SMALL), file)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=message) as caught:
        weights.load_vae(file, SMALL)
    assert "\n" not in str(caught.value)


def test_other_bad_requests_are_one_line(tmp_path):
    params, file = random_params(SMALL), tmp_path / "vae.safetensors"
    weights.write_vae(SMALL, params, file)
    weights.write_vae(SMALL, params, tmp_path / "folder", "diffusers")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps({**config, "is_residual": True}))
    for call, message in [
        (lambda: weights.load_vae(tmp_path / "nowhere"), "does not exist"),
        (lambda: weights.load_vae(file), "expected .* for a Wan2.1 VAE"),  # of the real size
        (lambda: weights.load_vae(file, TINY), "holds a Wan VAE, expected a tiny VAE"),
        (lambda: weights.load_vae(file, SMALL, dtype="int8"), "dtype 'int8' is unknown"),
        (lambda: weights.load_vae(tmp_path / "folder"), "describes another VAE"),
        (lambda: weights.write_vae(SMALL, params, tmp_path / "vae.npz"), "neither .pth"),
        (lambda: weights.foreign_tensors(TINY, params, "diffusers"), "has no 'diffusers' names"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
