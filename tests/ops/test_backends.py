"""A backend from outside of the package: one record, registered, and everything asks it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import greedy_distill_jax
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.distribution.parallel import attention, on_mesh
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.ops.attention import Pattern, backends, chunk_attention, select
from greedy_distill_jax.ops.attention.backends import reference
from greedy_distill_jax.ops.attention.backends.record import Backend
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.streaming.session import programs
from greedy_distill_jax.testing import tiny

PATTERN = Pattern.sliding_window(3, 4, window=2)


def why_not(request):
    return None if request.head_dim == 8 else f"the head dim is {request.head_dim}, not 8"


def forward(q, k, v, lengths_Q, call):
    return reference.attend(q, k, v, lengths_Q, call), (q, k, v, lengths_Q)


def backward(residual, g, call):
    """Twice the gradient, so that it is told from the one of another backend."""
    *qkv, lengths_Q = residual
    return tuple(2 * d for d in jax.vjp(lambda *x: reference.attend(*x, lengths_Q, call), *qkv)[1](g))


MINE = Backend("mine", why_not, reference.attend, forward, backward, partitionable=False)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", backends.BACKENDS)  # as it was, afterwards
    backends.register(MINE)


def _arrays(dim=8):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((2, 12, 2, dim)), jnp.float32) for _ in range(3)]


def test_it_is_preferred_and_its_gradient_is_used():
    def gradients(implementation):
        return jax.grad(lambda *x: jnp.sum(chunk_attention(*x, PATTERN, implementation=implementation)), (0, 1, 2))

    assert select.choose(None, _arrays()[0], PATTERN, function="f") is MINE
    for ours, others in zip(gradients(None)(*_arrays()), gradients("xla")(*_arrays()), strict=True):
        np.testing.assert_allclose(ours, 2 * others, atol=1e-5)


def test_where_it_cannot_run_the_next_best_does_and_its_name_says_why():
    q, k, v = _arrays(dim=4)
    assert select.choose(None, q, PATTERN, function="f").name == "xla"
    with pytest.raises(UserError, match="'mine' cannot run here: the head dim is 4, not 8; use xla or reference"):
        chunk_attention(q, k, v, PATTERN, implementation="mine")


def test_what_it_does_not_have_is_refused():
    q, k, v = _arrays()
    with pytest.raises(UserError, match="'mine' cannot run here: it has gradients only"):
        chunk_attention(q, k, v, PATTERN, implementation="mine", derivative="jvp")
    assert chunk_attention(q, k, v, PATTERN, derivative="jvp").shape == q.shape


def test_a_mesh_hands_it_parts_of_batch_and_heads():
    seen = []

    def attend(q, *others):
        seen.append(q.shape)
        return reference.attend(q, *others)

    backends.register(Backend("watched", why_not, attend, partitionable=False))
    mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    whole = jax.device_put(_arrays(), NamedSharding(mesh, PartitionSpec()))
    out = jax.jit(on_mesh(lambda *x: attention(*x, PATTERN), mesh))(*whole)
    np.testing.assert_allclose(out, chunk_attention(*_arrays(), PATTERN, implementation="xla"), atol=1e-5)
    assert set(seen) == {(1, 12, 1, 8)}


def test_streams_opened_afterwards_are_traced_anew():
    streamer = make_streamer(make_student(tiny.STUDENT), StepPlan(((1.0,),)))
    before = programs(streamer)
    assert programs(streamer) is before
    backends.register(Backend("later", why_not, reference.attend))
    assert programs(streamer) is not before


def test_names_are_unique():
    with pytest.raises(UserError, match="a backend of the name 'mine' exists"):
        backends.register(MINE)
    assert backends.names()[0] == "mine" and len(set(backends.names())) == len(backends.names())


def test_names_stay_in_their_files():
    """Package code asks the record, never the name."""
    root = Path(greedy_distill_jax.__file__).parent
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        names = ["mosaic_tpu", "mosaic_gpu", "cudnn", "reference"]
        if "training" in path.parts:
            names.remove("reference")  # there it is the student that stage rl started from
        assert not [name for name in names if f'"{name}"' in text and path.stem != name], path
