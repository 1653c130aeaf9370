"""The DiT compiles for chips on which libtpu aborts without ``parallel.settled_on_megacore``."""

import importlib.util
import subprocess
import sys

import pytest

# 32,760 tokens with a noise level of every frame, whole on one v5p; the width does not matter to what aborts.
WHOLE_VIDEO = """
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from greedy_distill_jax.distribution import mesh, parallel
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.pods import topologies

sizes = WAN_SIZES["wan1_3b"] | dict(dim=256, ffn_dim=512, num_heads=2, num_layers=1)
devices, latents = topologies.devices("v5p:2x2x1")[:1], (21, 60, 104, 16)
one = Mesh(devices.reshape((1,) * len(mesh.AXES)), mesh.AXES)
place, teacher = NamedSharding(one, PartitionSpec()), Teacher(WanConfig(**sizes))
params = jax.eval_shape(lambda key: teacher.init(key, latents), jax.random.key(0))
arrays = params, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, *latents), (1, 21), (1, 512, 4096)))
arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays)
jax.jit(parallel.on_mesh(teacher, one)).lower(*arrays).compile()
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is missing")
@pytest.mark.subprocesses
def test_a_whole_video_on_a_v5p(subprocess_env):
    env = {**subprocess_env, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", WHOLE_VIDEO], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
