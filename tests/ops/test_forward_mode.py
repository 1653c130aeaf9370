"""Tangents by jax.jvp, under a stop-gradient as consistency losses use them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.ops.attention import Pattern, chunk_attention
from greedy_distill_jax.ops.attention.backends import xla
from greedy_distill_jax.testing.attention import dense_attention, relative_error

SCHEDULE = Pattern.from_table([(0,), (), (0, 2)], q_chunk=4, num_k_chunks=3)


def _arrays(seed, batch=1):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((batch, 12, 2, 8)), jnp.float32) for _ in range(3)]


@pytest.mark.parametrize("area", [0, 1 << 10], ids=["scanned", "gathered"])
def test_jvp_equals_numeric_differences(area, monkeypatch):
    monkeypatch.setattr(xla, "GATHER_AREA", area)
    primal, tangent = _arrays(0), _arrays(1)
    _, ours = jax.jvp(jax.jit(lambda *x: chunk_attention(*x, SCHEDULE, scale=0.3, derivative="jvp")), primal, tangent)

    def exact(step):
        moved = [np.asarray(p, np.float64) + step * np.asarray(t) for p, t in zip(primal, tangent, strict=True)]
        return dense_attention(*moved, SCHEDULE.dense_mask(), 0.3)

    numeric = (exact(1e-5) - exact(-1e-5)) / 2e-5
    assert relative_error(ours, numeric) < 2e-5


def test_gradient_of_a_loss_with_a_stopped_tangent():
    """The tangent is a constant of the loss; the primal path keeps its gradient."""
    (q, k, v), tangent = _arrays(0), _arrays(1)

    def loss(q):
        _, moved = jax.jvp(lambda *x: chunk_attention(*x, SCHEDULE, derivative="jvp"), (q, k, v), tuple(tangent))
        return jnp.sum(chunk_attention(q, k, v, SCHEDULE) * jax.lax.stop_gradient(moved))

    fixed = jax.jvp(lambda *x: chunk_attention(*x, SCHEDULE, derivative="jvp"), (q, k, v), tuple(tangent))[1]
    plain = jax.grad(lambda q: jnp.sum(chunk_attention(q, k, v, SCHEDULE) * fixed))(q)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(q), plain, atol=1e-6)


def test_the_gradient_form_refuses_forward_mode():
    q, k, v = _arrays(0)
    with pytest.raises(TypeError, match='call it with derivative="jvp"'):
        jax.jvp(lambda q: chunk_attention(q, k, v, SCHEDULE), (q,), (q,))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jit(lambda q: jax.jvp(lambda q: chunk_attention(q, k, v, SCHEDULE), (q,), (q,)))(q)
