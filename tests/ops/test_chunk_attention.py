"""Chunk attention against the dense definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from greedy_distill_jax.ops.sliding_window import Schedule, chunk_attention, xla


def _qkv(schedule, seed=0, batch=2, heads=2, dim=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    lengths = [schedule.num_q_chunks * schedule.q_chunk] + [schedule.num_k_chunks * schedule.k_chunk] * 2
    return [jax.random.normal(k, (batch, n, heads, dim), dtype) for k, n in zip(keys, lengths, strict=True)]


@st.composite
def schedules(draw):
    num_k = draw(st.integers(1, 5))
    rows = draw(st.lists(st.sets(st.integers(0, num_k - 1)), min_size=1, max_size=5))
    return Schedule.from_table(
        [sorted(r) for r in rows], q_chunk=draw(st.integers(1, 3)), k_chunk=draw(st.integers(1, 3)), num_k_chunks=num_k
    )


@given(schedules(), st.booleans())
def test_matches_dense_forward_and_gradient(schedule, masked):
    q, k, v = _qkv(schedule)
    visible = None
    if masked:
        visible = jax.random.bernoulli(jax.random.key(1), 0.7, (schedule.num_q_chunks, schedule.num_k_chunks))

    def run(implementation):
        def f(q, k, v):
            return chunk_attention(q, k, v, schedule, visible_QS=visible, implementation=implementation)

        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(jnp.cos(out))

    for ours, dense in zip(run("xla"), run("reference"), strict=True):
        np.testing.assert_allclose(ours, dense, atol=2e-6)


@pytest.mark.parametrize("schedule", [Schedule.full(6, 4), Schedule.sliding_window(6, 4, 2, 1)])
def test_tiled_form_equals_one_batch(schedule, monkeypatch):
    q, k, v = _qkv(schedule)
    whole = chunk_attention(q, k, v, schedule)
    monkeypatch.setattr(xla, "LOGITS_BUDGET", 1)
    np.testing.assert_allclose(chunk_attention(q, k, v, schedule), whole, atol=1e-6)


def test_bfloat16_stays_close_to_float32():
    schedule = Schedule.sliding_window(5, 8, 3)
    q, k, v = _qkv(schedule, dtype=jnp.bfloat16)
    exact = chunk_attention(*(x.astype(jnp.float32) for x in (q, k, v)), schedule, implementation="reference")
    ours = chunk_attention(q, k, v, schedule)
    assert ours.dtype == jnp.bfloat16
    assert np.mean(np.abs(ours.astype(jnp.float32) - exact) < 0.02) > 0.99


def test_window_and_sink():
    table = Schedule.sliding_window(6, 1, window=2, sink=1).table
    assert table == ((0,), (0, 1), (0, 1, 2), (0, 2, 3), (0, 3, 4), (0, 4, 5))
    assert Schedule.sliding_window(64, 3, window=4).pairs == 9 * (1 + 2 + 3 + 61 * 4)


def test_a_query_that_sees_nothing_gets_zeros():
    schedule = Schedule.from_table([(), (0,)], q_chunk=2, num_k_chunks=1)
    out = chunk_attention(*_qkv(schedule), schedule)
    assert jnp.all(out[:, :2] == 0) and jnp.all(out[:, 2:] != 0)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Schedule.from_table([(0, 0)], q_chunk=1, num_k_chunks=1), "twice"),
        (lambda: Schedule.from_table([(1,)], q_chunk=1, num_k_chunks=1), "names key chunk 1"),
        (lambda: Schedule.sliding_window(3, 1, window=0), "window must be at least 1"),
        (lambda: chunk_attention(*_qkv(Schedule.full(2, 2)), Schedule.full(3, 2)), "the schedule has 3 query chunks"),
        (
            lambda: chunk_attention(*_qkv(Schedule.full(2, 2)), Schedule.full(2, 2), implementation="cuda"),
            "choose from",
        ),
    ],
)
def test_bad_input_names_the_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
