"""LoRA: the numbers of explicit factors, what stays as it is, a run that goes on, eight devices, bad input."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from greedy_distill_jax.config import read_settings
from greedy_distill_jax.config.keys import Lora, Optimizer
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.distribution.parallel import on_mesh
from greedy_distill_jax.distribution.sharding import leaf_paths, shardings
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.storage.checkpoint import Checkpointer
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.train import train
from greedy_distill_jax.training.lora import Factors, lora
from greedy_distill_jax.training.optimizer import make_optimizer
from greedy_distill_jax.training.update import Update
from tests.conftest import LORA

KEYS = Lora(rank=2, alpha=3.0, targets="q, down")


def _network():
    rng = np.random.default_rng(0)

    def linear(*shape):
        kernel = jnp.asarray(0.4 * rng.standard_normal(shape), jnp.float32)
        return {"kernel": kernel, "bias": jnp.ones((*shape[:-2], shape[-1]))}

    blocks = {"self_attn": {"q": linear(3, 6, 5), "k": linear(3, 6, 5)}, "ffn": {"down": linear(3, 5, 6)}}
    return {"sdd": {"blocks": blocks, "head": linear(6, 4)}}


def _loss(params, x):
    def block(x, layer):
        q, k = (x @ linear["kernel"] + linear["bias"][None] for linear in map(layer["self_attn"].get, "qk"))
        return x + jnp.tanh(q * k) @ layer["ffn"]["down"]["kernel"], None

    x, _ = jax.lax.scan(block, x, params["sdd"]["blocks"])
    return jnp.mean(jnp.square(x @ params["sdd"]["head"]["kernel"] - 1))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_numbers_of_factors_that_are_trained_themselves(name):
    o = Optimizer(name, learning_rate=0.02, warmup=1, weight_decay=0.1, clip=0.05)
    first, x = _network(), jnp.asarray(np.random.default_rng(1).random((4, 6)), jnp.float32)
    alone, merging = Update(make_optimizer(o, steps=8)), Update(lora(make_optimizer(o, steps=8), KEYS, seed=0, path=""))
    state = merging.optimizer.init(first)
    assert {path: leaf.shape for path, leaf in leaf_paths(state.factors)} == {
        "sdd/blocks/ffn/down/lora_A": (3, 5, 2),
        "sdd/blocks/ffn/down/lora_B": (3, 2, 6),
        "sdd/blocks/self_attn/q/lora_A": (3, 6, 2),
        "sdd/blocks/self_attn/q/lora_B": (3, 2, 5),
    }
    moments = [leaf.shape for path, leaf in leaf_paths(state.inner) if "/mu/" in path]
    assert sorted(moments) == sorted(leaf.shape for leaf in jax.tree.leaves(state.factors))

    def merged(factors):
        params = jax.tree.map(lambda x: x, first)  # a copy of the dictionaries
        for group, layer in (("self_attn", "q"), ("ffn", "down")):
            a, b = factors["sdd"]["blocks"][group][layer]
            params["sdd"]["blocks"][group][layer]["kernel"] += 1.5 * a @ b
        return params

    @jax.jit
    def both(params, state, own, own_state):
        params, state = merging.params(params, state, jax.grad(_loss)(params, x))
        own, own_state = alone.params(own, own_state, jax.grad(lambda f: _loss(merged(f), x))(own))
        return params, state, own, own_state

    params, own, own_state = first, state.factors, alone.optimizer.init(state.factors)
    for _ in range(5):
        params, state, own, own_state = both(params, state, own, own_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), (params, state.factors), (merged(own), own))
    for (path, a), (_, b) in zip(leaf_paths(params), leaf_paths(first), strict=True):
        assert np.array_equal(a, b) != path.endswith(("q/kernel", "down/kernel")), path
    assert _loss(params, x) < _loss(first, x)


def test_a_starts_as_in_peft():
    """PEFT: Kaiming's uniform numbers with a = sqrt(5), whose bound is 1 / sqrt(in)."""
    params = {"blocks": {"ffn": {"up": {"kernel": jnp.zeros((2, 400, 300))}}}}
    state = lora(optax.sgd(1.0), Lora(rank=8, targets="up"), seed=3, path="config").init(params)
    factors: Factors = state.factors["blocks"]["ffn"]["up"]
    assert not np.any(factors.lora_B) and 0.0495 < np.abs(factors.lora_A).max() <= 0.05
    np.testing.assert_allclose(np.std(factors.lora_A), 0.05 / np.sqrt(3), rtol=0.02)


def test_a_run_changes_its_targets_by_a_matrix_of_low_rank_and_goes_on(tiny_teacher, lora_teacher, tmp_path):
    """The run has four updates; a copy of it loses the last two and makes them again."""

    def saved(run):
        with Checkpointer(run / "checkpoints", read_only=True) as checkpoints:
            return checkpoints.restore_subtree(4, "nets/teacher")

    before, after = dict(leaf_paths(Run.load(tiny_teacher).params)), saved(lora_teacher)
    for path, leaf in leaf_paths(after["params"]):
        if re.search(r"blocks/.*/(q|up)/kernel", path):
            values = np.linalg.svd(leaf - before[path], compute_uv=False)
            assert values[:, 1].min() > 1e-5 and values[:, 2:].max() < 1e-6, path
        else:
            np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    averaged = after["ema"]["blocks"]["ffn"]["up"]["kernel"]
    assert np.any(averaged != after["params"]["blocks"]["ffn"]["up"]["kernel"])

    shutil.copytree(lora_teacher, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    config = tiny.train_config(teacher_from=str(tiny_teacher), **LORA)
    train(config, tmp_path / "run", show_progress=False)
    jax.tree.map(np.testing.assert_array_equal, saved(tmp_path / "run"), after)
    refused = {"rank": (3, "2, not 3"), "alpha": (1.0, r"5\.0, not 1\.0"), "targets": ("q", "'q,up', not 'q'")}
    for key, (value, said) in refused.items():
        other = tiny.train_config(teacher_from=str(tiny_teacher), **LORA | {f"optimizer__lora__{key}": value})
        with pytest.raises(UserError, match=rf"was started with config\.optimizer\.lora\.{key} = {said}"):
            train(other, tmp_path / "run", show_progress=False)


def test_eight_devices_equal_one():
    params = tiny.random_params(Teacher(tiny.BASE))
    grads = tiny.random_params(Teacher(tiny.BASE), 1)
    optimizer = lora(optax.sgd(0.1, momentum=0.9), Lora(rank=3), seed=0, path="config")
    mesh = make_mesh(dict(fsdp=2, context=2, tensor=2))

    def two(params, grads):
        state = optimizer.init(params)
        for _ in range(2):  # the first leaves A as it is
            updates, state = optimizer.update(grads, state, params)
        return updates, state

    one = jax.jit(two)(params, grads)
    spread = [jax.device_put(tree, shardings(tree, mesh)) for tree in (params, grads)]
    layout = tuple(shardings(tree, mesh) for tree in jax.eval_shape(two, params, grads))
    many = jax.jit(on_mesh(two, mesh), out_shardings=layout)(*spread)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), many, one)
    a = many[1].factors["blocks"]["ffn"]["down"].lora_A
    assert {s.data.shape for s in a.addressable_shards} == {(3, 16, 3)}  # the width of 32 is split, the rank is whole
    assert np.any(one[0]["blocks"]["cross_attn"]["o"]["kernel"])


@pytest.mark.parametrize(
    "stage, changes, said",
    [
        ("teacher", dict(rank=2, targets="q,w"), "targets names 'w', but the blocks have no such linear; choose from "),
        ("teacher", dict(rank=2, targets=""), "targets names '', but the blocks have no such linear; choose from down"),
        ("teacher", dict(rank=2, targets="z_k"), "targets names 'z_k', but .*; choose from down, k, o, q, up, v"),
        ("teacher", dict(rank=25), "rank is 25, but blocks/.* maps 24 numbers to 24; choose at most 24"),
        ("teacher", dict(rank=-1), "rank is -1; it must be from 0"),
        ("teacher", dict(rank=2, alpha=0.0), r"alpha is 0\.0; it must be above 0"),
        ("teacher", dict(alpha=4.0), r"has alpha 4\.0 and targets 'q,k,v,o,up,down', but rank 0, which is off"),
        ("dmd", dict(critic__rank=30), "rank is 30, but blocks"),
        ("dmd", dict(critic__targets="q"), "has alpha None and targets 'q', but rank 0"),
    ],
)
def test_bad_input_is_named(stage, changes, said):
    place = "critic" if next(iter(changes)).startswith("critic__") else ""
    config = tiny.train_config(stage)
    group = config.critic.optimizer.lora if place else config.optimizer.lora
    group.update({name.removeprefix("critic__"): value for name, value in changes.items()})
    path = "config.critic.optimizer.lora" if place else "config.optimizer.lora"
    with pytest.raises(UserError, match=rf"^{path}[. ]?{said}"):
        stage, params = tiny.stage_of(config, (4, 4, 4, 16))
        jax.eval_shape(stage.state, params)


def test_faster_new_parameters_are_refused():
    config = tiny.train_config("teacher_forcing", optimizer__new_scale=10.0, optimizer__lora__rank=2)
    with pytest.raises(UserError, match=r"config\.optimizer\.new_scale is 10\.0, but config\.optimizer\.lora trains"):
        read_settings(config)
