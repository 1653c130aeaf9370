"""Gradients of kernels and biases are made and summed over devices in float32, whatever the matmuls are in."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from greedy_distill_jax.models.wan import layers
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.models.wan.linear import Dense
from greedy_distill_jax.testing import tiny

# Counts the dtypes of all sums over devices in the gradient of a bfloat16 DiT, partitioned for four chips.
SUMS = """
import collections, json, re
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from greedy_distill_jax.distribution import parallel, sharding
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.pods import topologies

mesh, out = make_mesh({"data": 2, "fsdp": 2}, topologies.devices("v5e:2x2").ravel()), {}
for dtype in ("float32", "compute"):
    net = Teacher(WanConfig(256, 512, 2, 2, text_dim=64, text_len=128, gradient_dtype=dtype))
    params = jax.eval_shape(lambda key: net.init(key, (3, 16, 16, 16)), jax.random.key(0))
    places = sharding.shardings(params, mesh), *[NamedSharding(mesh, PartitionSpec(("data", "fsdp")))] * 3
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 3, 16, 16, 16), (4, 1), (4, 128, 64))]
    loss = lambda params, *batch: jnp.mean(jnp.square(net(params, *batch)))
    step = lambda *args: parallel.at_rest(jax.grad(loss)(*args))
    program = jax.jit(parallel.on_mesh(step, mesh), in_shardings=places).lower(params, *shapes).compile().as_text()
    sums = re.findall(r"= (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\\(", program)
    out[dtype] = collections.Counter(re.findall(r"(bf16|f32)\\[", " ".join(sums)))
print(json.dumps(out))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is missing")
@pytest.mark.subprocesses
def test_sums_over_devices_are_float32(subprocess_env):
    env = {**subprocess_env, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", SUMS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    sums = json.loads(done.stdout.splitlines()[-1])
    assert sums["float32"].keys() == {"f32"}
    assert sums["compute"]["bf16"] > 10, "what the key promises to save"


def _gradient(gradient_dtype, dtype="bfloat16"):
    layer = Dense(32, dtype, gradient_dtype)
    x, towards = (jax.random.normal(jax.random.key(i), (4, 512, 32)) for i in (0, 1))
    params = layer.init(jax.random.key(2), x)["params"]

    def loss(params, x):
        return jnp.sum(towards * layer.apply({"params": params}, x).astype(jnp.float32))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)


def _bits_lost(x):
    """How far from bfloat16 numbers: 0 for what was rounded to them."""
    return float(jnp.abs(x - x.astype(jnp.bfloat16).astype(jnp.float32)).max())


def test_a_gradient_is_not_rounded():
    ours, of_input = _gradient("float32")
    rounded, same = _gradient("compute")
    exact, _ = _gradient("float32", "float32")
    assert min(_bits_lost(x) for x in jax.tree.leaves(ours)) > 0 == max(_bits_lost(x) for x in jax.tree.leaves(rounded))
    np.testing.assert_array_equal(of_input, same)
    errors = [float(optax.tree.norm(jax.tree.map(jnp.subtract, x, exact))) for x in (ours, rounded)]
    assert errors[0] < 0.8 * errors[1] and errors[0] < 0.01 * float(optax.tree.norm(exact))
    plain, _ = _gradient("compute", "float32")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), exact, plain)


class Rounded(Dense):
    """A layer in bfloat16 with the interface of a float32 one."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(x).astype(jnp.float32)


def test_time_embedding_and_head_are_float32(monkeypatch):
    """What they round is in the whole velocity."""
    base = dataclasses.replace(tiny.BASE, dim=192, ffn_dim=256, num_heads=4, num_layers=4)
    exact, half = Teacher(base), Teacher(dataclasses.replace(base, dtype="bfloat16"))
    params, text = tiny.random_params(exact, latent_shape=(1, 4, 4, 4)), tiny.text_rows(2, jax.random.key(3))
    x, sigma = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 4)), jnp.full((2, 1), 0.6)
    v = jax.jit(exact)(params, x, sigma, text)

    def error():
        found = jax.jit(lambda *args: half(*args))(params, x, sigma, text)
        return float(jnp.linalg.norm(found - v) / jnp.linalg.norm(v))

    ours = error()
    monkeypatch.setattr(layers, "float32_dense", lambda n, cfg, init=None, **name: Rounded(n, cfg.dtype, **name))
    assert ours < 0.85 * error()
