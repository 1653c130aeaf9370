"""Sums that a checkpoint keeps of its arrays and of its JSON: what is read is what was saved, or it is damaged.

Orbax and TensorStore keep no checksums of array data: a bit that flips there decodes to another number.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from greedy_distill_jax.storage.trees import Path

_OF_LEAVES, _OF_META = "sums", "sum"  # in the stored JSON
_SMALL = 2**18  # bytes of a leaf that costs less on the host than a program for it takes to compile
_BLOCK = 2**16  # words at a time on the host, which a core's cache holds
_GOLDEN = 0x9E3779B9  # makes weights of places that look random


def sums(leaves: Mapping[Path, Any]) -> dict[Path, int]:
    """Returns 32 bits of every array: the same for any sharding, other ones as soon as one element has other bits.

    Of arrays over several processes, all of these have to call this with the same, and get the same.

    Args:
      leaves: path -> array of any shape and any dtype that can be stored.
    """
    together: dict[Any, list[Path]] = {}  # one program can only take arrays of the same devices
    leaves = {path: _own(leaf) for path, leaf in leaves.items()}
    for path, leaf in leaves.items():
        devices = None if _is_of_host(leaf) else frozenset(leaf.sharding.device_set)
        together.setdefault(devices, []).append(path)
    of_host = together.pop(None, [])
    # Those of devices are on their way before the host's are begun.
    found = [(paths, _on_devices([leaves[path] for path in paths])) for paths in together.values()]
    with ThreadPoolExecutor() as pool:
        found.append((of_host, list(pool.map(_on_host, jax.device_get([leaves[path] for path in of_host])))))
    by_path = {path: int(x) for paths, values in found for path, x in zip(paths, jax.device_get(values), strict=True)}
    return {path: by_path[path] for path in leaves}


def _own(leaf: Any) -> Any:
    """Returns, of an array that every process has whole, the copy of this one, which needs no program of all."""
    whole = isinstance(leaf, jax.Array) and leaf.is_fully_replicated and not leaf.is_fully_addressable
    return leaf.addressable_data(0) if whole else leaf


def _is_of_host(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return True
    if not leaf.is_fully_addressable:
        return False
    # Of one CPU's memory NumPy has a view; of other arrays a copy, which they keep for as long as they live.
    platforms = [device.platform for device in leaf.sharding.device_set]
    return platforms == ["cpu"] or leaf.nbytes <= _SMALL


@jax.jit
def _on_devices(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Places come from one iota per axis and not from a reshape, which would gather what is sharded."""
    found = []
    for leaf in leaves:
        words = _words(leaf)
        places, stride = jnp.zeros_like(words), 1
        for axis in reversed(range(words.ndim)):
            places += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
            stride *= words.shape[axis]
        found.append(jnp.sum(_hashed(words, places), dtype=jnp.uint32))
    return found


def _words(leaf: jax.Array) -> jax.Array:
    """Returns the bits of every element as uint32, of what is wider in two along a last axis."""
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], -1)
    if leaf.dtype.itemsize == 8:
        return lax.bitcast_convert_type(leaf, jnp.uint32)
    if not _is_whole(leaf.dtype):
        leaf = lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
    return leaf.astype(jnp.uint32)


def _on_host(leaf: np.ndarray) -> int:
    """The same in NumPy: XLA makes of integers on a CPU a copy of the whole array, and then its sum."""
    bits, total, places = np.ravel(leaf), 0, np.arange(_BLOCK, dtype=np.uint32)
    if bits.dtype.itemsize >= 8 or not _is_whole(bits.dtype):
        bits = bits.view(f"uint{8 * min(bits.dtype.itemsize, 4)}")
    for start in range(0, bits.size, _BLOCK):
        words = bits[start : start + _BLOCK].astype(np.uint32)
        hashed = _hashed(words, places[: words.size] + np.uint32(start % 2**32))
        total += int(hashed.sum(dtype=np.uint32))
    return total % 2**32


def _is_whole(dtype: Any) -> bool:
    return dtype == np.bool_ or jnp.issubdtype(dtype, jnp.integer)


def _hashed(words: Any, places: Any) -> Any:
    """Returns what is added up: of two words that differ it differs at every place, and the same word differs by place.

    The shift lets no two changes of highest bits cancel; the weights, which are odd, have an inverse modulo 2**32.
    """
    return (words ^ (words >> 16)) * (places * np.uint32(_GOLDEN) | 1)


def with_sums(meta: Mapping[str, Any], leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """Returns the JSON that is stored: ``meta``, the sums of the leaves, and one of both.

    Raises:
      TypeError: ``meta`` is no JSON.
    """
    meta = json.loads(json.dumps({**meta, _OF_LEAVES: {}}))  # tuples are lists, keys are texts, as they will be read
    meta[_OF_LEAVES] = {"/".join(path): value for path, value in sums(leaves).items()}
    return {**meta, _OF_META: _sum_of(meta)}


def taken_apart(stored: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Path, int] | None]:
    """Returns the ``meta`` and the sums by path that `with_sums` put together; None for older JSON without sums.

    Raises:
      ValueError: it is not what was saved.
    """
    meta = dict(stored)
    if _OF_META in meta and meta.pop(_OF_META) != _sum_of(meta):
        raise ValueError("meta is not what was saved")
    found = meta.pop(_OF_LEAVES, None)
    return meta, None if found is None else {tuple(name.split("/")): value for name, value in found.items()}


def _sum_of(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def check(found: Mapping[Path, int], saved: Mapping[Path, int]) -> None:
    """Compares sums of what was read with those that were saved.

    Raises:
      ValueError: an array is not what was saved; names it.
    """
    for path, value in found.items():
        if saved[path] != value:
            raise ValueError(f"{'/'.join(path)} is not what was saved")
