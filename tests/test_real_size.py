"""The real width through the real configs: updates of every stage at 1536, 12 heads, 2 layers, text 512 x 4096."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.cli.config_flags import read_config
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.models.wan.linear import FLOAT32
from greedy_distill_jax.testing import tiny

LATENT = (3, 4, 4, 16)


@pytest.mark.parametrize("name", ["teacher", "teacher_forcing", "dmd"])
def test_two_updates_at_width_1536(name):
    config = read_config(f"configs/wan1_3b/{name}.py").lock()
    config.model.num_layers, config.data.frames, config.optimizer.learning_rate = 2, LATENT[0], 1e-4
    assert (config.model.size, config.data.batch) == ("wan1_3b", 64)
    config.data.accumulate = 1
    stage, params = tiny.stage_of(config, LATENT)
    wan = getattr(stage.model.cfg, "base", stage.model.cfg)
    assert (wan.dim, wan.ffn_dim, wan.num_heads, wan.text_len, wan.text_dim) == (1536, 8960, 12, 512, 4096)
    assert wan.dtype == "bfloat16" and wan.remat == "full" and wan.prediction == "velocity"
    if config.stage != "teacher":
        kernels = [params["student"][part]["blocks"]["self_attn"]["q"]["kernel"] for part in ("etm", "sdd")]
        assert [k.shape for k in kernels] == [(1, 1536, 1536)] * 2  # "interleaved": one block each of the two
    frozen = jax.tree_util.tree_leaves_with_path(stage.frozen)
    assert all((x.dtype == jnp.bfloat16) == (p[-2].key not in FLOAT32) for p, x in frozen if p[-1].key == "kernel")
    state, rng = jax.jit(stage.state)(params), np.random.default_rng(0)
    before = [np.asarray(x) for x in jax.tree.leaves(params)]
    batch = {
        "latents": jnp.asarray(rng.standard_normal((1, *LATENT)), jnp.float32),
        "text": jnp.asarray(rng.standard_normal((1, 512, 4096)), jnp.float32),
    }
    for part in stage.parts:
        call = jax.jit(tiny.call_of(part), donate_argnums=0)
        for _ in range(2 if len(stage.parts) == 1 else 1):
            state, metrics = call(state, stage.frozen, batch)
            assert all(np.isfinite(float(x)) for x in metrics.values())
    moved = [
        np.abs(np.asarray(a) - b).max() > 0
        for a, b in zip(jax.tree.leaves({n: net.params for n, net in state.nets.items()}), before, strict=True)
    ]
    assert np.mean(moved) > 0.9


def _shapes(jaxpr):
    """Of everything that a program computes, loop bodies included."""
    for equation in jaxpr.eqns:
        yield from (x.aval.shape for x in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _shapes(inner)


def test_full_attention_over_32760_tokens_never_holds_its_logits():
    wan = read_settings(read_config("configs/wan1_3b/teacher.py")).wan
    teacher = Teacher(dataclasses.replace(wan, num_layers=2))
    params = jax.eval_shape(lambda key: teacher.init(key, (1, 4, 4, 16)), jax.random.key(0))
    video, level, text = ((1, 21, 60, 104, 16), (1, 1), (1, 512, 4096))
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (video, level, text)]

    def loss(*args):
        return jnp.mean(jnp.square(teacher(*args)))

    for call in (teacher, jax.grad(loss)):
        largest = max(_shapes(jax.make_jaxpr(call)(params, *inputs).jaxpr), key=math.prod)
        # The MLP's, not one head's 32,760 x 32,760, nor all the blocks of it that a gradient without recomputing keeps.
        assert largest == (1, 32_760, 8960)
