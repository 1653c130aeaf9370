"""Zeros that a program holds by construction."""

import jax
import jax.numpy as jnp
import pytest

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
