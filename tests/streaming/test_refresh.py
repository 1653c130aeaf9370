"""A stream on real history: what its definition says, chunk by chunk, for both students and every context."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.models.students.causal import CausalStudent
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.streaming.refresh import refreshed_stream
from greedy_distill_jax.testing import tiny

LATENT, VIDEOS, CHUNKS = (4, 4, 4), 2, 6
LISTS = ((1.0, 0.9, 0.6), (1.0, 0.7, 0.4))
CLEAN, NOISY = StepPlan(LISTS, "renoise"), StepPlan(LISTS, "euler", (0.0, 0.357))
CASES = {
    "etm_sdd clean": (Student, dict(sink=1), CLEAN, 1),
    "etm_sdd noisy, in chunks": (Student, dict(chunk=2, anchor=False, rope_mode="absolute"), NOISY, 2),
    "etm_sdd fused": (Student, dict(context="fused"), NOISY, 1),
    "etm_sdd last step": (Student, dict(context="last_step_kv"), CLEAN, 1),
    "causal noisy": (CausalStudent, dict(window=3, sink=1), NOISY, 0),
    "causal last step, in chunks": (CausalStudent, dict(chunk=2, window=6, sink=0, context="last_step_kv"), CLEAN, 1),
}


@functools.cache
def _setup(case):
    """(streamer, its jitted step and observe, parameters, an empty stream)."""
    model, changes, plan, _ = CASES[case]
    config = tiny.causal_config if model is CausalStudent else tiny.student_config
    student = model(config(**changes))
    params, streamer = tiny.random_params(student), make_streamer(student, plan)
    state = streamer.init(params, tiny.text_rows(VIDEOS, jax.random.key(3)), jax.random.key(1), LATENT)
    return streamer, jax.jit(streamer.step), jax.jit(lambda *args: streamer.observe(*args)[0]), params, state


def _refreshed(case, real, **options):
    streamer, _, _, params, state = _setup(case)
    return refreshed_stream(streamer, params, state, np.asarray(real), **options)


def _plain(case):
    _, step, _, params, state = _setup(case)
    made = []
    for _ in range(CHUNKS):
        state, x = step(params, state)
        made.append(x)
    return made


def _close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("case, redraw", [*((case, None) for case in CASES), ("causal noisy", lambda x0: 0.5 * x0)])
def test_every_chunk_is_made_on_what_it_is_said_to_be_made_on(case, redraw):
    streamer, step, observe, params, start = _setup(case)
    g, keep = streamer.cfg.chunk, CASES[case][3]
    real = jax.random.normal(jax.random.key(5), (VIDEOS, CHUNKS * g, *LATENT))
    found = np.split(_refreshed(case, real, keep=keep, redraw=redraw), CHUNKS, axis=1)
    videos = np.split(np.asarray(real), CHUNKS, axis=1) if redraw is None else [redraw(x0) for x0 in found]
    for i, chunk in enumerate(found):
        state = start
        for seen in (*videos[: max(i - keep, 0)], *found[max(i - keep, 0) : i]):
            state = observe(params, state, seen)
        if i > keep or "last step" not in case:  # a stream's own chunks have the keys of the calls that made them
            _close(chunk, step(params, state)[1])
    plain = _plain(case)
    for i, chunk in enumerate(found):
        if i <= keep:
            _close(chunk, plain[i])
        else:
            assert float(np.abs(chunk - plain[i]).max()) > 1e-2


@pytest.mark.parametrize("case", [case for case in CASES if "last step" not in case])
def test_on_its_own_video_as_the_real_one_a_stream_is_the_plain_one(case):
    plain = jnp.concatenate(_plain(case), axis=1)
    keep = CASES[case][3]
    _close(_refreshed(case, plain, keep=keep), plain)
    if case == "etm_sdd fused":
        _close(_refreshed(case, jnp.zeros_like(plain), keep=keep, redraw=lambda x0: x0), plain)


def test_a_start_is_observed_and_keeping_everything_is_the_plain_stream():
    case = "etm_sdd clean"
    _, step, observe, params, state = _setup(case)
    real = jax.random.normal(jax.random.key(5), (VIDEOS, CHUNKS, *LATENT))
    plain, refreshed = (_refreshed(case, real, start=2, keep=keep) for keep in (CHUNKS, 1))
    for i in range(2):
        state = observe(params, state, real[:, i : i + 1])
    for i in range(2, CHUNKS):
        state, x = step(params, state)
        _close(plain[:, i : i + 1], x)
    for video in (plain, refreshed):
        assert np.array_equal(video[:, :2], real[:, :2])
    _close(refreshed[:, :4], plain[:, :4])
    assert float(np.abs(refreshed - plain)[:, 4:].max()) > 1e-2
