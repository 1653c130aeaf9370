"""How modules declare their parameters."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError


def parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> jax.Array:
    """``module.param(name, init, shape, float32)``, without what Flax does to check one that is there.

    Flax traces ``init`` for it at every call, which takes a good part of the time that a network takes to trace.

    Raises:
      flax.errors.ScopeParamShapeError: the parameter that is there has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape, jnp.float32)
    value = module.get_variable("params", name)
    if value.shape != shape:
        raise ScopeParamShapeError(name, module.scope.path_text, value.shape, shape)
    return value
