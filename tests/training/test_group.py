"""Groups of streams: one past, several futures, and what networks predict along them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.models.students.base import ContextGrad
from greedy_distill_jax.models.students.causal import CausalStudent
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.training import group, rollout as rollouts
from greedy_distill_jax.training.group import Group

LATENT = (4, 4, 4)
LISTS = ((1.0, 0.9, 0.6), (1.0, 0.7, 0.4))
CLEAN, NOISY = StepPlan(LISTS, "renoise"), StepPlan(LISTS, "euler", (0.0, 0.357))
CASES = {
    "etm_sdd clean": (Student, dict(sink=1), CLEAN),
    "etm_sdd noisy, in chunks": (Student, dict(chunk=2, rope_mode="absolute", fusion="xattn2"), NOISY),
    "etm_sdd last step": (Student, dict(context="last_step_kv"), CLEAN),
    "causal noisy": (CausalStudent, dict(window=4, sink=1), NOISY),
    "causal last step": (CausalStudent, dict(window=3, sink=0, context="last_step_kv"), CLEAN),
}
BOTH = ContextGrad("params", "none")
PROMPTS, FRAMES, CLIP, START = 2, 12, 4, 3


@functools.cache
def _setup(case, **changes):
    model, fields, plan = CASES[case]
    config = tiny.causal_config if model is CausalStudent else tiny.student_config
    student = model(config(**fields))
    own = Group(make_streamer(student, plan), FRAMES, CLIP, **{"after": 2, "given": 2, "group": 3, **changes})
    return own, tiny.random_params(student), tiny.text_rows(PROMPTS, jax.random.key(3))


def _real():
    return jax.random.normal(jax.random.key(5), (PROMPTS, FRAMES, *LATENT))


@functools.cache
def _record(case, step: str = "last", **changes):
    own, params, text = _setup(case, **changes)
    numbers = own.streamer.plan.ends - (step != "last")
    call = jax.jit(functools.partial(group.record, own, latent_shape=LATENT))
    return call(params, text, jax.random.key(7), jnp.int32(START), numbers, real_PTHWC=_real())


@functools.cache
def _program(function, own, **static):
    return jax.jit(functools.partial(function, own, **static))


def _clip(own, videos):
    begin = START * own.chunk
    return videos.frames[:, begin : begin + CLIP]


@pytest.mark.parametrize("case", CASES)
def test_the_network_that_made_a_clip_predicts_it_from_its_last_steps(case):
    own, params, text = _setup(case)
    videos, steps = _record(case)
    assert videos.frames.shape == (6, FRAMES, *LATENT) and steps.x_BTHWC.shape == (6, CLIP, *LATENT)
    predict = _program(group.predict, own, grads=BOTH)
    found = predict(params, text, videos, jnp.int32(START), steps.x_BTHWC, steps.sigma_T)
    np.testing.assert_allclose(found, _clip(own, videos), atol=1e-5 * float(jnp.abs(videos.frames).max()))
    np.testing.assert_array_equal(steps.next_BTHWC, _clip(own, videos))
    np.testing.assert_array_equal(steps.next_sigma_T, 0.0)


@pytest.mark.parametrize("case", ["etm_sdd clean", "causal last step"])
def test_a_group_shares_its_past_and_no_more(case):
    own, _, _ = _setup(case)
    videos, _ = _record(case)
    frames = np.asarray(videos.frames).reshape(PROMPTS, 3, FRAMES, *LATENT)
    begin, end = START * own.chunk, START * own.chunk + CLIP + own.after
    np.testing.assert_array_equal(frames[:, :, :2], np.asarray(_real())[:, None, :2].repeat(3, 1))
    np.testing.assert_array_equal(frames[:, 1:, :begin], frames[:, :1, :begin].repeat(2, 1))
    for one, other in ((0, 1), (1, 2)):
        assert np.abs(frames[:, one, begin:end] - frames[:, other, begin:end]).min() > 0
    assert np.abs(frames[0, 0, 2:begin] - frames[1, 0, 2:begin]).min() > 0
    np.testing.assert_array_equal(frames[:, :, end:], 0.0)


def test_streams_in_a_neighbourhood_are_as_far_apart_as_is_said():
    frames = {spread: _record("etm_sdd clean", spread=spread)[0].frames for spread in (0.0, 0.1)}
    by_group = {s: np.asarray(x).reshape(PROMPTS, 3, FRAMES, *LATENT) for s, x in frames.items()}
    np.testing.assert_array_equal(by_group[0.0][:, 1:], by_group[0.0][:, :1].repeat(2, 1))
    np.testing.assert_array_equal(by_group[0.1][:, 0], by_group[0.0][:, 0])  # the first has the centre's noise
    _, near = _record("etm_sdd clean", "first", spread=0.1)
    _, same = _record("etm_sdd clean", "first", spread=0.0)
    first = (near.x_BTHWC - same.x_BTHWC).reshape(PROMPTS, 3, -1)
    assert float(jnp.abs(first[:, 0]).max()) == 0 and 0 < float(jnp.abs(first[:, 1:]).mean()) < 0.5


@pytest.mark.parametrize("case", ["etm_sdd noisy, in chunks", "causal noisy"])
def test_its_gradient_is_that_of_the_parallel_form(case):
    own, params, text = _setup(case, after=0, given=0, group=1)
    videos, steps = group.record(own, params, text, jax.random.key(7), jnp.int32(0), own.streamer.plan.ends, LATENT)
    weights = jax.random.normal(jax.random.key(1), steps.x_BTHWC.shape)
    levels = own.streamer.plan.context_sigma(jnp.repeat(jnp.arange(CLIP // own.chunk), own.chunk))
    seen = (1.0 - levels)[None, :, None, None, None] * videos.frames[:, :CLIP] + videos.noise[:, :CLIP]
    made = rollouts.Rollout(videos.frames[:, :CLIP], steps.x_BTHWC, steps.sigma_T, seen, levels)

    def by_chunk(params):
        x0 = group.predict(own, params, text, videos, jnp.int32(0), steps.x_BTHWC, steps.sigma_T, BOTH)
        return jnp.sum(weights * x0)

    def at_once(params):
        return jnp.sum(weights * rollouts.recompute(own.streamer.student, params, text, made, BOTH))

    a, b = (jax.jit(jax.grad(f))(params) for f in (by_chunk, at_once))
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(b))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * size), a, b)


@pytest.mark.parametrize("case", ["etm_sdd last step", "causal noisy"])
def test_corrected_by_the_own_frames_nothing_changes(case):
    own, params, text = _setup(case, group=1)
    videos, steps = _record(case, "first", group=1)
    clip = (steps.x_BTHWC, steps.sigma_T)
    plain = _program(group.predict, own, grads=BOTH)(params, text, videos, jnp.int32(START), *clip)
    corrected = _program(group.predict_corrected, own, keep=1)
    same = corrected(params, text, videos, videos.frames, jnp.int32(START), *clip)
    other = corrected(params, text, videos, _real(), jnp.int32(START), *clip)
    np.testing.assert_allclose(same, plain, atol=1e-5 * float(jnp.abs(plain).max()))
    assert float(jnp.abs(other - plain).mean()) > 1e-3
