"""The mapping table: every parameter has a row, every row a parameter, and the names are the documented ones."""

import numpy as np
import pytest

from greedy_distill_jax.models.students.config import FUSIONS
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.weights import names
from greedy_distill_jax.weights.architecture import parameter_shapes


def foreign(cfg, naming):
    """{name: shape} of a whole model."""
    shapes = parameter_shapes(cfg)
    return {
        name: names.foreign_shape(path, shape, patch=cfg.patch)
        for path, shape in shapes.items()
        for name in names.foreign_names(path, shape, naming)
    }


@pytest.mark.parametrize(
    ("size", "tensors", "parameters", "dim", "ffn"),
    [("wan1_3b", 825, 1_418_996_800, 1536, 8960), ("wan14b", 1_095, 14_288_491_584, 5120, 13824)],
)
@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_real_sizes(size, tensors, parameters, dim, ffn, naming):
    cfg = WanConfig(**WAN_SIZES[size])
    found = foreign(cfg, naming)
    assert len(found) == tensors
    assert sum(int(np.prod(shape)) for shape in found.values()) == parameters
    last = cfg.num_layers - 1
    wanted = {  # rows of the published checkpoints
        "original": {
            "patch_embedding.weight": (dim, 16, 1, 2, 2),
            "text_embedding.0.weight": (dim, 4096),
            "time_projection.1.bias": (6 * dim,),
            f"blocks.{last}.modulation": (1, 6, dim),
            f"blocks.{last}.norm3.weight": (dim,),
            "blocks.0.ffn.0.weight": (ffn, dim),
            "blocks.0.cross_attn.norm_k.weight": (dim,),
            "head.modulation": (1, 2, dim),
            "head.head.weight": (64, dim),
        },
        "diffusers": {
            "patch_embedding.weight": (dim, 16, 1, 2, 2),
            "condition_embedder.text_embedder.linear_1.weight": (dim, 4096),
            "condition_embedder.time_proj.bias": (6 * dim,),
            f"blocks.{last}.scale_shift_table": (1, 6, dim),
            f"blocks.{last}.norm2.weight": (dim,),
            "blocks.0.ffn.net.0.proj.weight": (ffn, dim),
            "blocks.0.attn2.norm_k.weight": (dim,),
            "scale_shift_table": (1, 2, dim),
            "proj_out.weight": (64, dim),
            "blocks.0.attn1.to_out.0.weight": (dim, dim),
        },
    }[naming]
    assert {name: found.get(name) for name in wanted} == wanted


def test_every_row_is_used_and_every_leaf_has_one():
    configs = [tiny.BASE, *(tiny.student_config(fusion=fusion) for fusion in FUSIONS)]
    paths = {path for cfg in configs for path in parameter_shapes(cfg)}
    used = {names.split_path(path)[1] for path in paths}
    assert used == set(names.ROWS)
    assert len({row.original for row in names.ROWS}) == len({row.ours for row in names.ROWS}) == len(names.ROWS)


@pytest.mark.parametrize("path", ["embed/patch/kernel", "blocks/ffn/up/kernel", "blocks/modulation", "head/modulation"])
def test_there_and_back(path):
    shape = parameter_shapes(tiny.BASE)[path]
    one = np.random.default_rng(0).standard_normal(names.layer_shape(path, shape)).astype(np.float32)
    there = names.to_foreign(path, one, patch=tiny.BASE.patch)
    assert there.shape == names.foreign_shape(path, shape, patch=tiny.BASE.patch)
    for index in [(slice(None),) * one.ndim, (slice(0, one.shape[0]), slice(3, 11))]:
        read = there[names.foreign_index(path, index)]
        np.testing.assert_array_equal(names.from_foreign(path, read, index), one[index])


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [
        ("{}.weight", ""),
        ("model.{}.weight", "model."),
        ("_fsdp_wrapped_module.model._fsdp_wrapped_module.{}.weight", "model."),
        ("model._orig_mod._checkpoint_wrapped_module._fsdp_wrapped_module.{}.weight", "model."),
        ("_orig_mod.model.model.{}._orig_mod.weight", "model.model."),
        ("etm.{}.weight", ""),
        ("module.sdd.{}.weight", "module."),
        ("vace_{}.weight", None),
    ],
)
@pytest.mark.parametrize("module", ["patch_embedding", "blocks.0.self_attn.q", "blocks.0.attn1.to_q"])
def test_what_wraps_a_model_is_found(name, wrapper, module):
    found = names.wrappers([names.plain(name.format(module)), "decoder.conv1.weight"])
    assert found == ([] if wrapper is None else [wrapper])


def test_naming_is_recognised():
    assert names.naming_of(foreign(tiny.BASE, "original")) == "original"
    assert names.naming_of(foreign(tiny.BASE, "diffusers")) == "diffusers"
    assert names.naming_of(["etm.bos"]) == "student"
    assert names.naming_of(["encoder.conv1.weight"]) is None
