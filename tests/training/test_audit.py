"""Zeros that a program holds by construction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.training import audit
from greedy_distill_jax.training.audit import zero_outputs

CASES = {
    "product": (lambda z, x: (z * x, x * z, x * x), (True, True, False)),
    "powers": (lambda z, x: (z**2, z**-2, x**2), (True, False, False)),
    "sum of several": (lambda z, x: jax.lax.psum((z, x), "i"), (True, False)),
    "loop": (lambda z, x: jax.lax.fori_loop(0, 3, lambda _, c: (c[0] * 2, c[1] + c[0]), (z, x)), (True, False)),
    "loop that fills": (lambda z, x: jax.lax.fori_loop(0, 3, lambda _, c: (c[0] + c[1], c[1]), (z, x)), (False, False)),
    "scan of zeros": (lambda z, x: jax.lax.scan(lambda c, s: (c * x, c + s * x), z, jnp.stack([z, z])), (True, True)),
    "scan of others": (lambda z, x: jax.lax.scan(lambda c, s: (c * x, c + s * x), z, jnp.stack([x, z])), (True, False)),
    "scan that fills": (lambda z, x: jax.lax.scan(lambda c, s: (c + x, z * s), z, jnp.stack([x, x])), (False, True)),
    "parts": (
        lambda z, x: (*jnp.stack([z, z]), *jnp.split(z, 2), *jnp.unstack(jnp.stack([z, x]))),
        (True,) * 4 + (False,) * 2,
    ),
    "branches": (lambda z, x: jax.lax.cond(x[0] > 0, lambda: (z, z), lambda: (z, x)), (True, False)),
}


@pytest.mark.parametrize("call, expected", CASES.values(), ids=CASES)
def test_outputs_of_a_zero_and_another(call, expected):
    x = jnp.ones(2)
    program = jax.make_jaxpr(call, axis_env=[("i", 1)])(x, x)
    assert tuple(zero_outputs(program.jaxpr, program.consts, [True, False])) == expected


@pytest.mark.parametrize(
    "weights, idle, traces",
    [
        (dict(used=2.0), [], 1),
        (dict(used=0.0), [], 2),  # a term of weight 0 has a gradient
        (dict(stopped=1.0), ["stopped"], 2),
        (dict(used=2.0, stopped=1.0), ["stopped"], 3),
        (None, [], 1),
    ],
    ids=str,
)
def test_a_gradient_under_audit_is_the_gradient(weights, idle, traces):
    """Of one term it is traced once; ``b`` is reached by none."""
    params, traced = {"a": jnp.arange(3.0), "b": jnp.ones(2)}, []
    losses = {"used": lambda a: jnp.sum(a**3), "stopped": lambda a: jnp.sum(jax.lax.stop_gradient(a) ** 2)}

    def objective(params):
        traced.append(1)
        values = {name: losses[name](params["a"]) for name in weights or ("used",)}
        total = sum((weights or {}).get(name, 1.0) * value for name, value in values.items())
        return total, weights and values | {f"{name}/twice": 2 * value for name, value in values.items()}

    expected = jax.value_and_grad(objective, has_aux=True)(params)
    traced.clear()
    with audit.watching() as found:
        given = jax.jit(lambda params: audit.value_and_grad(objective, params))(params)
    assert len(traced) == traces
    assert audit.idle_terms(found) == idle
    assert audit.idle_leaves(found) == (["a", "b"] if weights == dict(stopped=1.0) else ["b"])
    jax.tree.map(np.testing.assert_array_equal, given, expected)
