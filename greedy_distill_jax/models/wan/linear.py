"""The linear layer of all networks: float32 parameters, a matmul in the compute dtype, gradients in float32.

Plain differentiation would make the gradient of a kernel, and sum it over devices, in the dtype of the matmul: with
bfloat16 every one of the partial sums is rounded to 8 bits, and the error grows with the number of devices.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from greedy_distill_jax.models.parameter import parameter
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.ops.varying import summed_as

FLOAT32 = ("time_in", "time_out", "time_projection", "projection")  # names of the layers that ``float32_dense`` makes


def _linear(precision, x, kernel, bias):
    y = jax.lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())), precision=precision)
    return y + bias.astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def _forward(precision, x, kernel, bias):
    return _linear(precision, x, kernel, bias), (x, kernel, bias)


def _backward(precision, saved, g):
    x, kernel, _ = saved
    rows = tuple(range(x.ndim - 1))
    of_x = jax.lax.dot_general(g, kernel.astype(g.dtype), (((g.ndim - 1,), (1,)), ((), ())), precision=precision)
    of_kernel = jax.lax.dot_general(
        x, g, ((rows, rows), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    of_bias = jnp.sum(g.astype(jnp.float32), axis=rows)
    found = zip((of_x, of_kernel, of_bias), saved, strict=True)
    return tuple(summed_as(gradient, of).astype(of.dtype) for gradient, of in found)


_linear_in_float32 = jax.custom_vjp(_linear, nondiff_argnums=(0,))
_linear_in_float32.defvjp(_forward, _backward)


class Dense(nn.Module):
    """x kernel + bias.

    Attributes:
      features: of the result.
      dtype: of the matmul and of the result.
      gradient_dtype: see ``WanConfig``.
      kernel_init: of the kernel; the bias starts at 0.
      precision: of the matmul, see ``jax.lax.Precision``.
    """

    features: int
    dtype: DTypeLike
    gradient_dtype: str = "float32"
    kernel_init: Callable = nn.initializers.xavier_uniform()
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*rows features"]) -> Float[Array, "*rows out"]:
        kernel = parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
        call = _linear_in_float32 if self.gradient_dtype == "float32" else _linear
        return call(self.precision, x.astype(self.dtype), kernel, bias)


def dense(features: int, cfg: WanConfig, kernel_init: Callable | None = None, name: str | None = None) -> Dense:
    """Makes a layer with a ``cfg.dtype`` matmul."""
    return Dense(features, cfg.dtype, cfg.gradient_dtype, kernel_init or nn.initializers.xavier_uniform(), name=name)


def float32_dense(features: int, cfg: WanConfig, kernel_init: Callable | None = None, name: str | None = None) -> Dense:
    """Makes one of the layers that are float32 whatever ``cfg.dtype`` is, as in Wan: time embedding and head.

    They cost little, and what they round is in every frame. Full precision keeps accelerators from taking fewer bits.
    """
    return Dense(
        features,
        "float32",
        cfg.gradient_dtype,
        kernel_init or nn.initializers.xavier_uniform(),
        jax.lax.Precision.HIGHEST,
        name=name,
    )


def is_cast(layer: str | None, name: str | None) -> bool:
    """Whether the parameter ``name`` of a layer is one that its calls cast to ``WanConfig.dtype``."""
    return name == "kernel" and layer not in FLOAT32


def compute_precision(params: Any, dtype: str) -> Any:
    """Parameters that are not trained, or their shapes, with kernels in the dtype that they are used in.

    ``Dense`` casts them to it at every call: nothing that is computed changes, and bfloat16 takes half the memory.
    """

    def cast(path, leaf):
        layer, name = (getattr(key, "key", None) for key in path[-2:])
        wanted = jnp.dtype(dtype) if is_cast(layer, name) else leaf.dtype
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, wanted)
        return leaf.astype(wanted)  # where it is

    return jax.tree_util.tree_map_with_path(cast, params)
