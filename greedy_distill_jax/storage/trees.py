"""Trees of a state as nested dictionaries of plain names, and their leaves as arrays that can be stored."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

Path = tuple[str, ...]
_READ_BYTES = 2**29


def flatten(tree: Any) -> list[tuple[Path, Any]]:
    """Returns (path of names, leaf) in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(tuple(jax.tree_util.keystr((key,), simple=True) for key in path), leaf) for path, leaf in leaves]


def nest(flat: Mapping[Path, Any]) -> Any:
    """Returns the nested dictionaries of leaves by path, as `flatten` takes them apart."""
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        if not path:
            return leaf
        node = root
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return root


def groups(stored: Mapping[Path, jax.ShapeDtypeStruct], paths: Iterable[Path]) -> list[list[Path]]:
    """Returns the paths of leaves to read together: up to ``_READ_BYTES`` of them are held as they are stored, next to
    the result."""
    groups, size = [[]], 0
    for path in paths:
        size += (of := stored[path].size * stored[path].dtype.itemsize)
        if groups[-1] and size > _READ_BYTES:
            groups.append([])
            size = of
        groups[-1].append(path)
    return groups


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)


def canonical(dtype: Any) -> np.dtype:
    """Returns the dtype in which JAX holds numbers of this one: without its 64-bit mode half as wide as 64 bits."""
    return jax.dtypes.canonicalize_dtype(dtype)


def storable(leaf: Any) -> Any:
    """Returns what is stored of a leaf: an array; of PRNG keys their data."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array):
        return leaf
    leaf = np.asarray(leaf)
    return leaf.astype(canonical(leaf.dtype), copy=False)


def stored_shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns shape, dtype and sharding under which a leaf of the target is stored."""
    sharding = getattr(leaf, "sharding", None) or default_sharding()
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    elif not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, canonical(leaf.dtype), sharding=sharding)


def typed(read: jax.Array, leaf: Any) -> jax.Array:
    """Turns stored key data back into the PRNG keys of the target."""
    if not _is_key(leaf):
        return read
    implementation = []
    jax.eval_shape(lambda key: implementation.append(jax.random.key_impl(key)) or jnp.int32(0), leaf)
    return jax.random.wrap_key_data(read, impl=implementation[0])


def default_sharding() -> Sharding:
    """Returns where arrays go without a sharding: the first device, of several processes a copy on every device."""
    if jax.process_count() == 1:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(Mesh(np.asarray(jax.devices()), ("all",)), PartitionSpec())
