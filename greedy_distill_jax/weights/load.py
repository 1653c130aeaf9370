"""A source onto devices, and two sources against each other, without a full copy on the host."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from greedy_distill_jax.distribution.sharding import leaf_paths
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights import names
from greedy_distill_jax.weights.source import Source, nest, parameter_shapes, wan_of

DTYPES = ("keep", "float32", "bfloat16", "float16")


def stored_dtype(source: Source, path: str, dtype: str) -> np.dtype:
    """The dtype a leaf is converted to; "keep" keeps the stored one (the widest, where layers differ)."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}.")
    return source.dtypes[path] if dtype == "keep" else np.dtype(jnp.dtype(dtype))


def load(
    source: Source, *, sharding: Sharding | Callable[[Any], Any] | None = None,
    dtype: str | Callable[[str], str] = "keep",
) -> Any:  # fmt: skip
    """Our parameter tree of a source, leaf by leaf and shard by shard in its target sharding.

    A shard is assembled on the host from the slices it needs of every layer, put on its device and freed before the
    next one is read: the host holds one shard (and one layer of it) besides what the devices hold.

    Args:
      source: from `open_source`.
      sharding: one for every leaf, or a function from the tree of shapes to a tree of shardings (such as
        ``functools.partial(sharding.shardings, mesh=mesh)``); None for the default device.
      dtype: one of `DTYPES`, or a function from the path of a leaf to one of them.

    Raises:
      UserError: a tensor that cannot be read.
    """
    dtype_of = dtype if callable(dtype) else lambda path: dtype
    shapes = {
        p: jax.ShapeDtypeStruct(shape, stored_dtype(source, p, dtype_of(p))) for p, shape in source.shapes.items()
    }
    if callable(sharding) and not isinstance(sharding, Sharding):
        placed = dict(leaf_paths(sharding(nest(shapes))))
    else:
        placed = dict.fromkeys(shapes, sharding or SingleDeviceSharding(jax.local_devices()[0]))
    return nest({path: _load_leaf(source, path, shape, placed[path]) for path, shape in shapes.items()})


def _load_leaf(source: Source, path: str, shape: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
    pieces: dict[jax.Device, jax.Array] = {}
    by_index: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape.shape).items():
        by_index.setdefault(tuple(s.indices(n) for s, n in zip(index, shape.shape)), []).append(device)
    for index, devices in by_index.items():
        piece = source.read(path, tuple(slice(*s) for s in index), shape.dtype)
        for device in devices:  # replicas share one read
            pieces[device] = jax.device_put(piece, device)
        jax.block_until_ready([pieces[device] for device in devices])
    order = [pieces[device] for device in sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays(shape.shape, sharding, order)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two tensors of the same name differ."""

    name: str
    largest: float  # max |a - b|, nan where one is not finite and the other differs
    dtypes: tuple[str, str]


def compare(a: Source, b: Source) -> list[Difference]:
    """Tensor by tensor, in float64: those whose bits differ (or whose dtypes do), named as Wan names them.

    Raises:
      UserError: the two have different parameters.
    """
    if a.shapes != b.shapes:
        only = sorted(set(a.shapes.items()) ^ set(b.shapes.items()), key=str)
        raise UserError(
            f"{a.path} and {b.path} have different parameters, first {only[0][0]} {list(only[0][1])}; "
            "compare two conversions of one model."
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
