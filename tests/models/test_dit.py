"""The Wan DiT: exact sizes, RoPE, noise levels, what the teacher sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError

from greedy_distill_jax.models.students.config import StudentConfig, split_layers
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.models.wan import rope
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.models.wan.dit import Dit, Teacher
from greedy_distill_jax.models.wan.layers import Layout, sinusoid
from greedy_distill_jax.testing import tiny

WAN = [("wan1_3b", 1_418_996_800, 46_440_704), ("wan14b", 14_288_491_584, 351_394_304)]


@pytest.mark.parametrize("size, total, block", WAN)
def test_parameter_counts_are_wans(size, total, block):
    teacher = Teacher(WanConfig(**WAN_SIZES[size]))
    shapes = jax.eval_shape(lambda k: teacher.init(k, (1, 4, 4, 16)), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == total
    assert sum(x.size for x in jax.tree.leaves(shapes["blocks"])) == block * teacher.cfg.num_layers


def test_student_at_1_3b_has_the_size_of_the_specification():
    base = WanConfig(**WAN_SIZES["wan1_3b"])
    etm, sdd = split_layers("interleaved", base.num_layers)
    student = Student(StudentConfig(base=base, etm_layers=etm, sdd_layers=sdd, fusion="xattn2"))
    shapes = jax.eval_shape(lambda k: student.init(k, (1, 4, 4, 16)), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == pytest.approx(1.52e9, rel=0.005)


def test_rope_split_and_angles():
    assert rope.split_pairs(128) == (22, 21, 21) and rope.split_pairs(48) == (8, 8, 8)
    table = rope.rope_table(np.asarray([5]), (2, 3), 128)
    token = 1 * 3 + 2  # row 1, column 2
    expected = [p * 10_000.0 ** (-2 * j / d) for p, d in ((5, 44), (1, 42), (2, 42)) for j in range(d // 2)]
    np.testing.assert_allclose(table.cos[token], np.cos(expected), atol=1e-6)
    np.testing.assert_allclose(table.sin[token], np.sin(expected), atol=1e-6)


@pytest.mark.parametrize("frame", [0, 7, 1023, 1024, 5000, 1_000_000])
def test_traced_positions_are_as_exact_as_static_ones(frame):
    static = rope.rope_table(np.asarray([frame]), (1, 1), 48)
    traced = jax.jit(lambda f: rope.rope_table(f, (1, 1), 48))(jnp.asarray([frame], jnp.int32))
    np.testing.assert_allclose(traced.cos, static.cos, atol=5e-7)
    np.testing.assert_allclose(traced.sin, static.sin, atol=5e-7)


def test_rotation_depends_on_differences_only():
    x, y = (jax.random.normal(jax.random.key(i), (1, 1, 1, 48)) for i in range(2))

    def dot(a, b):
        return float(
            jnp.sum(
                rope.apply_rope(x, rope.rope_table(np.asarray([a]), (1, 1), 48))
                * rope.apply_rope(y, rope.rope_table(np.asarray([b]), (1, 1), 48))
            )
        )

    assert dot(3, 10) == pytest.approx(dot(1003, 1010), abs=1e-5)
    assert abs(dot(3, 10) - dot(3, 11)) > 1e-3


@pytest.mark.parametrize("t", [0.0, 0.25, 4.98, 357.14, 999.5, 1000.0])
def test_sinusoid_is_float64_accurate(t):
    frequency = 10_000.0 ** (-np.arange(128) / 128)
    expected = np.concatenate([np.cos(np.float32(t) * frequency), np.sin(np.float32(t) * frequency)])
    np.testing.assert_allclose(sinusoid(jnp.asarray(t, jnp.float32), 256), expected, atol=3e-7)


@pytest.fixture(scope="module")
def teacher():
    model = Teacher(tiny.BASE)
    return jax.jit(model), tiny.random_params(model)


def test_one_level_per_video_equals_equal_levels_per_frame(teacher):
    model, params = teacher
    x, text = jax.random.normal(jax.random.key(2), (2, 3, 4, 4, 4)), tiny.text_rows(2, jax.random.key(3))
    once = model(params, x, jnp.asarray([[0.3], [0.9]]), text)
    each = model(params, x, jnp.repeat(jnp.asarray([[0.3], [0.9]]), 3, axis=1), text)
    np.testing.assert_allclose(once, each, atol=1e-5)
    assert float(jnp.abs(once - model(params, x, jnp.asarray([[0.3], [0.5]]), text))[1].max()) > 1e-3


def test_every_frame_sees_every_frame_and_the_text(teacher):
    model, params = teacher
    x, text = jax.random.normal(jax.random.key(2), (1, 3, 4, 4, 4)), tiny.text_rows(1, jax.random.key(3))
    sigma = jnp.asarray([[0.5]])
    base = model(params, x, sigma, text)
    for frame in range(3):
        change = jnp.abs(model(params, x.at[:, frame].add(1.0), sigma, text) - base).max(axis=(0, 2, 3, 4))
        assert jnp.all(change > 1e-4), f"frame {frame} is not seen everywhere: {change}"
    assert float(jnp.abs(model(params, x, sigma, text + 1.0) - base).max()) > 1e-4


def test_padded_text_rows_are_attended(teacher):
    """No key mask in cross-attention: zero rows become MLP(0) and take part (docs/method.md, section 2.2)."""
    model, params = teacher
    x = jax.random.normal(jax.random.key(2), (1, 3, 4, 4, 4))
    text = tiny.text_rows(1, jax.random.key(3)).at[:, 1:].set(0.0)
    shorter = model(params, x, jnp.asarray([[0.5]]), text[:, :1])
    assert float(jnp.abs(model(params, x, jnp.asarray([[0.5]]), text) - shorter).max()) > 1e-4


def test_bfloat16_keeps_float32_weights_and_stays_close(teacher):
    import dataclasses

    model, params = teacher
    half = Teacher(dataclasses.replace(tiny.BASE, dtype="bfloat16", remat="full"))
    shapes = jax.eval_shape(lambda k: half.init(k, (3, 4, 4, 4)), jax.random.key(0))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(shapes))
    x, text = jax.random.normal(jax.random.key(2), (1, 3, 4, 4, 4)), tiny.text_rows(1, jax.random.key(3))
    exact, rounded = (m(params, x, jnp.asarray([[0.9]]), text) for m in (model, half))
    assert rounded.dtype == jnp.float32
    assert float(jnp.linalg.norm(exact - rounded) / jnp.linalg.norm(exact)) < 0.05


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prediction="noise"), "choose from"),
        (dict(num_heads=5), "multiple of num_heads"),
        (dict(remat="some"), "remat"),
    ],
)
def test_bad_config_names_the_value(change, message):
    with pytest.raises(ValueError, match=message):
        WanConfig(**change)


def test_a_parameter_of_another_shape_is_named(teacher):
    model, params = teacher
    wrong = {**params, "head": {**params["head"], "modulation": jnp.zeros((2, 7))}}
    x, text = jnp.zeros((1, 2, 4, 4, 4)), tiny.text_rows(1, jax.random.key(0))
    with pytest.raises(ScopeParamShapeError, match=r'"modulation" in "/head".*\(2, 24\).*\(2, 7\)'):
        jax.eval_shape(model, wrong, x, jnp.ones((1, 1)), text)


def test_a_pass_that_writes_keys_computes_no_more_of_the_last_block():
    """FLOPs of the compiled program: of a loop one body is counted, and all of it would be run for the last block."""
    cfg = dataclasses.replace(tiny.BASE, remat="none")
    x, text, sigma = jnp.ones((1, 2, 8, 8, cfg.channels)), jnp.ones((1, cfg.text_len, cfg.text_dim)), jnp.ones((1, 1))
    table, options = rope.rope_table(np.arange(2), (4, 4), cfg.head_dim), dict(emit=("own",), with_head=False)

    def flops(depth):
        network = Dit(cfg, depth, Layout.full(2, 16), **options)
        params = jax.eval_shape(lambda key: network.init(key, x, sigma, text, rope_q=table), jax.random.key(0))
        call = jax.jit(lambda params: network.apply(params, x, sigma, text, rope_q=table)[1])
        unfused = {"xla_disable_hlo_passes": "fusion"}  # elementwise work that is fused twice would be counted twice
        return call.lower(params).compile(unfused).cost_analysis()["flops"]

    one, two, three = map(flops, (1, 2, 3))
    assert three - two == pytest.approx(two - one, rel=0.02) and two > 1.5 * one
