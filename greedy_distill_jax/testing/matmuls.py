"""Counts the matmuls and convolutions of a traced function: what closed-form FLOPs are checked against."""

import math

import jax
from jax.interpreters import partial_eval


def count_matmuls(call, *args, while_trips: float = 1.0) -> float:
    """Floating-point operations of all matmuls and convolutions in the jaxpr of ``call(*args)``, loops by their length.

    Args:
      call, *args: anything that can be traced; shapes are enough.
      while_trips: iterations of a loop without a static length (the denoising steps up to a drawn exit).
    """
    jaxpr = jax.make_jaxpr(call)(*args).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # the compiler leaves out what nobody uses
    return _count(used, while_trips)


def _count(jaxpr, while_trips: float) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2.0 * math.prod(out) * math.prod(lhs[i] for i in contract)
            continue
        if name == "conv_general_dilated":  # every output sums over the kernel's window and its input features
            _, inputs, *window = params["dimension_numbers"].rhs_spec
            kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
            total += 2.0 * math.prod(out) * math.prod(kernel[i] for i in (inputs, *window))
            continue
        times = params["length"] if name == "scan" else while_trips if name == "while" else 1.0
        inner = [_count(sub, while_trips) for sub in _jaxprs(params)]
        total += times * (max(inner, default=0.0) if name == "cond" else sum(inner))
    return total


def _jaxprs(params):
    for name, value in params.items():
        if name == "bwd" or callable(value):
            continue
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner
