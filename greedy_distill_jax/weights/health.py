"""Weights that cannot be right: not finite, far out of range, all zero."""

import collections
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights import names
from greedy_distill_jax.weights.files import listed
from greedy_distill_jax.weights.names import Index
from greedy_distill_jax.weights.source import Source

FAR = 1e4  # far above any weight of a network that multiplies numbers of order one
_EXPONENT = {np.dtype(np.float16): 0x7C00, np.dtype(jnp.bfloat16): 0x7F80}


def finite(value: np.ndarray) -> bool:
    """Whether no value is NaN or infinite."""
    if mask := _EXPONENT.get(value.dtype):  # numpy goes through float32 for them, ten times as slow
        bits = np.ascontiguousarray(value).view(np.uint16)
        return not np.any((bits & np.uint16(mask)) == mask)
    return bool(np.isfinite(value).all())


class FiniteSource(Source):
    """A source that refuses values that are not finite, as they are stored or in the dtype that is asked for.

    Raises:
      UserError: when such a value is read; its field is "allow_nonfinite".
    """

    def __init__(self, source: Source):
        self.path, self.format, self.cfg, self.dtypes = source.path, source.format, source.cfg, source.dtypes
        self.meta, self._source = source.meta, source

    def read_layer(self, path: str, layer: int, index: Index) -> np.ndarray:
        """See `Source`."""
        value = self._source.read_layer(path, layer, index)
        if not finite(value):
            raise self._error(path, layer, value, "allow them")
        return value

    def read(self, path: str, index: Index, dtype: Any) -> np.ndarray:
        """See `Source`."""
        with np.errstate(over="ignore"):
            out = super().read(path, index, dtype)
        if np.dtype(dtype) != self.dtypes[path]:  # which may hold less than the stored one
            stacked = names.split_path(path)[1].stacked
            layers = range(*index[0].indices(self.shapes[path][0])) if stacked else [0]
            for layer, value in zip(layers, out if stacked else out[None], strict=True):
                if not finite(value):
                    raise self._error(path, layer, value, f"choose another dtype than {np.dtype(dtype)}, or allow them")
        return out

    def _error(self, path: str, layer: int, value: np.ndarray, remedy: str) -> UserError:
        name = names.foreign_names(path, self.shapes[path], "original")[layer]
        wide = np.asarray(value, np.float32)
        counts = f"{int(np.isnan(wide).sum())} NaN and {int(np.isinf(wide).sum())} infinite values"
        told = f"{self.path}: tensor {name} holds {counts}; use another file, or {remedy}."
        return UserError(told, "allow_nonfinite")


def findings(source: Source) -> Iterator[str]:
    """Reads every tensor; yields lines about those that are not finite, beyond `FAR` or all zero, or that none is."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for path, shape in source.shapes.items():
        whole = (slice(None),) * len(names.layer_shape(path, shape))
        for layer, name in enumerate(names.foreign_names(path, shape, "original")):
            value = source.read_layer(path, layer, whole)
            if not finite(value):
                found["NaN or inf"].append(name)
            elif not value.any():
                found["all zero"].append(name)
            elif (most := float(max(value.max(), -value.min()))) > FAR:
                found[f"beyond {FAR:g}"].append(f"{name} ({most:.3g})")
    for title, tensors in found.items():
        yield f"{title:<13} {len(tensors)} tensors: {listed(tensors, 4)}"
    if not found:
        yield f"values        all finite, none beyond {FAR:g}, no tensor all zero"
