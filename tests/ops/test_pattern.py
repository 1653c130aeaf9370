"""The chunk table and the block lists made of it (numpy only)."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from greedy_distill_jax.models.students import patterns as layouts
from greedy_distill_jax.models.students.config import CausalConfig, StudentConfig
from greedy_distill_jax.ops.attention.pattern import VOID, Pattern, largest_divisor


@st.composite
def patterns(draw):
    num_k = draw(st.integers(1, 6))
    rows = draw(st.lists(st.sets(st.integers(0, num_k - 1)), min_size=1, max_size=6))
    return Pattern.from_table(
        [draw(st.permutations(sorted(row))) for row in rows],
        q_chunk=draw(st.integers(1, 7)),
        k_chunk=draw(st.integers(1, 7)),
        num_k_chunks=num_k,
    )


@settings(max_examples=200)
@given(patterns(), st.integers(1, 8), st.integers(1, 8))
def test_block_lists_cover_exactly_the_table(pattern, block_q, block_k):
    per_q, per_k = -(-pattern.q_chunk // block_q), -(-pattern.k_chunk // block_k)
    by_query, by_key = pattern.block_lists(block_q, block_k)
    expected = {
        (i * per_q + a, j * per_k + b)
        for i, row in enumerate(pattern.table)
        for j in row
        for a in range(per_q)
        for b in range(per_k)
    }
    seen = {}
    for name, pairs, blocks in (
        ("query", by_query, pattern.num_q_chunks * per_q),
        ("key", by_key, pattern.num_k_chunks * per_k),
    ):
        visits = list(zip(pairs.outer.tolist(), pairs.inner.tolist(), strict=True))
        assert visits == sorted(visits) and len(set(visits)) == len(visits)
        assert sorted(set(pairs.outer.tolist())) == list(range(blocks)), "every result block is written"
        seen[name] = {(o, i) for o, i in visits if i != VOID}
        assert pairs.pairs == len(seen[name])
        first, last = pairs.edges
        assert len(pairs.bounds) == blocks + 1 and pairs.bounds[-1] == len(visits)
        for block in range(blocks):
            mine = slice(pairs.bounds[block], pairs.bounds[block + 1])
            assert (pairs.outer[mine] == block).all() and first[mine].nonzero()[0].tolist() == [0]
            assert last[mine].sum() == 1 and last[mine][-1]
            assert (pairs.inner[mine] != VOID).all() or mine.stop - mine.start == 1
    assert seen["query"] == expected
    assert {(q, k) for k, q in seen["key"]} == expected
    assert pattern.block_pairs(block_q, block_k) == len(expected) * block_q * block_k >= pattern.pairs


@given(patterns())
def test_ranks_are_places_in_the_lists(pattern):
    ranks = pattern.ranks()
    for i, row in enumerate(pattern.table):
        assert [j for j in np.argsort(ranks[i], kind="stable") if ranks[i, j] < len(row)] == list(row)
    assert ((ranks < pattern.num_k_chunks) == pattern.chunk_mask()).all()


@given(patterns())
def test_counted_pairs_are_those_of_the_mask(pattern):
    assert pattern.pairs == pattern.dense_mask().sum()
    merged = pattern.merged()
    assert (merged.dense_mask() == pattern.dense_mask()).all()
    assert pattern.is_full == pattern.dense_mask().all()


def test_builders():
    window = Pattern.sliding_window(6, 1, window=2, sink=1).table
    assert window == ((0,), (0, 1), (0, 1, 2), (0, 2, 3), (0, 3, 4), (0, 4, 5))
    assert Pattern.sliding_window(4, 1, window=1, sink=2).table == ((0,), (0, 1), (0, 1, 2), (0, 1, 3))
    assert Pattern.full(2, 3) == Pattern.from_table([(0, 1), (0, 1)], q_chunk=3, num_k_chunks=2)
    assert Pattern.full(2, 3, 1, 5) == Pattern.from_table([(0,), (0,)], q_chunk=3, k_chunk=5, num_k_chunks=1)


@pytest.mark.parametrize(
    "build",
    [
        lambda frames: layouts.etm_parallel(StudentConfig(), frames, 1560),
        lambda frames: layouts.sdd_parallel(StudentConfig(), frames, 1560),
        lambda frames: layouts.causal_parallel(CausalConfig(), frames // 4, 3 * 1560),
    ],
    ids=["etm", "sdd", "causal"],
)
def test_work_of_the_students_grows_linearly_with_frames(build):
    """No masked work: after the first window every frame adds the same number of pairs."""
    pairs = [build(frames).pattern.block_pairs(520, 1560) for frames in (16, 32, 64, 128)]
    slopes = np.diff(pairs) / np.diff((16, 32, 64, 128))
    assert (slopes == slopes[0]).all()
    assert pairs[-1] == build(128).pattern.pairs, "and 1560-token frames need no padding"


def test_largest_divisor():
    assert largest_divisor(1560, 640) == largest_divisor(1560, 640, 8) == 520
    assert largest_divisor(7, 6) == 1 and largest_divisor(1560, 640, 16) is None


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Pattern.from_table([(0, 0)], q_chunk=1, num_k_chunks=1), "twice"),
        (lambda: Pattern.from_table([(1,)], q_chunk=1, num_k_chunks=1), "names key chunk 1"),
        (lambda: Pattern.from_table([(0,)], q_chunk=0, num_k_chunks=1), "q_chunk must be at least 1"),
        (lambda: Pattern.sliding_window(3, 1, window=0), "window must be at least 1"),
    ],
)
def test_bad_tables_name_the_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
