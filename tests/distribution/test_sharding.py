"""The one table, and 8 virtual devices against one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.distribution.parallel import check_columns, on_mesh
from greedy_distill_jax.distribution.sharding import RULES, TABLE, leaf_paths, rows_of, shardings
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students.config import FUSIONS
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.streaming.loop import draw_noise
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.testing import tiny

LATENT = (4, 4, 4, 16)


def _state_shapes(config):
    stage, params = tiny.stage_of(config, LATENT)
    return {"state": jax.eval_shape(stage.state, params), "frozen": stage.frozen}


def _stream_shapes(cfg, context_sigma=0.0):
    student = make_student(cfg)
    streamer = make_streamer(student, StepPlan(((1.0, 0.5),), "renoise", (context_sigma,)))
    params = jax.eval_shape(lambda key: student.init(key, (1, 4, 4, 4)), jax.random.key(0))
    text = jax.ShapeDtypeStruct((1, cfg.base.text_len, cfg.base.text_dim), jnp.float32)
    return jax.eval_shape(
        lambda p, t, k: streamer.init(p, t, k, (4, 4, 4)), params, text, jax.random.split(jax.random.key(0), 1)
    )


def _episode_shapes():
    """What the parts of stage rl hand on."""
    config = tiny.train_config("rl", student_from="a run", text_dropout=0.0, student__context="last_step_kv")
    with config.unlocked():
        del config.losses["flow_matching"]
        config.losses.nft = dict(loss="nft", weight=1.0, options={})
        config.rl.rewards.still = dict(reward="flicker", weight=1.0)
    stage, _ = tiny.stage_of(config, (4, 4, 4, 16))
    return dict(stage.parts[-1].takes)


def test_every_leaf_matches_exactly_one_row_and_no_row_is_dead():
    trees = [_state_shapes(tiny.train_config(optimizer__name=name)) for name in ("adamw", "muon")]
    trees += [_state_shapes(tiny.train_config("teacher_forcing", student__fusion=f)) for f in FUSIONS]
    trees.append(_state_shapes(tiny.train_config(optimizer__lora__rank=2)))
    trees += [_state_shapes(tiny.train_config("dmd", distill__real=real)) for real in ("joint", "autoregressive")]
    trees.append(_state_shapes(tiny.train_config("teacher_forcing", student__kind="causal")))
    head = dict(losses__motion=dict(loss="motion_head", weight=1.0, options={}), motion_head__optimizer__name="muon")
    trees.append(_state_shapes(tiny.train_config("dmd", **head)))
    trees.append({"latents": jnp.zeros((1,) * 5), "states": jnp.zeros((1,) * 6), "text": jnp.zeros((1, 1, 1))})
    trees += [_stream_shapes(cfg) for cfg in (tiny.student_config(context="fused"), tiny.causal_config(recache=True))]
    trees.append(_stream_shapes(tiny.student_config(etm_input="clean"), 0.357))
    trees.append(_episode_shapes())
    seen = set()
    for tree in trees:
        for path, leaf in leaf_paths(tree):
            rows = rows_of(path)
            assert len(rows) == 1, (path, rows)
            assert len(TABLE[rows[0]][1]) == leaf.ndim, (path, leaf.shape)
            seen.add(rows[0])
    assert seen == set(range(len(TABLE))), [TABLE[i] for i in set(range(len(TABLE))) - seen]


def test_keys_of_noise_go_with_their_videos_and_one_for_all_is_everywhere():
    mesh, key = make_mesh({"data": 4}, jax.devices()[:4]), jax.random.key(0)
    many, one = shardings({"key": jax.random.split(key, 8)}, mesh), shardings({"key": key}, mesh)
    assert (many["key"].spec, one["key"].spec) == (PartitionSpec(("data", "fsdp")), PartitionSpec())
    keys = jax.random.split(key, 8)
    spread = jax.jit(lambda k: draw_noise(k, 1, (8, 1, 2, 2, 2)))(jax.device_put(keys, many["key"]))
    np.testing.assert_array_equal(spread, draw_noise(keys, 1, (8, 1, 2, 2, 2)))


def test_a_leaf_without_a_row_is_an_error():
    with pytest.raises(ValueError, match="matches rows"):
        shardings({"blocks": {"mystery": jnp.zeros(3)}}, make_mesh({"data": -1}))


def test_two_dimensions_never_share_a_mesh_axis():
    for _, logical in TABLE:
        RULES.spec(logical)
    with pytest.raises(ValueError, match="share a mesh axis"):
        RULES.spec(("embed", "embed"))


@pytest.mark.parametrize("shape", [dict(data=3), dict(data=-1, fsdp=-1), dict(data=0), dict(data=16)])
def test_a_mesh_that_does_not_fit_names_the_devices(shape):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(shape)


MESHES = [dict(data=8), dict(data=2, fsdp=4), dict(fsdp=2, context=2, tensor=2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, kind, meshes",
    [
        ("teacher", "etm_sdd", MESHES),
        ("teacher_forcing", "etm_sdd", MESHES),
        ("dmd", "etm_sdd", MESHES[1:]),
        ("dmd", "causal", MESHES[2:]),
    ],
    ids=str,
)
def test_eight_devices_equal_one(stage, kind, meshes, monkeypatch):
    # Plain gradient descent: the update is the gradient.
    tiny.descend(monkeypatch, 1.0)
    config = tiny.train_config(stage, student__kind=kind)
    built, params = tiny.stage_of(config, LATENT)
    rng = np.random.default_rng(0)
    batch = {
        "latents": jnp.asarray(rng.standard_normal((8, *LATENT)), jnp.float32),
        "text": jnp.asarray(rng.standard_normal((8, 6, 8)), jnp.float32),
    }
    for part in built.parts:
        key = {"teacher": "teacher", "critic": "critic"}.get(part.name, "student")
        state = built.state(params)
        one, one_metrics = jax.jit(tiny.call_of(part))(state, built.frozen, batch)

        def moved(after, key=key, state=state):
            pairs = zip(jax.tree.leaves(after.nets[key].params), jax.tree.leaves(state.nets[key].params), strict=True)
            return np.concatenate([np.ravel(np.asarray(a) - np.asarray(b)) for a, b in pairs])

        a = moved(one)
        assert np.linalg.norm(a) > 1e-3
        for mesh_shape in meshes:
            mesh = make_mesh(mesh_shape)
            spread = [jax.device_put(tree, shardings(tree, mesh)) for tree in (state, built.frozen, batch)]
            assert len(jax.tree.leaves(spread[0])[3].sharding.device_set) == 8
            many, many_metrics = jax.jit(on_mesh(tiny.call_of(part), mesh))(*spread)
            for name, value in one_metrics.items():
                np.testing.assert_allclose(many_metrics[name], value, rtol=2e-5, err_msg=f"{name} {mesh_shape}")
            assert np.linalg.norm(a - moved(many)) <= 1e-5 * np.linalg.norm(a), mesh_shape


def test_a_frame_that_does_not_divide_into_stripes_names_the_choices():
    mesh = make_mesh({"context": 8})
    check_columns(mesh, 16)
    with pytest.raises(UserError, match="52 columns of patches, which do not divide by 8; choose from 1, 2, 4, 13, 26"):
        check_columns(mesh, 52)


def test_the_student_of_every_fusion_fits_the_table():
    for fusion in FUSIONS:
        student = Student(tiny.student_config(fusion=fusion))
        shapes = jax.eval_shape(lambda k, s=student: s.init(k, (1, 4, 4, 4)), jax.random.key(0))
        shardings(shapes, make_mesh({"fsdp": 2, "tensor": 2, "data": 2}))
