"""Which key chunks each query chunk sees: the one table type behind every attention of the project.

A chunk is one or a few latent frames. Kernels work on blocks, parts of chunks: ``Pattern.block_lists`` turns the table
into the list of block pairs that are computed, once sorted by query (forward, dq) and once by key (dk and dv). The
networks build their patterns in ``models/students/patterns.py``. Pure numpy; nothing here is traced.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

VOID = -1


class BlockList(NamedTuple):
    """Block pairs in the order in which a kernel visits them.

    Attributes:
      outer: int32 [visits], block whose result the visit adds to, ascending.
      inner: int32 [visits], block it is paired with, ascending within one outer block; ``VOID`` marks the only visit
        of an outer block that has no pair, whose result is zero and still has to be written.
      bounds: int32 [outer blocks + 1]; the visits of outer block i are ``bounds[i] : bounds[i + 1]``.
    """

    outer: np.ndarray
    inner: np.ndarray
    bounds: np.ndarray

    @property
    def q_tokens(self) -> int:
        """Tokens of all query chunks."""
        return self.num_q_chunks * self.q_chunk

    @property
    def k_tokens(self) -> int:
        """Tokens of all key chunks."""
        return self.num_k_chunks * self.k_chunk

    @property
    def pairs(self) -> int:
        """Block pairs that are computed."""
        return int((self.inner != VOID).sum())

    @property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """(first, last), bool [visits]: whether a visit is the first, the last one of its outer block."""
        first, last = np.zeros((2, len(self.outer)), bool)
        first[self.bounds[:-1]] = True
        last[self.bounds[1:] - 1] = True
        return first, last


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A hashable table of chunks: who sees whom.

    Attributes:
      q_chunk: tokens in one query chunk.
      k_chunk: tokens in one key chunk.
      num_k_chunks: number of key chunks the keys hold.
      table: for every query chunk the key chunks it sees, without repetition. The order counts only where a part of
        the list is visible (``chunk_attention``'s ``lengths_Q``). An empty list is legal: such a query gets zeros.
    """

    q_chunk: int
    k_chunk: int
    num_k_chunks: int
    table: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        for name in ("q_chunk", "k_chunk", "num_k_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"Pattern.{name} must be at least 1, got {getattr(self, name)}.")
        for i, row in enumerate(self.table):
            if len(set(row)) != len(row):
                raise ValueError(f"Pattern.table[{i}] names a key chunk twice: {row}.")
            bad = [j for j in row if not 0 <= j < self.num_k_chunks]
            if bad:
                raise ValueError(f"Pattern.table[{i}] names key chunk {bad[0]}; there are {self.num_k_chunks}.")

    @classmethod
    def from_table(
        cls, table: Iterable[Iterable[int]], *, q_chunk: int, num_k_chunks: int, k_chunk: int | None = None
    ) -> "Pattern":
        """A pattern from any lists of visible key chunks, one per query chunk."""
        rows = tuple(tuple(int(j) for j in row) for row in table)
        return cls(q_chunk, k_chunk or q_chunk, num_k_chunks, rows)

    @classmethod
    def full(cls, chunks: int, tokens: int, num_k_chunks: int | None = None, k_chunk: int | None = None) -> "Pattern":
        """Every one of ``chunks`` query chunks sees every key chunk; by default the keys are the same chunks."""
        num_k_chunks = num_k_chunks or chunks
        return cls(tokens, k_chunk or tokens, num_k_chunks, (tuple(range(num_k_chunks)),) * chunks)

    @classmethod
    def sliding_window(cls, chunks: int, tokens: int, window: int, sink: int = 0) -> "Pattern":
        """Chunk i sees [i - window + 1, i] and the first ``sink`` chunks.

        ``window`` counts the chunk itself; the sink comes on top of it.
        """
        if window < 1 or sink < 0:
            raise ValueError(f"window must be at least 1 and sink at least 0, got window={window}, sink={sink}.")
        rows = ({*range(min(sink, i + 1)), *range(max(0, i - window + 1), i + 1)} for i in range(chunks))
        return cls.from_table(map(sorted, rows), q_chunk=tokens, num_k_chunks=chunks)

    @property
    def num_q_chunks(self) -> int:
        """Number of query chunks."""
        return len(self.table)

    @property
    def q_tokens(self) -> int:
        """Tokens of all query chunks."""
        return self.num_q_chunks * self.q_chunk

    @property
    def k_tokens(self) -> int:
        """Tokens of all key chunks."""
        return self.num_k_chunks * self.k_chunk

    @property
    def pairs(self) -> int:
        """Query-key token pairs that are computed: the honest basis for FLOPs."""
        return self.q_chunk * self.k_chunk * sum(map(len, self.table))

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        return all(len(row) == self.num_k_chunks for row in self.table)

    def merged(self) -> "Pattern":
        """The same attention with one chunk of queries and one of keys where everybody sees everything, else self."""
        if not self.is_full or not self.table:
            return self
        return Pattern(self.q_tokens, self.k_tokens, 1, ((0,),))

    def padded(self) -> tuple[np.ndarray, np.ndarray]:
        """(index, visible), both [query chunks, longest list]; index is 0 where not visible."""
        width = max(1, max(map(len, self.table)))
        index = np.zeros((self.num_q_chunks, width), np.int32)
        visible = np.zeros((self.num_q_chunks, width), bool)
        for i, row in enumerate(self.table):
            index[i, : len(row)] = row
            visible[i, : len(row)] = True
        return index, visible

    def ranks(self) -> np.ndarray:
        """int32 [query chunks, key chunks]: the place of a key chunk in the list, ``num_k_chunks`` if it has none."""
        ranks = np.full((self.num_q_chunks, self.num_k_chunks), self.num_k_chunks, np.int32)
        for i, row in enumerate(self.table):
            ranks[i, list(row)] = np.arange(len(row))
        return ranks

    def chunk_mask(self) -> np.ndarray:
        """bool [query chunks, key chunks]."""
        mask = np.zeros((self.num_q_chunks, self.num_k_chunks), bool)
        for i, row in enumerate(self.table):
            mask[i, list(row)] = True
        return mask

    def dense_mask(self) -> np.ndarray:
        """bool [query tokens, key tokens], for the reference and for pictures."""
        return self.chunk_mask().repeat(self.q_chunk, 0).repeat(self.k_chunk, 1)

    def block_lists(self, block_q: int, block_k: int) -> tuple[BlockList, BlockList]:
        """The block pairs with something to compute: (sorted by query, sorted by key).

        Args:
          block_q: query tokens of a block; every chunk is cut on its own, so its last block may be shorter.
          block_k: the same for keys.

        Returns:
          Lists over blocks numbered chunk after chunk: query blocks are outer in the first list, inner in the second.
        """
        return _block_lists(self, block_q, block_k)

    def block_pairs(self, block_q: int, block_k: int) -> int:
        """Token pairs a kernel with these blocks computes; more than ``pairs`` where blocks do not divide chunks."""
        by_query, _ = self.block_lists(block_q, block_k)
        return by_query.pairs * block_q * block_k


@functools.lru_cache(maxsize=256)
def _block_lists(pattern: Pattern, block_q: int, block_k: int) -> tuple[BlockList, BlockList]:
    columns: list[list[int]] = [[] for _ in range(pattern.num_k_chunks)]
    for i, row in enumerate(pattern.table):
        for j in row:
            columns[j].append(i)
    per_q, per_k = -(-pattern.q_chunk // block_q), -(-pattern.k_chunk // block_k)
    return _expand(pattern.table, per_q, per_k), _expand(columns, per_k, per_q)


def _expand(rows: Sequence[Sequence[int]], per_outer: int, per_inner: int) -> BlockList:
    """Chunk lists -> block list, with the given numbers of blocks per chunk."""
    lists = []
    for row in rows:
        chunks = np.sort(np.asarray(row, np.int32))
        blocks = (chunks[:, None] * per_inner + np.arange(per_inner, dtype=np.int32)).reshape(-1)
        lists += [blocks if len(blocks) else np.array([VOID], np.int32)] * per_outer
    lengths = [len(blocks) for blocks in lists]
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    outer = np.repeat(np.arange(len(lists), dtype=np.int32), lengths)
    return BlockList(outer, np.concatenate(lists) if lists else np.zeros(0, np.int32), bounds)


def largest_divisor(tokens: int, limit: int, multiple: int = 1) -> int | None:
    """The largest divisor of ``tokens`` that is at most ``limit`` and a multiple of ``multiple``; None if none is."""
    return max((d for d in range(1, min(limit, tokens) + 1) if tokens % d == 0 and d % multiple == 0), default=None)
