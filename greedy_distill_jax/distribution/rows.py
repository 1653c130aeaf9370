"""Global arrays as the rows of this process, for work on the host between two jitted functions."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from greedy_distill_jax.distribution.mesh import batch_parts, feeding
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
    rows, processes = np.asarray(rows), jax.process_count()
    share, shares = feeding(batch_parts(mesh), jax.process_index(), processes)
    if rows.ndim and shares < processes:
        rows = multihost_utils.process_allgather(rows)[share * processes // shares]
    sharding = NamedSharding(mesh, RULES.spec(("batch",)[: rows.ndim]))
    return jax.make_array_from_process_local_data(sharding, rows)


def whole_here(tree: Any) -> Any:
    """The arrays of a tree, whole on the first device of every process; all processes have to call this.

    Array by array, so that no device but these holds more than one of them whole.
    """
    return jax.tree.map(_whole_here, tree)


def _whole_here(x: jax.Array) -> jax.Array:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x).addressable_data(0)


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
