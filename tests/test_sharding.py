"""The one table, and 8 virtual devices against one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.mesh import make_mesh
from greedy_distill_jax.models.student import Student
from greedy_distill_jax.models.wan_config import FUSIONS
from greedy_distill_jax.sharding import RULES, TABLE, leaf_paths, rows_of, shardings
from greedy_distill_jax.steps import Term, total_loss
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.train import build_network, make_state, optimizer_of
from greedy_distill_jax.types import UserError

LATENT = (4, 4, 4, 16)


def _state_shapes(config):
    model, _ = build_network(config)
    optimizer = optimizer_of(config)
    return jax.eval_shape(lambda k: make_state(model.init(k, LATENT), optimizer), jax.random.key(0))


def test_every_leaf_matches_exactly_one_row_and_no_row_is_dead():
    trees = [_state_shapes(tiny.train_config(optimizer__name=name)) for name in ("adamw", "muon")]
    trees += [_state_shapes(tiny.train_config("teacher_forcing", student__fusion=f)) for f in FUSIONS]
    trees.append(_state_shapes(tiny.train_config("teacher_forcing", student__kind="causal")))
    trees.append({"latents": jnp.zeros((1, 1, 1, 1, 1)), "text": jnp.zeros((1, 1, 1))})
    seen = set()
    for tree in trees:
        for path, leaf in leaf_paths(tree):
            rows = rows_of(path)
            assert len(rows) == 1, (path, rows)
            assert len(TABLE[rows[0]][1]) == leaf.ndim, (path, leaf.shape)
            seen.add(rows[0])
    assert seen == set(range(len(TABLE))), [TABLE[i] for i in set(range(len(TABLE))) - seen]


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


@pytest.mark.parametrize(
    "stage, kind, mesh_shape",
    [*((s, "etm_sdd", m) for m in MESHES for s in ("teacher", "teacher_forcing")),
     ("teacher_forcing", "causal", MESHES[-1])],
    ids=str,
)  # fmt: skip
def test_eight_devices_equal_one(stage, kind, mesh_shape):
    config = tiny.train_config(stage, student__kind=kind)
    model, make_net = build_network(config)
    params = tiny.random_params(model, latent_shape=LATENT)
    rng = np.random.default_rng(0)
    batch = {
        "latents": jnp.asarray(rng.standard_normal((8, *LATENT)), jnp.float32),
        "text": jnp.asarray(rng.standard_normal((8, 6, 8)), jnp.float32),
    }
    from greedy_distill_jax.losses import flow_matching

    term = Term("flow_matching", flow_matching, 1.0, {"per_frame": stage != "teacher"})

    def loss(params, batch):
        net = make_net(params, jax.random.key(1))
        return total_loss([term], net, batch, jax.random.key(2))[0]

    one_loss, one = jax.jit(jax.value_and_grad(loss))(params, batch)
    mesh = make_mesh(mesh_shape)
    spread = [jax.device_put(tree, shardings(tree, mesh)) for tree in (params, batch)]
    kernel = jax.tree.leaves(spread[0])[3]
    assert len(kernel.sharding.device_set) == 8
    many_loss, many = jax.jit(jax.value_and_grad(loss), out_shardings=None)(*spread)
    np.testing.assert_allclose(many_loss, one_loss, rtol=1e-5)

    def flat(tree):
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])

    a, b = flat(one), flat(many)
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a) and np.linalg.norm(a) > 0.1


def test_the_student_of_every_fusion_fits_the_table():
    for fusion in FUSIONS:
        student = Student(tiny.student_config(fusion=fusion))
        shapes = jax.eval_shape(lambda k, s=student: s.init(k, (1, 4, 4, 4)), jax.random.key(0))
        shardings(shapes, make_mesh({"fsdp": 2, "tensor": 2, "data": 2}))
