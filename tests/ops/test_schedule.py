"""The chunk table and the block lists made of it (numpy only)."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from greedy_distill_jax.ops.attention.schedule import VOID, Schedule, largest_divisor


@st.composite
def schedules(draw):
    num_k = draw(st.integers(1, 6))
    rows = draw(st.lists(st.sets(st.integers(0, num_k - 1)), min_size=1, max_size=6))
    return Schedule.from_table(
        [draw(st.permutations(sorted(row))) for row in rows],
        q_chunk=draw(st.integers(1, 7)), k_chunk=draw(st.integers(1, 7)), num_k_chunks=num_k,
    )  # fmt: skip


@settings(max_examples=200)
@given(schedules(), st.integers(1, 8), st.integers(1, 8))
def test_block_lists_cover_exactly_the_table(schedule, block_q, block_k):
    per_q, per_k = -(-schedule.q_chunk // block_q), -(-schedule.k_chunk // block_k)
    by_query, by_key = schedule.block_lists(block_q, block_k)
    expected = {
        (i * per_q + a, j * per_k + b)
        for i, row in enumerate(schedule.table) for j in row for a in range(per_q) for b in range(per_k)
    }  # fmt: skip
    seen = {}
    for name, pairs, blocks in (
        ("query", by_query, schedule.num_q_chunks * per_q), ("key", by_key, schedule.num_k_chunks * per_k),
    ):  # fmt: skip
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
    assert schedule.block_pairs(block_q, block_k) == len(expected) * block_q * block_k >= schedule.pairs


@given(schedules())
def test_counted_pairs_are_those_of_the_mask(schedule):
    assert schedule.pairs == schedule.dense_mask().sum()
    merged = schedule.merged()
    assert (merged.dense_mask() == schedule.dense_mask()).all()
    assert schedule.is_full == schedule.dense_mask().all()


def test_patterns():
    window = Schedule.sliding_window(6, 1, window=2, sink=1).table
    assert window == ((0,), (0, 1), (0, 1, 2), (0, 2, 3), (0, 3, 4), (0, 4, 5))
    assert Schedule.sink(4, 1, sink=2).table == ((0,), (0, 1), (0, 1, 2), (0, 1, 3))
    assert Schedule.sdd(5, 1).table == ((0,), (0, 1), (0, 1, 2), (0, 2, 3), (0, 3, 4))
    forcing = Schedule.teacher_forcing(4, 1, window=2, sink=1).table
    assert forcing[:4] == Schedule.sliding_window(4, 1, window=2, sink=1).table
    assert forcing[4:] == ((4,), (0, 5), (0, 1, 6), (0, 2, 7)), "noisy: clean chunks before, and itself"


@pytest.mark.parametrize("build", [Schedule.sliding_window, Schedule.teacher_forcing])
def test_work_grows_linearly_with_frames(build):
    """No masked work: after the first window every frame adds the same number of pairs."""
    pairs = [build(frames, 1560, 4).block_pairs(520, 1560) for frames in (16, 32, 64, 128)]
    slopes = np.diff(pairs) / np.diff((16, 32, 64, 128))
    assert (slopes == slopes[0]).all()
    assert pairs[-1] == build(128, 1560, 4).pairs, "and 1560-token frames need no padding"


def test_largest_divisor():
    assert largest_divisor(1560, 640) == largest_divisor(1560, 640, 8) == 520
    assert largest_divisor(7, 6) == 1 and largest_divisor(1560, 640, 16) is None


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Schedule.from_table([(0, 0)], q_chunk=1, num_k_chunks=1), "twice"),
        (lambda: Schedule.from_table([(1,)], q_chunk=1, num_k_chunks=1), "names key chunk 1"),
        (lambda: Schedule.from_table([(0,)], q_chunk=0, num_k_chunks=1), "q_chunk must be at least 1"),
        (lambda: Schedule.sliding_window(3, 1, window=0), "window must be at least 1"),
    ],
)
def test_bad_tables_name_the_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
