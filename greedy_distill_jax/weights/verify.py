"""Two sources against each other, tensor by tensor, without a full copy on the host."""

import dataclasses

import numpy as np

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights import names
from greedy_distill_jax.weights.architecture import parameter_shapes, wan_of
from greedy_distill_jax.weights.inspect import tensor_count
from greedy_distill_jax.weights.source import Source


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two tensors of the same name differ."""

    name: str
    largest: float  # max |a - b|, nan where one is not finite and the other differs
    dtypes: tuple[str, str]


def compare(a: Source, b: Source) -> list[Difference]:
    """Compares tensor by tensor: returns those whose bits differ (or whose dtypes do), named as Wan names them.

    Raises:
      UserError: the two have different parameters.
    """
    if a.shapes != b.shapes:
        only = sorted(set(a.shapes.items()) ^ set(b.shapes.items()), key=str)
        raise UserError(
            f"{a.path} and {b.path} have different parameters, first {only[0][0]} {list(only[0][1])}; "
            "compare two conversions of one model.",
            field="path",
        )
    out = []
    for path, shape in parameter_shapes(a.cfg).items():
        whole = (slice(None),) * len(names.layer_shape(path, shape))
        for layer, name in enumerate(names.foreign_names(path, shape, "original")):
            x, y = a.read_layer(path, layer, whole), b.read_layer(path, layer, whole)
            x, y = (names.to_foreign(path, np.asarray(v), patch=wan_of(a.cfg).patch) for v in (x, y))
            if x.dtype != y.dtype or x.tobytes() != y.tobytes():
                with np.errstate(invalid="ignore"):
                    gap = np.abs(x.astype(np.float64) - y.astype(np.float64))
                largest = float(np.max(np.where(x.astype(np.float64) == y.astype(np.float64), 0.0, gap), initial=0.0))
                out.append(Difference(name, largest, (str(x.dtype), str(y.dtype))))
    return out


def verdict(a: Source, b: Source, atol: float | None = None) -> tuple[bool, list[str]]:
    """Says in words how two sources differ.

    Args:
      a, b: from `open_source`.
      atol: differences up to it, in float64, do not count; None for identical bits and dtypes.

    Returns:
      (whether they are the same, the lines of `convert verify`: the ten largest differences, then the result).
    """
    different = compare(a, b)
    beyond = [d for d in different if atol is None or not d.largest <= atol]
    lines = [
        f"{d.name}: max |a - b| = {d.largest:.3g} ({' against '.join(d.dtypes)})"
        for d in sorted(beyond, key=lambda d: -d.largest)[:10]
    ]
    count = tensor_count(a)
    if beyond:
        return False, [*lines, f"{len(beyond)} of {count} tensors differ"]
    how = f"agree within {atol:g}" if different else "are identical bit by bit"
    return True, [f"{count} tensors {how}"]
