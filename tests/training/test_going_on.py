"""Rollouts from any state: given frames, groups with a common past, another prompt, a recorded step, a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.distribution import parallel
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.models.students.base import ContextGrad
from greedy_distill_jax.models.students.causal import CausalStudent
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.streaming.loop import fork
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.training import rollout as rollouts

LATENT, SEEN, NEW = (4, 4, 4), 2, 4  # frames
LISTS = ((1.0, 0.9, 0.6), (1.0, 0.7, 0.4))
CLEAN, NOISY = StepPlan(LISTS, "renoise"), StepPlan(LISTS, "euler", (0.0, 0.357))
NOTHING = ContextGrad("none", "none")
CASES = {
    "etm_sdd clean": (Student, dict(sink=1), CLEAN),
    "etm_sdd noisy, in chunks": (Student, dict(chunk=2, rope_mode="absolute", fusion="xattn2"), NOISY),
    "etm_sdd last step": (Student, dict(context="last_step_kv"), CLEAN),
    "etm_sdd fused": (Student, dict(context="fused"), NOISY),
    "causal noisy": (CausalStudent, dict(window=4, sink=1, recache=True), NOISY),
    "causal last step": (CausalStudent, dict(window=3, sink=0, context="last_step_kv"), CLEAN),
}
UNFUSED = [case for case in CASES if "fused" not in case]
TWO = ["etm_sdd noisy, in chunks", "causal last step"]
RENOISED_AND_EULER = ["etm_sdd clean", "causal noisy"]


@functools.cache
def _setup(case, videos=2):
    model, changes, plan = CASES[case]
    config = tiny.causal_config if model is CausalStudent else tiny.student_config
    student = model(config(**changes))
    return make_streamer(student, plan), tiny.random_params(student), tiny.text_rows(videos, jax.random.key(3))


def _given(videos=2):
    return jax.random.normal(jax.random.key(5), (videos, SEEN, *LATENT))


def _observed(case, key):
    """(streamer, params, text, state, rollout) after the given frames."""
    streamer, params, text = _setup(case)
    state = _init(streamer)(params, text, key)
    return streamer, params, text, *_observe(streamer, params, state, _given())


@functools.cache
def _program(function, streamer, **static):
    return jax.jit(functools.partial(function, streamer, **static))


@functools.cache
def _step(streamer):
    return jax.jit(streamer.step)


@functools.cache
def _init(streamer):
    return jax.jit(lambda params, text, key: streamer.init(params, text, key, LATENT))


def _go_on(streamer, params, state, frames, exits=None, record=None):
    return _program(rollouts.go_on, streamer, frames=frames)(params, state, exits=exits, record=record)


def _observe(streamer, params, state, given):
    return _program(rollouts.observe, streamer)(params, state, given)


def _close(a, b, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(jnp.abs(b).max()))), a, b
    )


@jax.jit  # one program instead of some for every shape of a leaf
def _distance(a, b):
    return optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(a)


def _arrays(state):
    """A state without its keys, in numbers."""
    return state._replace(key=None)


def _as_streamed(streamer, params, state, frames):
    made = []
    for _ in range(frames // streamer.cfg.chunk):
        state, x = _step(streamer)(params, state)
        made.append(x)
    return state, jnp.concatenate(made, axis=1)


@pytest.mark.parametrize("case", UNFUSED)
def test_a_rollout_in_two_parts_is_the_stream(case):
    streamer, params, text = _setup(case)
    start = _init(streamer)(params, text, jax.random.key(1))
    middle, first = _go_on(streamer, params, start, SEEN)
    end, second = _go_on(streamer, params, middle, NEW)
    state, video = _as_streamed(streamer, params, start, SEEN + NEW)
    _close(rollouts.join(first, second).x0_BTHWC, video)
    _close(_arrays(end), _arrays(state))
    _close(rollouts.join(first, second), _go_on(streamer, params, start, SEEN + NEW)[1])


@pytest.mark.parametrize("case", [case for case in CASES if "last step" not in case])
def test_a_stream_that_observes_its_own_video_is_where_it_was(case):
    streamer, params, text = _setup(case)
    start = _init(streamer)(params, text, jax.random.key(1))
    made, video = _as_streamed(streamer, params, start, SEEN + NEW)
    state, _ = _observe(streamer, params, start, video)
    assert bool(jnp.all(jax.random.key_data(state.key) == jax.random.key_data(made.key)))
    if streamer.cfg.context == "fused":  # who makes a chunk has done the pass that an observer leaves for later
        made, state = (_as_streamed(streamer, params, s, streamer.cfg.chunk)[0] for s in (made, state))
    _close(_arrays(state), _arrays(made), 1e-4)


@pytest.mark.parametrize("case", UNFUSED)
def test_both_gradients_after_given_frames(case):
    streamer, params, text, state, seen = _observed(case, jax.random.key(1))
    exits = np.asarray([2, 1], np.int32)
    _, drawn = _go_on(streamer, params, state, NEW, exits)
    weights = jax.random.normal(jax.random.key(9), drawn.x0_BTHWC.shape)

    def gradient(act):
        def value(params):
            x = act(params)
            return jnp.sum(weights * x), x

        (_, x), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
        _close(x, drawn.x0_BTHWC)
        return grads

    student = streamer.student
    at_once = gradient(lambda p: rollouts.recompute(student, p, text, drawn, NOTHING, before=seen))
    by_chunk = gradient(lambda p: rollouts.replay(streamer, p, text, drawn, NOTHING, start=state))
    if "etm" in at_once:  # without contexts nothing reaches ETM
        at_once, by_chunk = at_once["sdd"], by_chunk["sdd"]
    assert _distance(at_once, by_chunk) < 1e-5


def test_a_fused_stream_is_not_rolled_out():
    streamer, params, _, state, _ = _observed("etm_sdd fused", jax.random.key(1))
    with pytest.raises(ValueError, match="make the student with context 'clean', whose numbers are the same"):
        rollouts.go_on(streamer, params, state, NEW)


def test_frames_that_are_observed_count():
    streamer, params, text, state, seen = _observed("etm_sdd last step", jax.random.key(1))
    np.testing.assert_array_equal(seen.x0_BTHWC, _given())
    np.testing.assert_array_equal(seen.sigma_T, 0.0)
    np.testing.assert_allclose(seen.keys.sigma_T, [0.6, 0.4])  # at the level that inference leaves
    sigma = seen.keys.sigma_T[None, :, None, None, None]
    noise = (seen.keys.x_BTHWC - (1 - sigma) * _given()) / sigma
    assert abs(float(noise.std()) - 1) < 0.1
    other, _ = _observe(streamer, params, _init(streamer)(params, text, jax.random.key(1)), 1.0 + _given())
    videos = [_go_on(streamer, params, s, NEW)[1].x0_BTHWC for s in (state, other)]
    assert float(jnp.abs(videos[0] - videos[1]).max()) > 1e-2


@pytest.mark.parametrize("case", RENOISED_AND_EULER)
def test_a_video_with_its_own_key_is_the_same_alone(case):
    streamer, params, text = _setup(case)
    keys = jax.random.split(jax.random.key(8), 2)
    _, both = _go_on(streamer, params, _init(streamer)(params, text, keys), NEW)
    for i in range(2):
        alone = _init(streamer)(params, text[i : i + 1], keys[i])
        _close(_go_on(streamer, params, alone, NEW)[1].x0_BTHWC, both.x0_BTHWC[i : i + 1])


@pytest.mark.parametrize("case", TWO)
def test_a_group_shares_its_past_and_what_noise_it_is_given(case):
    streamer, params, text, state, _ = _observed(case, jax.random.key(1))
    a, b, c = jax.random.split(jax.random.key(8), 3)
    _, group = _go_on(streamer, params, fork(state, jnp.stack([a, b, c, c])), NEW)
    x = group.x0_BTHWC
    _close(x[2], x[3])
    assert min(float(jnp.abs(x[i] - x[j]).max()) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-2
    # The same as if each of them had gone on alone, from the past of its own prompt.
    twice = [
        _go_on(streamer, params, state._replace(key=jnp.stack(pair)), NEW)[1].x0_BTHWC for pair in ((a, c), (b, c))
    ]
    _close(x, jnp.stack([twice[0][0], twice[1][0], twice[0][1], twice[1][1]]))
    with pytest.raises(ValueError, match="3 keys for 2 videos; give a multiple"):
        fork(state, jnp.stack([a, b, c]))


@pytest.mark.parametrize("case", RENOISED_AND_EULER)
def test_the_recorded_step_is_one_of_the_sampler(case):
    streamer, params, text, state, seen = _observed(case, jax.random.key(1))
    with pytest.raises(ValueError, match="exits and record exclude each other"):
        rollouts.go_on(streamer, params, state, NEW, np.asarray([0, 0]), record=np.asarray([0, 0]))
    with pytest.raises(ValueError, match=r"record is \[3, 0\], the last steps of the lists are \[2, 2\]"):
        rollouts.go_on(streamer, params, state, NEW, record=np.asarray([3, 0]))
    lists, g, student = streamer.plan.sigmas, streamer.cfg.chunk, jax.jit(streamer.student)
    for n in range(3):
        record = np.asarray([n, n], np.int32)
        _, drawn = _go_on(streamer, params, state, NEW, record=record)
        _close(drawn.x0_BTHWC, _go_on(streamer, params, state, NEW)[1].x0_BTHWC)  # it goes on to the end
        taken, following = drawn.transitions, (*lists[1], 0.0)[n + 1]
        first = SEEN // g  # chunk number, at which the second list may still be to come
        at = [(lists[min(first + i // g, 1)][n], (*lists[min(first + i // g, 1)], 0.0)[n + 1]) for i in range(NEW)]
        np.testing.assert_allclose(taken.sigma_T, [sigma for sigma, _ in at])
        np.testing.assert_allclose(taken.next_sigma_T, [after for _, after in at])
        whole = rollouts.join(seen, drawn._replace(exit_BTHWC=taken.x_BTHWC, sigma_T=taken.sigma_T))
        past = rollouts.history(streamer.student, rollouts.join(seen, drawn))
        sigma = jnp.broadcast_to(whole.sigma_T[None], whole.x0_BTHWC.shape[:2])
        v = student(params, whole.exit_BTHWC, sigma, text, past)[:, SEEN:]
        x0 = taken.x_BTHWC - sigma[:, SEEN:, None, None, None] * v
        if following == 0:
            _close(taken.next_BTHWC, x0)
            _close(taken.next_BTHWC, drawn.x0_BTHWC)
        elif streamer.plan.sampler == "euler":
            _close(taken.next_BTHWC, taken.x_BTHWC + (following - at[0][0]) * v)
        else:
            noise = (taken.next_BTHWC - (1 - following) * x0) / following
            assert abs(float(noise.std()) - 1) < 0.15 and abs(float(noise.mean())) < 0.15


@pytest.mark.parametrize("case", RENOISED_AND_EULER)
def test_a_prompt_that_changes_inside_a_rollout(case):
    streamer, params, text, state, _ = _observed(case, jax.random.key(1))
    other = tiny.text_rows(2, jax.random.key(4))
    switched = jax.jit(streamer.switch_prompt)(params, state, other)
    _, drawn = _go_on(streamer, params, switched, NEW)
    _close(drawn.x0_BTHWC, _as_streamed(streamer, params, switched, NEW)[1])
    assert float(jnp.abs(drawn.x0_BTHWC - _go_on(streamer, params, state, NEW)[1].x0_BTHWC).max()) > 1e-3
    again = jax.jit(lambda p: rollouts.replay(streamer, p, other, drawn, ContextGrad(), frames=True, start=switched))
    _close(again(params), drawn.x0_BTHWC)


@pytest.mark.parametrize("case", TWO)
def test_the_same_on_stripes(case):
    """The context axis: the state between the calls lies in stripes, and so does what a group shares."""
    streamer, params, text = _setup(case)
    keys = jax.random.split(jax.random.key(8), 4)

    def call(params, text, given):
        state = streamer.init(params, text, jax.random.key(1), LATENT)
        state, seen = rollouts.observe(streamer, params, state, given)
        state = fork(state, keys)
        _, drawn = rollouts.go_on(streamer, params, state, NEW, record=jnp.asarray([0, 1]))
        return seen, drawn, rollouts.replay(streamer, params, jnp.repeat(text, 2, 0), drawn, NOTHING, start=state)

    mesh = make_mesh({"context": 2}, jax.devices()[:2])
    args = (params, text, _given())
    laid_out = jax.device_put(args, NamedSharding(mesh, PartitionSpec()))
    found = jax.device_get(jax.jit(parallel.on_mesh(call, mesh))(*laid_out))
    _close(found, jax.device_get(jax.jit(call)(*args)), 1e-4)
