"""Global arrays as the rows of this process, for work on the host between two jitted functions."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from greedy_distill_jax.distribution.mesh import batch_parts, feeding, parts_of
from greedy_distill_jax.distribution.sharding import RULES


def local_rows(x: jax.Array) -> np.ndarray:
    """This process's rows of an array, in their order; waits for it. What is whole everywhere is returned whole.

    Raises:
      ValueError: an array whose other axes are split, too.
    """
    rows = {}
    for shard in x.addressable_shards:
        if any(index != slice(None) and index != slice(0, n) for index, n in zip(shard.index[1:], x.shape[1:])):
            raise ValueError(f"local_rows: an array of shape {x.shape} is split along more than its first axis.")
        begin = (shard.index[0].start or 0) if shard.index else 0
        rows.setdefault(begin, shard)
    parts = [np.asarray(rows[begin].data) for begin in sorted(rows)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def global_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """The array of which every process gives its rows, examples of a batch; a number is the same in all processes.

    Of several processes with the same rows, as where ``context`` or ``tensor`` spans hosts, the first one's count, for
    a reward may judge twice and not alike. All processes have to call this.
    """
    rows = np.asarray(rows)
    sharding = NamedSharding(mesh, RULES.spec(("batch",)[: rows.ndim]))
    if not rows.ndim:
        return jax.make_array_from_process_local_data(sharding, rows)
    fed = feeding(mesh)
    if len(set(fed.values())) < len(fed):
        first = min(process for process, parts in fed.items() if parts == fed[jax.process_index()])
        rows = multihost_utils.process_allgather(rows)[first]
    return assembled(rows, sharding)


def assembled(rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The array whose rows of this process's parts are ``rows``, see ``mesh.parts_of``; its first axis is the batch."""
    parts = parts_of(sharding.mesh, jax.process_index())
    size = len(rows) // len(parts)
    shape = (size * batch_parts(sharding.mesh), *rows.shape[1:])

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])  # of one part
        first = parts.index(start // size) * size
        return rows[(slice(first, first + stop - start), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, shard)


def whole_at_first(tree: Any) -> Any:
    """The arrays of a tree, whole on the first device of process 0; None elsewhere. All processes have to call this.

    Array by array, so that no other device holds more than one of them whole.
    """
    return jax.tree.map(_whole_at_first, tree)


def _whole_at_first(x: jax.Array) -> jax.Array | None:
    # One at a time: of several that are under way, Gloo's may wait for one another.
    whole = jax.block_until_ready(_gather(NamedSharding(x.sharding.mesh, PartitionSpec()))(x))
    return None if jax.process_index() else whole.addressable_data(0)


@functools.cache
def _gather(sharding: NamedSharding):
    return jax.jit(lambda x: x, out_shardings=sharding)


class Rows(Mapping[str, Any]):
    """This process's rows of arrays by name, fetched when they are asked for.

    Attributes:
      arrays: the global ones.
      others: what is of this process alone, by name.
    """

    def __init__(self, arrays: Mapping[str, jax.Array], others: Mapping[str, Any] | None = None):
        self.arrays, self.others = arrays, others or {}

    def __getitem__(self, name: str) -> Any:
        return self.others[name] if name in self.others else local_rows(self.arrays[name])

    def __iter__(self) -> Iterator[str]:
        return iter([*self.arrays, *self.others])

    def __len__(self) -> int:
        return len(self.arrays) + len(self.others)
