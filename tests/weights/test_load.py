"""Streaming into a target sharding: same numbers, and never more than one shard on the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.distribution.sharding import leaf_paths, shardings
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.models.wan.linear import compute_precision
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.weights import load as loading, names
from greedy_distill_jax.weights.architecture import parameter_shapes
from greedy_distill_jax.weights.load import load
from greedy_distill_jax.weights.open import open_source
from greedy_distill_jax.weights.pipeline import load_transformer
from greedy_distill_jax.weights.source import Source, TreeSource
from greedy_distill_jax.weights.verify import compare
from greedy_distill_jax.weights.write import write


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(Teacher(tiny.BASE))


@pytest.mark.parametrize("form", ["original", "diffusers"])
@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_sharded_load(params, tmp_path, form, dtype, monkeypatch):
    write(TreeSource(tiny.BASE, params), tmp_path / "out", form, shard_bytes=20_000)
    source = open_source(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*-of-*.safetensors"))) > 2
    sizes, read = {}, source.read
    monkeypatch.setattr(source, "read", lambda p, i, d: sizes.setdefault((p, str(i)), read(p, i, d)))
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    out = load(source, sharding=functools.partial(shardings, mesh=mesh), dtype=dtype)
    for path, leaf in leaf_paths(out):
        original = dict(leaf_paths(params))[path]
        assert leaf.sharding == dict(leaf_paths(shardings(out, mesh)))[path]
        assert leaf.dtype == (jnp.float32 if dtype == "keep" else jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(original.astype(leaf.dtype)), err_msg=path)
        shard = int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        assert {x.size for (p, _), x in sizes.items() if p == path} == {shard}
    assert len(sizes) > len(list(leaf_paths(out)))  # sharded leaves are read piece by piece


def test_only_the_needed_slice_of_a_layer_is_read(params, tmp_path, monkeypatch):
    write(TreeSource(tiny.BASE, params), tmp_path / "out", "original")
    source = open_source(tmp_path / "out")
    shapes, read = [], source._files.read
    monkeypatch.setattr(source._files, "read", lambda name, index: shapes.append(read(name, index)) or shapes[-1])
    source.read("blocks/ffn/up/kernel", (slice(None), slice(6, 12), slice(0, 32)), np.float32)
    assert [x.shape for x in shapes] == [(32, 6)] * 3


class Pattern(Source):
    """Numbers that say where they belong, at any size."""

    path, format = "pattern", "ours"

    def __init__(self, cfg):
        self.cfg, self.meta, self.dtypes = cfg, {}, dict.fromkeys(parameter_shapes(cfg), np.dtype(jnp.bfloat16))

    def read_layer(self, path, layer, index):
        shape = names.layer_shape(path, self.shapes[path])
        row = np.arange(shape[0], dtype=np.float32) % 251 + layer
        return np.broadcast_to(row.reshape(-1, *[1] * (len(shape) - 1)), shape)[index].astype(jnp.bfloat16)


@pytest.mark.slow
def test_one_layer_of_14b_sharded():
    cfg = WanConfig(**{**WAN_SIZES["wan14b"], "num_layers": 1})
    source = Pattern(cfg)
    out = load(source, sharding=functools.partial(shardings, mesh=make_mesh({"fsdp": 2, "tensor": 4})))
    for path, leaf in leaf_paths(out):
        assert leaf.shape == source.shapes[path]
        shard = leaf.addressable_shards[-1]
        index = shard.index[1:] if names.split_path(path)[1].stacked else shard.index
        wanted = source.read_layer(path, 0, index)
        np.testing.assert_array_equal(np.asarray(shard.data).reshape(wanted.shape), wanted, err_msg=path)
    assert out["blocks"]["ffn"]["up"]["kernel"].addressable_shards[0].data.shape == (1, 2560, 3456)


def test_the_kernels_of_a_model_folder_are_in_the_precision_of_their_layers(params, tmp_path):
    write(TreeSource(tiny.BASE, params), tmp_path / "transformer", "diffusers")
    _, found = load_transformer(tmp_path, dtype="bfloat16")
    wanted = dict(leaf_paths(compute_precision(params, "bfloat16")))
    assert {path: leaf.dtype for path, leaf in leaf_paths(found)} == {path: x.dtype for path, x in wanted.items()}
    assert wanted["head/projection/kernel"].dtype == jnp.float32 != wanted["blocks/ffn/up/kernel"].dtype
    for path, leaf in leaf_paths(found):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(wanted[path]), err_msg=path)


def test_compare_names_the_tensor_that_differs(params):
    changed = jax.tree.map(np.array, params)
    changed["blocks"]["ffn"]["up"]["kernel"][1, 2, 3] += 0.5
    a, b = TreeSource(tiny.BASE, params), TreeSource(tiny.BASE, changed)
    assert compare(a, a) == []
    (difference,) = compare(a, b)
    assert difference.name == "blocks.1.ffn.0.weight" and abs(difference.largest - 0.5) < 1e-6
    changed["blocks"]["ffn"]["up"]["kernel"][1, 2, 3] = np.nan
    assert np.isnan(compare(a, TreeSource(tiny.BASE, changed))[0].largest)
    half = TreeSource(tiny.BASE, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    assert len(compare(a, half)) == sum(len(names.foreign_names(p, s, "original")) for p, s in a.shapes.items())
    other = tiny.dataclasses.replace(tiny.BASE, num_layers=2)
    with pytest.raises(UserError, match="different parameters"):
        compare(a, TreeSource(other, tiny.random_params(Teacher(other))))


def test_unknown_dtype(params):
    with pytest.raises(UserError, match="float8"):
        loading.load(TreeSource(tiny.BASE, params), dtype="float8")
