"""Which key chunks each query chunk sees: the static table behind every attention pattern of the project."""

import dataclasses
from collections.abc import Sequence

import numpy as np

Table = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A hashable chunk table.

    Attributes:
      q_chunk: tokens in one query chunk.
      k_chunk: tokens in one key chunk.
      num_k_chunks: number of key chunks the keys hold.
      table: for every query chunk the key chunks it sees, in any order, without repetition. An empty
        list is legal: such a query gets zeros.
    """

    q_chunk: int
    k_chunk: int
    num_k_chunks: int
    table: Table

    def __post_init__(self):
        for name in ("q_chunk", "k_chunk", "num_k_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"Schedule.{name} must be at least 1, got {getattr(self, name)}.")
        for i, row in enumerate(self.table):
            if len(set(row)) != len(row):
                raise ValueError(f"Schedule.table[{i}] names a key chunk twice: {row}.")
            bad = [j for j in row if not 0 <= j < self.num_k_chunks]
            if bad:
                raise ValueError(f"Schedule.table[{i}] names key chunk {bad[0]}; there are {self.num_k_chunks}.")

    @classmethod
    def from_table(
        cls, table: Sequence[Sequence[int]], *, q_chunk: int, num_k_chunks: int, k_chunk: int | None = None
    ) -> "Schedule":
        """Any pattern: one list of visible key chunks per query chunk."""
        rows = tuple(tuple(int(j) for j in row) for row in table)
        return cls(q_chunk, k_chunk or q_chunk, num_k_chunks, rows)

    @classmethod
    def full(cls, chunks: int, tokens: int) -> "Schedule":
        """Bidirectional attention over ``chunks`` chunks (the teacher)."""
        return cls.from_table([range(chunks)] * chunks, q_chunk=tokens, num_k_chunks=chunks)

    @classmethod
    def sliding_window(cls, chunks: int, tokens: int, window: int, sink: int = 0) -> "Schedule":
        """Chunk i sees [i - window + 1, i] and the first ``sink`` chunks (METHOD_SPEC B.1, E.3).

        ``window`` counts the chunk itself; the sink comes on top of it.
        """
        if window < 1 or sink < 0:
            raise ValueError(f"window must be at least 1 and sink at least 0, got window={window}, sink={sink}.")
        rows = [sorted({*range(min(sink, i + 1)), *range(max(0, i - window + 1), i + 1)}) for i in range(chunks)]
        return cls.from_table(rows, q_chunk=tokens, num_k_chunks=chunks)

    @property
    def num_q_chunks(self) -> int:
        """Number of query chunks."""
        return len(self.table)

    @property
    def pairs(self) -> int:
        """Query-key token pairs that are computed: the honest basis for FLOPs."""
        return self.q_chunk * self.k_chunk * sum(map(len, self.table))

    def padded(self) -> tuple[np.ndarray, np.ndarray]:
        """(index, visible), both [query chunks, longest list]; index is 0 where not visible."""
        width = max(1, max(map(len, self.table)))
        index = np.zeros((self.num_q_chunks, width), np.int32)
        visible = np.zeros((self.num_q_chunks, width), bool)
        for i, row in enumerate(self.table):
            index[i, : len(row)] = row
            visible[i, : len(row)] = True
        return index, visible

    def dense_mask(self) -> np.ndarray:
        """bool [query tokens, key tokens], for the reference and for pictures."""
        mask = np.zeros((self.num_q_chunks, self.num_k_chunks), bool)
        for i, row in enumerate(self.table):
            mask[i, list(row)] = True
        return mask.repeat(self.q_chunk, 0).repeat(self.k_chunk, 1)
