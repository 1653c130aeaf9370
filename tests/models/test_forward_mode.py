"""Tangents of whole networks by jax.jvp, through scan, remat and every attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.models.students.base import History
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.testing import tiny

REMAT = dataclasses.replace(tiny.BASE, remat="full")


def _teacher(derivative):
    teacher = Teacher(REMAT, derivative)
    return teacher, lambda params, x, sigma, text: teacher(params, x, sigma, text)


def _student(cfg, derivative):
    student = make_student(cfg, derivative)
    history = History(jax.random.normal(jax.random.key(4), (1, 4, 4, 4, 4)), jnp.full((1, 1), 0.1))
    return student, lambda params, x, sigma, text: student(params, x, sigma, text, history)


NETWORKS = {
    "teacher": _teacher,
    "causal": lambda derivative: _student(tiny.causal_config(base=REMAT), derivative),
    "etm_sdd": lambda derivative: _student(tiny.student_config(base=REMAT), derivative),
    "etm_sdd xattn2": lambda derivative: _student(tiny.student_config(base=REMAT, fusion="xattn2"), derivative),
}


def _inputs():
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 4, 4))
    return x, jnp.asarray([[0.25, 0.6875, 0.5, 0.875]]), tiny.text_rows(1, jax.random.key(3))


@pytest.mark.parametrize("name", NETWORKS)
def test_tangents_in_x_and_sigma_are_the_limit_of_central_differences(name):
    network, call = NETWORKS[name]("jvp")
    params, (x, sigma, text) = tiny.random_params(network), _inputs()
    directions = {
        "x": (jax.random.normal(jax.random.key(1), x.shape), jnp.zeros_like(sigma), 2.0**-6),
        # A network reads sigma through the sine of 1000 sigma; powers of two, so that no step is rounded.
        "sigma": (jnp.zeros_like(x), jnp.asarray([[1.0, -0.5, 0.75, 0.625]]), 2.0**-11),
    }

    @jax.jit
    def both(params, x_dot, sigma_dot, coarse):
        def moved(step):
            return call(params, x + step * x_dot, sigma + step * sigma_dot, text)

        def central(step):
            return (moved(step) - moved(-step)) / (2 * step)

        ours = jax.jvp(lambda x, s: call(params, x, s, text), (x, sigma), (x_dot, sigma_dot))[1]
        # Errors fall with the square of the step: half of it leaves a fourth, and what is left can be extrapolated.
        coarse, fine = central(coarse), central(coarse / 2)
        return ours, coarse, fine, (4 * fine - coarse) / 3

    for direction, tangent in directions.items():
        ours, coarse, fine, limit = (np.asarray(y, np.float64) for y in both(params, *tangent))
        errors = [np.linalg.norm(ours - y) / np.linalg.norm(limit) for y in (coarse, fine, limit)]
        assert np.linalg.norm(ours) > 0.1
        assert errors[1] < 0.3 * errors[0] and errors[2] < 2e-3, (direction, errors)


def test_a_network_for_gradients_says_how_to_ask_for_tangents():
    network, call = _teacher("vjp")
    params, (x, sigma, text) = tiny.random_params(network), _inputs()
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: call(params, x, sigma, text), (x,), (x,))


@pytest.mark.parametrize("name", ["teacher", "etm_sdd"])
def test_both_forms_are_the_same_function(name):
    network, tangents = NETWORKS[name]("jvp")
    gradients = NETWORKS[name]("vjp")[1]
    params, inputs = tiny.random_params(network), _inputs()
    np.testing.assert_allclose(jax.jit(tangents)(params, *inputs), jax.jit(gradients)(params, *inputs), atol=1e-5)
