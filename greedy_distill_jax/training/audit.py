"""The audit of gradients: which losses train something, and which parameters some loss trains, found by tracing.

A loss whose gradient is stopped somewhere runs, logs a number, and trains nothing. Public trainers shipped that, and
parameters that no loss reaches, unnoticed. Here the gradient of every term is traced, not computed, and its program is
searched for zeros that it holds by construction: what differentiation puts where no path leads.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from greedy_distill_jax.distribution.sharding import leaf_paths


class Finding(NamedTuple):
    """What one gradient of a traced part reaches.

    reached: path of every parameter that has a gradient, by term ("" for the sum of a gradient that is not by term).
    leaves: paths of all parameters.
    """

    reached: dict[str, set[str]]
    leaves: set[str]


_FOUND: contextvars.ContextVar[list[Finding] | None] = contextvars.ContextVar("gradients under audit", default=None)


@contextlib.contextmanager
def watching() -> Iterator[list[Finding]]:
    """Collects a Finding for every gradient that is traced in here."""
    found: list[Finding] = []
    token = _FOUND.set(found)
    try:
        yield found
    finally:
        _FOUND.reset(token)


def value_and_grad(objective: Callable, params: Any) -> tuple[tuple[Any, Any], Any]:
    """``jax.value_and_grad(objective, has_aux=True)(params)``; where gradients are watched, a Finding of it.

    Tracing a large network takes long: the program that is searched is the one that is returned from, so that an
    objective of one term is traced once.

    Args:
      objective: ``objective(params) -> (value, metrics by term or None)``.
      params: of a network.
    """
    call, found = jax.value_and_grad(objective, has_aux=True), _FOUND.get()
    if found is None:
        return call(params)
    program, shapes = jax.make_jaxpr(call, return_shape=True)(params)
    (_, by_term), grads = shapes
    terms, reached = _terms(by_term), {}
    if len(terms) == 1:
        reached = {terms[0]: _reached(program, grads)}
    if not any(reached.values()):  # of several terms each has its own; one of weight 0 has one, too
        reached = _by_term(objective, params)
    found.append(Finding(reached, {path for path, _ in leaf_paths(params)}))
    return jax.tree.unflatten(jax.tree.structure(shapes), core.jaxpr_as_fun(program)(*jax.tree.leaves(params)))


def note(objective: Callable, arrays: Any) -> None:
    """A Finding of ``objective(arrays) -> (value, metrics by term)`` where gradients are watched.

    For a gradient with respect to other arrays than a network's parameters.
    """
    if (found := _FOUND.get()) is not None:
        found.append(Finding(_by_term(objective, arrays), set()))


def _by_term(objective: Callable, params: Any) -> dict[str, set[str]]:
    reached: dict[str, set[str]] = {}
    terms: list[str] = []  # known once the objective has been traced

    def next_term(params):
        total, by_term = objective(params)
        terms[:] = _terms(by_term)
        term = terms[len(reached)]
        return by_term[term] if term else total

    while not reached or len(reached) < len(terms):
        # A function of its own each time: jax would answer from the last trace of the same one.
        program, grads = jax.make_jaxpr(jax.grad(lambda p: next_term(p)), return_shape=True)(params)
        reached[terms[len(reached)]] = _reached(program, grads)
    return reached


def _terms(by_term: Mapping[str, Any] | None) -> list[str]:
    return [name for name in by_term or () if "/" not in name] or [""]


def _reached(program: core.ClosedJaxpr, grads: Any) -> set[str]:
    """Paths of the last outputs of a program, ``grads``, that are not zero."""
    paths = [path for path, _ in leaf_paths(grads)]
    zeros = zero_outputs(program.jaxpr, program.consts, [False] * len(program.jaxpr.invars))
    return {path for path, is_zero in zip(paths, zeros[len(zeros) - len(paths) :], strict=True) if not is_zero}


def idle_terms(found: Sequence[Finding]) -> list[str]:
    """Terms that reach no parameter in any of the gradients they take part in."""
    terms = {term for finding in found for term in finding.reached if term}
    return sorted(t for t in terms if not any(finding.reached.get(t) for finding in found))


def idle_leaves(found: Sequence[Finding]) -> list[str]:
    """Parameters that no gradient reaches."""
    leaves = set().union(*(finding.leaves for finding in found))
    reached = set().union(*(paths for finding in found for paths in finding.reached.values()))
    return sorted(leaves - reached)


# --- zeros by construction -----------------------------------------------------------------------------------------

_KEEPS_ZERO = {  # output i is zero where operand i is
    *("neg", "convert_element_type", "reshape", "broadcast_in_dim", "transpose", "reduce_sum", "squeeze", "slice"),
    *("dynamic_slice", "copy", "copy_p", "real", "rev", "gather", "cumsum", "sharding_constraint"),
    *("reduce_precision", "div", "sqrt", "abs", "tanh", "sin", "sign", "expand_dims", "pvary", "pcast", "psum"),
    *("all_gather", "reduce_scatter", "psum_invariant", "all_to_all", "ppermute"),
}
_ANY_ZERO = {"mul", "dot_general", "conv_general_dilated"}
_ALL_ZERO = {
    *("add", "sub", "add_any", "concatenate", "stack", "dynamic_update_slice", "scatter-add", "pad", "max", "min"),
}
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # of pjit, remat, custom derivatives, shard_map


def zero_outputs(jaxpr: core.Jaxpr, consts: Sequence[Any], zero_in: Sequence[bool]) -> list[bool]:
    """Which outputs of a program are zero whatever its other inputs are.

    Args:
      jaxpr: the program.
      consts: values of its constants; what is not a concrete array counts as not zero.
      zero_in: which inputs are zero.
    """
    known = dict(zip(jaxpr.invars, zero_in, strict=True))
    known |= dict(zip(jaxpr.constvars, map(_is_zero, consts), strict=False))

    def zero(atom) -> bool:
        return _is_zero(atom.val) if isinstance(atom, core.Literal) else known.get(atom, False)

    for equation in jaxpr.eqns:
        inputs = [zero(atom) for atom in equation.invars]
        outputs = _zeros_of(equation, inputs)
        known |= {v: z for v, z in zip(equation.outvars, outputs, strict=True)}
    return [zero(atom) for atom in jaxpr.outvars]


def _is_zero(value: Any) -> bool:
    if isinstance(value, jax.core.Tracer):
        return False
    if not hasattr(value, "dtype") and not isinstance(value, int | float | bool):
        return False
    if jax.dtypes.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.extended):
        return False
    return not np.any(np.asarray(value))


def _zeros_of(equation, inputs: list[bool]) -> list[bool]:
    name, params, count = equation.primitive.name, equation.params, len(equation.outvars)
    if name in _ANY_ZERO:
        return [any(inputs[:2])]
    if name in _ALL_ZERO:
        without_indices = {"scatter-add": inputs[::2], "dynamic_update_slice": inputs[:2]}
        return [all(without_indices.get(name, inputs))]
    if name == "select_n":
        return [all(inputs[1:])]
    if name in ("split", "unstack"):
        return inputs * count
    if name == "optimization_barrier":
        return inputs
    if name in _KEEPS_ZERO:
        return inputs[:count]
    if name == "integer_pow":
        return [inputs[0] and params["y"] > 0]
    if name == "scan":
        return _zeros_of_scan(equation, inputs)
    if name == "while":
        return _zeros_of_while(params, inputs)
    if name == "cond":
        found = [_inside(branch, inputs[1:]) for branch in params["branches"]]
        return [all(zeros) for zeros in zip(*found, strict=True)]
    for key in _CALLS:
        inner = params.get(key)
        if inner is not None and len(getattr(inner, "jaxpr", inner).invars) == len(inputs):
            return _inside(inner, inputs)
    return [False] * count


def _inside(program, inputs: Sequence[bool]) -> list[bool]:
    jaxpr, consts = (program.jaxpr, program.consts) if hasattr(program, "jaxpr") else (program, ())
    return zero_outputs(jaxpr, consts, inputs)


def _zeros_of_scan(equation, inputs: list[bool]) -> list[bool]:
    body = getattr(equation.params["jaxpr"], "jaxpr", equation.params["jaxpr"])

    def scanned(outer, inner) -> int:
        """How many have a leading axis that the body does not see; what tells them apart is named anew by every jax."""
        return sum(len(o.aval.shape) > len(i.aval.shape) for o, i in zip(outer, inner, strict=True))

    carry = len(equation.outvars) - scanned(equation.outvars, body.outvars)
    consts = len(inputs) - carry - scanned(equation.invars, body.invars)
    state = inputs[consts : consts + carry]
    while True:  # what is zero at the start may not stay so; flags only ever fall
        out = _inside(equation.params["jaxpr"], [*inputs[:consts], *state, *inputs[consts + carry :]])
        after = [before and now for before, now in zip(state, out[:carry], strict=True)]
        if after == state:
            return [*state, *out[carry:]]
        state = after


def _zeros_of_while(params, inputs: list[bool]) -> list[bool]:
    of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
    consts, state = inputs[of_test : of_test + of_body], inputs[of_test + of_body :]
    while True:
        out = _inside(params["body_jaxpr"], [*consts, *state])
        after = [before and now for before, now in zip(state, out, strict=True)]
        if after == state:
            return state
        state = after
