"""What the Hopper kernels compute, as tables of integers: key blocks per query tile, tiles per thread block.

A *visit* is one block of the inner side (keys; for dk and dv, queries) that a tile of the outer side meets.
Neighbouring chunks of a list are one run of tokens, so that a block may lie across chunks; only the last block of a run
is partly masked. What lies behind a run in such a block is read and weighs 0, so it has to be finite; with lengths that
are known at run time, where free slots may hold anything, every chunk is a run and nothing behind it is read. Full
visits come first: the loop over them has no mask.
"""

import functools
import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.ops.attention.pattern import Pattern

SMS = 132  # multiprocessors of an H100 SXM and of an H200; on a card with fewer parts take two rounds
# What splitting costs, in visits: the launch that merges parts, and each part's share of what it moves.
MERGING, PART = 4, 2 / SMS


class Visits(NamedTuple):
    """The visits of every outer chunk; int32.

    Attributes:
      starts: [chunks, most visits], first inner token of a visit's block.
      valid: [chunks, most visits], how many tokens of the block count.
      full: [chunks], the visits whose whole block counts; they come first.
      total: [chunks], all visits.
    """

    starts: Any
    valid: Any
    full: Any
    total: Any


class Parts(NamedTuple):
    """Which thread block computes what; int32.

    Attributes:
      parts: [parts, 6]: example, outer chunk, head, tile of the chunk, first visit, end of the visits.
      bounds: [thread blocks + 1]; thread block i computes ``parts[bounds[i] : bounds[i + 1]]``.
      split: whether tiles are cut into parts that have to be merged.
    """

    parts: np.ndarray
    bounds: np.ndarray
    split: bool


def by_query(pattern: Pattern) -> list[tuple[int, ...]]:
    """For every query chunk its key chunks."""
    return list(pattern.table)


def by_key(pattern: Pattern) -> list[tuple[int, ...]]:
    """For every key chunk the query chunks that list it."""
    columns: list[list[int]] = [[] for _ in range(pattern.num_k_chunks)]
    for i, row in enumerate(pattern.table):
        for j in row:
            columns[j].append(i)
    return [tuple(column) for column in columns]


def visible(pattern: Pattern, rows: Sequence[Sequence[int]], lengths_Q, *, keys: bool):
    """bool [rows, longest row]: what counts of every list where only the first ``lengths_Q`` chunks of a query's do."""
    width = max(1, max(map(len, rows)))
    outer = np.repeat(np.arange(len(rows)), width).reshape(len(rows), width)
    inner = np.array([[*row, *[0] * (width - len(row))] for row in rows]).reshape(len(rows), width)
    query, key = (inner, outer) if keys else (outer, inner)
    return jnp.asarray(pattern.ranks()[query, key]) < lengths_Q[query]


def visits(rows: Sequence[Sequence[int]], chunk: int, block: int, counts=None) -> tuple[Visits, tuple[int, ...]]:
    """(the visits of every row, how many it has where whole lists count).

    Args:
      rows: lists of inner chunks.
      chunk: tokens of an inner chunk.
      block: tokens of a block.
      counts: bool [rows, longest row] from ``visible``, known at run time; None where whole lists count.
    """
    lists = [_runs(row) if counts is None else [(j, 1, place) for place, j in enumerate(row)] for row in rows]
    found = [
        [
            (first * chunk + at, min(block, many * chunk - at), place)
            for first, many, place in runs
            for at in range(0, many * chunk, block)
        ]
        for runs in lists
    ]
    found = [sorted(row, key=lambda visit: visit[1] < block) for row in found]
    work = tuple(map(len, found))
    width = max(1, *work)
    table = np.array([row + [(0, 0, 0)] * (width - len(row)) for row in found], np.int32).reshape(-1, width, 3)
    starts, valid, place = np.moveaxis(table, -1, 0)
    if counts is None:
        return Visits(starts, valid, (valid == block).sum(1, dtype=np.int32), np.array(work, np.int32)), work
    live = jnp.take_along_axis(counts, jnp.asarray(place), axis=1) & (valid > 0)
    kind = jnp.where(live, jnp.where(valid == block, 0, 1), 2)  # full, partly, not at all
    order = jnp.argsort(kind, axis=1, stable=True)
    starts, valid = (jnp.take_along_axis(jnp.asarray(x), order, axis=1) for x in (starts, valid))
    full, total = (jnp.sum(kind <= most, axis=1, dtype=jnp.int32) for most in (0, 1))
    return Visits(starts, valid, full, total), work


def _runs(row: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first chunk, chunks, 0) of neighbouring chunks."""
    runs: list[list[int]] = []
    for j in sorted(row):
        if runs and sum(runs[-1]) == j:
            runs[-1][1] += 1
        else:
            runs.append([j, 1])
    return [(first, many, 0) for first, many in runs]


@functools.lru_cache(maxsize=256)
def schedule(work: tuple[int, ...], batch: int, heads: int, tiles: int, *, may_split: bool) -> Parts:
    """Whole tiles, one per thread block and the longest first, or parts of equal work where that takes less time.

    Few tiles fill the last round of a card's multiprocessors badly: a frame of 1560 tokens in 12 heads has 156 tiles,
    which is two rounds of 132. Cut into parts of equal work they are 1.2.

    Args:
      work: visits of a tile of every outer chunk.
      batch: examples.
      heads: heads.
      tiles: tiles per outer chunk.
      may_split: whether the kernel can merge parts.
    """
    units = [(b, c, h, t) for b in range(batch) for c in range(len(work)) for h in range(heads) for t in range(tiles)]
    units.sort(key=lambda unit: -work[unit[1]])
    total = sum(work) * batch * heads * tiles
    if not may_split or total == 0 or _split(total, len(units)) >= _rounds([work[unit[1]] for unit in units]):
        return Parts(
            np.array([(*unit, 0, work[unit[1]]) for unit in units], np.int32).reshape(-1, 6),
            np.arange(len(units) + 1, dtype=np.int32),
            False,
        )
    parts, bounds, done, place, offset = [], [0], 0, 0, 0
    for block in range(1, SMS + 1):
        end = total * block // SMS
        while done < end:
            many = min(end - done, work[units[place][1]] - offset)
            parts.append((*units[place], offset, offset + many))
            done, offset = done + many, offset + many
            if offset == work[units[place][1]]:
                place, offset = place + 1, 0
        bounds.append(len(parts))
    # A tile without a visit has a part as well: its result, zeros, is written by whoever comes last.
    parts += [(*unit, 0, 0) for unit in units if work[unit[1]] == 0]
    bounds[-1] = len(parts)
    return Parts(np.array(parts, np.int32), np.array(bounds, np.int32), True)


def busy(plan: Parts) -> float:
    """The share of the multiprocessors' time, until the last one is done, that goes into visits; 0 without any."""
    lengths = plan.parts[:, 5] - plan.parts[:, 4]
    blocks = [int(lengths[a:b].sum()) for a, b in zip(plan.bounds, plan.bounds[1:])]
    return sum(blocks) / max(SMS * _rounds(blocks), 1)


def _split(total: int, tiles: int) -> float:
    """Visits that take as long as parts of equal work and merging them."""
    return total / SMS + MERGING + PART * (tiles + SMS)


def _rounds(lengths: Sequence[int]) -> int:
    """Visits until the last multiprocessor is done, where each takes the next tile when it is free."""
    free = [0] * SMS
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


def merging(parts: Parts, chunks: int, batch: int, heads: int, tiles: int) -> np.ndarray:
    """int32 [batch, chunks, heads, tiles, most parts]: the parts of every tile, ``len(parts.parts)`` where none is."""
    found: dict[tuple[int, ...], list[int]] = {}
    for number, (b, c, h, t, _, _) in enumerate(parts.parts.tolist()):
        found.setdefault((b, c, h, t), []).append(number)
    most = max(map(len, found.values()))
    index = np.full((batch, chunks, heads, tiles, most), len(parts.parts), np.int32)
    for place, numbers in found.items():
        index[place][: len(numbers)] = numbers
    return index
