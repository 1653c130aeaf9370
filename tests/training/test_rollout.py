"""Self-rollout: the parallel and the sequential form are the same video and the same gradient."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.models.students.base import ContextGrad
from greedy_distill_jax.models.students.causal import CausalStudent
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.testing.pairwise import pairwise
from greedy_distill_jax.training import rollout as rollouts

FRAMES, LATENT = 6, (4, 4, 4)
SIGMAS = ((1.0, 0.8, 0.5), (1.0, 0.6))
OLD = StepPlan(SIGMAS, "renoise")
DIAGONAL = StepPlan(((1.0, 0.9, 0.7, 0.4), (1.0, 0.8, 0.4), (1.0, 0.4)), "renoise")
NOISY = StepPlan(DIAGONAL.sigmas, "renoise", (0.0, 0.357))
OPTIONS = {
    "fusion": ("selfkv", "xattn2", "add"),
    "rope_mode": ("clamped", "absolute"),
    "context": ("clean", "last_step_kv"),
    "anchor": (True, False),
    "chunk": (1, 2),
    "sink": (0, 1),
    "etm": ("params", "none"),
    "sdd": ("none", "params"),
}
CAUSAL = [
    dict(causal=True, window=3, sink=1, rope_mode="absolute", context="clean", sdd="none"),
    dict(causal=True, chunk=2, window=4, sink=0, rope_mode="relative", context="last_step_kv", sdd="params"),
]

NOISY_CAUSAL = dict(plan=NOISY, causal=True, window=3, sink=1, rope_mode="relative")  # several tests share its programs
PLANS = [
    dict(plan=NOISY, sdd="none"),
    dict(plan=NOISY, etm_input="clean", sdd="params"),
    dict(plan=StepPlan(SIGMAS, "euler", (0.1, 0.3, 0.357)), chunk=2, sink=1, rope_mode="absolute", sdd="params"),
    dict(plan=DIAGONAL, context="last_step_kv", sdd="params"),
    dict(**NOISY_CAUSAL, sdd="params"),
    dict(plan=DIAGONAL, causal=True, window=3, sink=0, context="last_step_kv", sdd="none"),
]
OWN = [
    dict(context_weights="own", plan=OLD, sdd="params"),
    dict(context_weights="own", plan=NOISY, fusion="xattn2", chunk=2, sdd="params"),
    dict(context_weights="own", plan=NOISY, rope_mode="absolute", sdd="none"),
    dict(context_weights="own", **NOISY_CAUSAL, sdd="params"),
    dict(context_weights="own", plan=OLD, causal=True, chunk=2, window=4, sink=0, sdd="none"),
]
DEFAULTS = {name: getattr(tiny.STUDENT, name, "params") for name in OPTIONS}
# Pairs of options that occur in those.
GIVEN = [{name: case.get(name, DEFAULTS[name]) for name in OPTIONS} for case in PLANS + OWN if "causal" not in case]


@functools.cache
def _model(how="random", plan=OLD, **changes):
    if changes.pop("causal", False):
        student = CausalStudent(tiny.causal_config(**changes))
    else:
        student = Student(tiny.student_config(rope_frames=4, **changes))
    streamer = make_streamer(student, plan)
    params, text = tiny.random_params(student), tiny.text_rows(2, jax.random.key(3))
    draw = jax.jit(lambda p, key: rollouts.roll_out(streamer, p, text, key, (FRAMES, *LATENT), how))
    return student, streamer, params, text, draw


@functools.cache
def _setup(seed=1, **model):
    *parts, params, text, draw = _model(**model)
    return *parts, params, text, draw(params, jax.random.key(seed))


def _gradient(act):
    """params -> (value, video, gradient), jitted."""
    weights = jax.random.normal(jax.random.key(9), (2, FRAMES, *LATENT))

    @jax.jit
    def of(params):
        def value(params):
            action = act(params)
            return jnp.sum(weights * action), action

        (value, action), grads = jax.value_and_grad(value, has_aux=True)(params)
        return value, action, grads

    return of


@functools.cache
def _recomputed(grads, **model):
    """(video, gradient) of the parallel form; several tests ask for the same one."""
    student, _, params, text, drawn = _setup(**model)
    return _gradient(lambda p: rollouts.recompute(student, p, text, drawn, grads))(params)[1:]


@functools.cache
def _replay(grads, *, frames=False, segment=0, **model):
    """params -> (value, video, gradient) of the sequential form."""
    _, streamer, _, text, drawn = _setup(**model)
    return _gradient(lambda p: rollouts.replay(streamer, p, text, drawn, grads, frames=frames, segment=segment))


@functools.cache
def _replayed(grads, *, frames=False, segment=0, **model):
    """(video, gradient) of the sequential form."""
    return _replay(grads, frames=frames, segment=segment, **model)(_setup(**model)[2])[1:]


def _name(case):
    return "-".join(str(v.lengths.tolist()) if isinstance(v, StepPlan) else str(v) for v in case.values())


@jax.jit  # one program instead of some for every shape of a leaf
def _distance(a, b):
    return optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(b)


@jax.jit
def _moved(params, direction, step):
    """``params`` after a step of this length in that direction."""
    return jax.tree.map(lambda p, d: p + step / optax.tree.norm(direction) * d, params, direction)


@jax.jit
def _slope(gradient, direction):
    return optax.tree.vdot(gradient, direction) / optax.tree.norm(direction)


@pytest.mark.parametrize("case", [*pairwise(OPTIONS, GIVEN), *CAUSAL, *PLANS, *OWN], ids=_name)
def test_parallel_and_sequential_forms_agree(case):
    case = dict(case)
    grads = ContextGrad(case.pop("etm", "params"), case.pop("sdd"))
    drawn = _setup(**case)[4]
    x, parallel = _recomputed(grads, **case)
    np.testing.assert_allclose(x, drawn.x0_BTHWC, atol=1e-5 * float(jnp.abs(x).max()))
    x, sequential = _replayed(grads, **case)
    np.testing.assert_allclose(x, drawn.x0_BTHWC, atol=1e-5 * float(jnp.abs(x).max()))
    assert _distance(parallel, sequential) < 1e-5
    if "etm" in parallel:
        assert (float(optax.tree.norm(parallel["etm"])) == 0) == (grads.etm == "none")
    for name in parallel.keys() & {"sdd_context", "dit_context"}:
        zero = [float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(parallel[name])]
        assert all(zero) if grads.sdd == "none" else not any(zero)


def test_every_pair_of_options_occurs():
    found = {pair for case in (*pairwise(OPTIONS, GIVEN), *GIVEN) for pair in itertools.combinations(case.items(), 2)}
    both = itertools.combinations(OPTIONS, 2)
    assert found == {((a, x), (b, y)) for a, b in both for x in OPTIONS[a] for y in OPTIONS[b]}


@pytest.mark.parametrize("causal", [False, True], ids=["etm_sdd", "causal"])
def test_context_gradients_are_those_of_the_two_passes(causal):
    """``none`` is the gradient through the denoising call, ``params`` that plus the one through the context pass."""
    model = NOISY_CAUSAL if causal else dict(plan=NOISY)
    student, _, params, text, drawn = _setup(**model)
    apart = make_student(dataclasses.replace(student.cfg, context_weights="own"))
    stopped, whole = (_recomputed(ContextGrad("params", g), **model)[1] for g in ("none", "params"))
    of = _gradient(lambda p: rollouts.recompute(apart, p, text, drawn, ContextGrad()))
    both = of(apart.with_context(params))[2]
    denoise, context = (both["dit"], both["dit_context"]) if causal else (both["sdd"], both["sdd_context"])
    stopped, whole = (x if causal else x["sdd"] for x in (stopped, whole))
    assert _distance(denoise, stopped) < 1e-5
    summed = {name: jax.tree.map(jnp.add, x, context[name]) if name in context else x for name, x in denoise.items()}
    assert _distance(summed, whole) < 1e-5 and _distance(stopped, whole) > 1e-2
    _, replayed = _replayed(ContextGrad(), **model)
    assert _distance(summed, replayed if causal else replayed["sdd"]) < 1e-5


def test_every_stop_changes_the_gradient():
    found = [_recomputed(grads, plan=NOISY)[1]["sdd"] for grads in (ContextGrad(), ContextGrad("params", "none"))]
    assert _distance(*found) > 1e-2


@pytest.mark.parametrize(
    "changes", [dict(plan=NOISY), dict(context="last_step_kv", seed=5)], ids=["noisy", "last step"]
)
def test_gradient_through_frames_is_the_whole_derivative(changes):
    # Against the change of the replayed video itself when the parameters move a little.
    _, streamer, params, text, drawn = _setup(**changes)
    assert drawn.keys is None or float(drawn.sigma_T[-1]) > float(drawn.keys.sigma_T[-1]), "some chunks leave early"
    value = _replay(ContextGrad(), frames=True, segment=0, **changes)
    grads = value(params)[2]
    _, stopped = _replayed(ContextGrad(), **changes)
    assert _distance(stopped, grads) > 1e-2
    step = 1e-2
    for direction in (grads, stopped):  # the second has parts across the gradient
        ahead, behind = (value(_moved(params, direction, s))[0] for s in (step, -step))
        np.testing.assert_allclose((ahead - behind) / (2 * step), _slope(grads, direction), rtol=2e-2)


def test_segments_cut_the_flow_between_them():
    _, streamer, params, text, drawn = _setup(plan=NOISY)
    flow = {n: _replayed(ContextGrad(), frames=True, segment=n, plan=NOISY)[1] for n in (0, 2)}
    assert _distance(flow[2], flow[0]) > 1e-3
    with pytest.raises(ValueError, match="segment is 4 chunks, which does not divide the 6"):
        rollouts.replay(streamer, params, text, drawn, ContextGrad(), segment=4)


def test_exits():
    lengths = np.asarray([4, 2])
    assert rollouts.draw_exits(jax.random.key(0), lengths, "last") is None
    drawn = np.stack([rollouts.draw_exits(jax.random.key(i), lengths, "random") for i in range(64)])
    assert set(drawn[:, 0]) == {0, 1, 2, 3} and set(drawn[:, 1]) == {0, 1}
    drawn = np.stack([rollouts.draw_exits(jax.random.key(i), lengths, "random_but_first") for i in range(64)])
    assert set(drawn[:, 0]) == {3} and set(drawn[:, 1]) == {0, 1}
    with pytest.raises(ValueError, match="exit is 'first'; choose from random, last"):
        rollouts.draw_exits(jax.random.key(0), lengths, "first")
    # The same for all chunks of a list: the levels of a rollout are one of the first list, one of the second.
    levels = np.stack([_setup(seed=s)[4].sigma_T for s in range(1, 5)])
    assert all(row[0] in np.float32(SIGMAS[0]) and set(row[1:]) <= {np.float32(1.0), np.float32(0.6)} for row in levels)
    assert all(len(set(row[1:])) == 1 for row in levels)


def test_running_every_list_to_its_end_is_the_stream():
    student, streamer, params, text, drawn = _setup(how="last")
    state = streamer.init(params, text, jax.random.split(jax.random.key(1))[1], LATENT)
    step = jax.jit(streamer.step)
    for i in range(FRAMES):
        state, x = step(params, state)
        np.testing.assert_allclose(drawn.x0_BTHWC[:, i : i + 1], x, atol=1e-5 * float(jnp.abs(x).max()))
    np.testing.assert_allclose(drawn.sigma_T, [0.5] + [0.6] * (FRAMES - 1))


@pytest.mark.parametrize("causal", [False, True], ids=["etm_sdd", "causal"])
def test_training_looks_back_on_the_keys_that_inference_keeps(causal):
    """Chunks that leave early are noised to the last step's level; the others keep the keys of their last call."""
    levels = set()
    for seed in (5, 8):  # exits 1 and 0, then both lists whole
        case = dict(context="last_step_kv", seed=seed, **(dict(causal=True, window=3, sink=0) if causal else {}))
        student, _, _, _, drawn = _setup(**case)
        ends = np.asarray([0.5] + [0.6] * (FRAMES - 1), np.float32)
        np.testing.assert_array_equal(drawn.keys.sigma_T, ends)
        seen = rollouts.history(student, drawn)
        np.testing.assert_array_equal(seen.sdd_sigma_BT, np.stack([ends, ends]))
        for i, (sigma, end) in enumerate(zip(np.asarray(drawn.sigma_T), ends, strict=True)):
            keys = seen.sdd_frames_BTHWC[:, i]
            if sigma == end:
                np.testing.assert_array_equal(keys, drawn.exit_BTHWC[:, i])
            else:
                noise = (keys - (1 - end) * drawn.x0_BTHWC[:, i]) / end
                assert abs(float(noise.std()) - 1) < 0.25
            levels.add(sigma)
    assert levels == {np.float32(0.8), 1.0, 0.5, np.float32(0.6)}


@pytest.mark.parametrize("causal", [False, True], ids=["etm_sdd", "causal"])
def test_the_kept_frames_are_recorded(causal):
    drawn = _setup(**(NOISY_CAUSAL if causal else dict(plan=NOISY)))[4]
    np.testing.assert_allclose(drawn.context_sigma_T, [0.0] + [0.357] * (FRAMES - 1), atol=1e-7)
    np.testing.assert_array_equal(drawn.context_BTHWC[:, 0], drawn.x0_BTHWC[:, 0])
    noise = (drawn.context_BTHWC - (1 - 0.357) * drawn.x0_BTHWC)[:, 1:] / 0.357
    assert abs(float(noise.std()) - 1) < 0.1 and float(jnp.abs(noise[:, 0] - noise[:, 1]).max()) > 0.1
