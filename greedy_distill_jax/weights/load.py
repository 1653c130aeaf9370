"""A source onto devices, without a full copy on the host."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from greedy_distill_jax.distribution.sharding import leaf_paths
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights.architecture import nest
from greedy_distill_jax.weights.source import Source

DTYPES = ("keep", "float32", "bfloat16", "float16")


def stored_dtype(source: Source, path: str, dtype: str) -> np.dtype:
    """Returns the dtype a leaf is converted to; "keep" keeps the stored one (the widest, where layers differ)."""
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}.", "dtype")
    return source.dtypes[path] if dtype == "keep" else np.dtype(jnp.dtype(dtype))


def load(
    source: Source,
    *,
    sharding: Sharding | Callable[[Any], Any] | None = None,
    dtype: str | Callable[[str], str] = "keep",
) -> Any:
    """Loads our parameter tree of a source, leaf by leaf and shard by shard in its target sharding.

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
