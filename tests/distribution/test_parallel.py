"""What the networks see of the mesh: attention, noise and every fusion in stripes, and other libraries' meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from greedy_distill_jax.distribution import parallel
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.distribution.parallel import attention, on_mesh, split_videos
from greedy_distill_jax.distribution.sharding import shardings
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students.base import History
from greedy_distill_jax.models.students.config import FUSIONS
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.ops.attention import Pattern, chunk_attention, select
from greedy_distill_jax.ops.attention.backends import BACKENDS
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.training.update import value_and_gradients

STRIPES = dict(context=2)
ALL = dict(fsdp=2, context=2, tensor=2)


def mesh_of(shape):
    return make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])


def run_on(shape, call, *args):
    """``call(*args)`` on a mesh, to which the arguments are copied whole."""
    mesh = mesh_of(shape)
    args = jax.device_put(args, NamedSharding(mesh, PartitionSpec()))
    return jax.device_get(jax.jit(on_mesh(call, mesh))(*args))


@jax.jit  # one program instead of some for every shape of a leaf
def distance(a, b):
    return optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(b)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
def test_attention_in_stripes_within_rematerialised_layers(implementation, monkeypatch):
    # Kernels are emulated; what is tested is how they lie in shard_map, and shard_map in scan and remat.
    rng = np.random.default_rng(0)
    weights = tuple(jnp.asarray(0.3 * rng.standard_normal((2, 8, 2, 64)), jnp.float32) for _ in range(3))
    video = jnp.asarray(rng.standard_normal((2, 3, 2, 4, 8)), jnp.float32)

    def layer(x, weights):
        tokens = x.shape[2] * x.shape[3]
        q, k, v = (jnp.einsum("bsc,cnk->bsnk", x.reshape(len(x), -1, x.shape[-1]), w) for w in weights)
        pattern = Pattern.from_table([(0,), (0, 1), (0, 1, 2)], q_chunk=tokens, num_k_chunks=3)
        return x + attention(q, k, v, pattern).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], None

    def loss(weights, x):
        def call(weights, x):
            return jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, weights)[0]

        return jnp.mean(jnp.square(split_videos(call, weights, x, whole=1)))

    both = jax.value_and_grad(loss)
    expected = jax.jit(both)(weights, video)
    (backend,) = (b for b in BACKENDS if b.name == implementation)
    if not backend.partitionable:
        emulated = functools.partial(chunk_attention, implementation=implementation, interpret=True)
        monkeypatch.setattr(parallel, "chunk_attention", emulated)
        monkeypatch.setattr(select, "choose", lambda *args, **options: backend)
    assert distance(run_on(ALL, both, weights, video), expected) < 1e-6


def test_noise_does_not_depend_on_stripes():
    def call(x, key):
        return split_videos(lambda x, key: parallel.normal(key, x.shape), x, key)

    x, key = jnp.zeros((2, 3, 4, 4, 5)), jax.random.key(1)
    np.testing.assert_array_equal(run_on(STRIPES, call, x, key), jax.random.normal(key, x.shape))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_in_stripes(fusion):
    student, keys = Student(tiny.student_config(fusion=fusion)), jax.random.split(jax.random.key(0), 4)
    params = tiny.random_params(student)
    x, frames, target = (jax.random.normal(key, (1, 3, 4, 4, 4)) for key in keys[:3])
    text, sigma = tiny.text_rows(1, keys[3]), jnp.asarray([[0.9, 0.7, 0.3]])

    def loss(params, x, frames):
        v = student(params, x, sigma, text, History(frames, jnp.full((1, 1), 0.1)))
        return jnp.mean(jnp.square(v - target)), v

    both = jax.value_and_grad(loss, has_aux=True)
    expected = jax.jit(both)(params, x, frames)
    found = run_on(STRIPES, both, params, x, frames)
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-5


def test_heads_that_do_not_divide_are_named():
    mesh, q = make_mesh({"tensor": 8}), jnp.zeros((1, 4, 2, 8))
    with pytest.raises(UserError, match="mesh axis tensor is 8, which does not divide the 2 attention heads"):
        on_mesh(lambda: attention(q, q, q, Pattern.full(2, 2)), mesh)()


def test_under_a_mesh_with_other_axes_nothing_is_split():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ("x",))
    teacher = Teacher(tiny.BASE)
    params = jax.eval_shape(lambda key: teacher.init(key, (1, 4, 4, 4)), jax.random.key(0))
    x, sigma = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 2, 4, 4, 4), (1, 1)))
    text = jax.eval_shape(lambda: tiny.text_rows(1, jax.random.key(0)))

    def step(params, x, sigma, text):
        return value_and_gradients(lambda p: (jnp.sum(teacher(p, x, sigma, text)), None), params)

    program = str(jax.make_jaxpr(on_mesh(step, mesh))(params, x, sigma, text))
    assert "sharding_constraint" not in program and "shard_map" not in program
    assert all(s.is_fully_replicated for s in jax.tree.leaves(shardings(params, mesh)))
