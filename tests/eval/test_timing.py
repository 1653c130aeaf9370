"""Cost per frame: flat for ETM + SDD, growing for the full-causal cache and the bidirectional teacher.

Counted in FLOPs of the programs that are timed, which are the same on every machine.
"""

import itertools
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.diffusion import noise_levels
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.eval.comparison import Comparison
from greedy_distill_jax.eval.time_per_frame import causal_frame, time_per_frame, timed_lengths
from greedy_distill_jax.measure import clock
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.testing.matmuls import count_matmuls

LATENT, TOKENS = (8, 8, 4), 16
STUDENTS = {"etm_sdd": tiny.STUDENT, "causal": tiny.causal_config()}


def _streamer(kind):
    return make_streamer(make_student(STUDENTS[kind]), StepPlan((noise_levels.uniform_steps(2, 5.0),)))


@pytest.mark.parametrize("kind", STUDENTS)
def test_one_program_makes_every_frame_of_a_student(kind):
    streamer = _streamer(kind)
    params, text = tiny.random_params(streamer.student), tiny.text_rows(1, jax.random.key(0))
    first = jax.eval_shape(lambda p, t, key: streamer.init(p, t, key, LATENT), params, text, jax.random.key(0))
    after, _ = jax.eval_shape(streamer.step, params, first)
    described = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in (first, after)]
    assert described[0] == described[1], "the state grew, and with it the work of the next frame"


def test_work_per_frame_grows_for_the_others():
    teacher, text = Teacher(tiny.BASE), tiny.text_rows(1, jax.random.key(0))
    params, sigmas = tiny.random_params(teacher), (1.0, 0.8)
    lengths = (32, 64, 128, 256)
    frame = jnp.zeros((1, 1, *LATENT))
    causal = [count_matmuls(causal_frame(teacher, params, n, sigmas, LATENT, text), frame) for n in lengths]
    whole = [
        count_matmuls(teacher, params, jax.ShapeDtypeStruct((1, n, *LATENT), jnp.float32), jnp.ones((1, 1)), text) / n
        for n in lengths
    ]
    # What one more frame adds to a pass: logits and values of all its tokens against those of the new frame, per layer.
    pairs = tiny.BASE.num_layers * 4 * TOKENS**2 * tiny.BASE.dim
    for work, passes in ((causal, len(sigmas) + 1), (whole, 1)):
        assert np.diff(work) / np.diff(lengths) == pytest.approx(passes * pairs, rel=1e-3)
        assert work[-1] > 1.2 * work[0]


@pytest.mark.parametrize("latent, expected", [((4, 4), (32, 256, 1024)), ((8, 8), (32, 256))])
def test_a_teacher_with_few_tokens_is_timed_at_1024_frames_too(latent, expected):
    student = SimpleNamespace(latent_shape=(4, *latent, 4))
    teacher = SimpleNamespace(model=Teacher(tiny.BASE))
    comparison = mock.Mock(spec=Comparison, teacher=teacher, student=student, lengths=None)
    assert timed_lengths(comparison) == expected
    comparison.lengths = (8,)
    assert timed_lengths(comparison) == (8,)


@pytest.mark.parametrize("kind", STUDENTS)
def test_every_row_is_the_time_of_one_frame(kind, monkeypatch):
    """A clock that only goes on when it is read: every measurement takes one second."""
    ticks = itertools.count(0.0)
    monkeypatch.setattr(clock, "time", SimpleNamespace(process_time=lambda: next(ticks), perf_counter=None))
    teacher, streamer = Teacher(tiny.BASE), _streamer(kind)
    teacher_params, params = (tiny.random_params(model) for model in (teacher, streamer.student))
    text = tiny.text_rows(1, jax.random.key(0))
    rows = time_per_frame(teacher, teacher_params, (1.0, 0.8), streamer, params, text, LATENT, frames=(2, 4), repeats=1)
    calls = 3  # of the full-causal model between two looks at the clock
    assert rows == [
        {
            "frames": n,
            kind: pytest.approx(1e3),
            "full_causal": pytest.approx(1e3 / calls),
            "teacher": pytest.approx(1e3 / n),
        }
        for n in (2, 4)
    ]


def test_the_causal_peer_makes_a_frame_and_its_keys():
    teacher = Teacher(tiny.BASE)
    params, text = tiny.random_params(teacher), tiny.text_rows(1, jax.random.key(0))
    noise = jax.random.normal(jax.random.key(1), (1, 1, *LATENT))
    x, own = causal_frame(teacher, params, 5, (1.0,), LATENT, text)(noise)
    assert x.shape == (1, 1, *LATENT) and np.isfinite(x).all()
    assert own.k.shape == (tiny.BASE.num_layers, 1, 16, tiny.BASE.num_heads, tiny.BASE.head_dim)
