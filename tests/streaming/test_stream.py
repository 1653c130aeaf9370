"""Streaming equals full: the step-by-step form with caches against one parallel pass over the whole video."""

import dataclasses
import functools
import gc
import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.cli.config_flags import read_config
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.models.students.base import History
from greedy_distill_jax.models.students.causal import CausalStudent
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.ops.attention import backends
from greedy_distill_jax.ops.attention.backends import reference
from greedy_distill_jax.ops.attention.backends.record import Backend
from greedy_distill_jax.streaming.etm_sdd import Streamer
from greedy_distill_jax.streaming.loop import cache_bytes, initial_noise
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.testing.pairwise import pairwise

LATENT = (4, 4, 4)
NOISY = StepPlan(((1.0, 0.6),), context_sigmas=(0.0, 0.357))
OPTIONS = {
    "fusion": ["selfkv", "xattn2", "replace", "add", "concat", "adaln"],
    "rope_mode": ["clamped", "absolute", "fixed"],
    "context": ["clean", "fused", "last_step_kv"],
    "chunk": [1, 2],
    "window": [3, 1],
    "sink": [0, 2],
    "split": [((0, 1), (0, 1, 2)), ((0,), (1, 2)), ((0, 2, 1), (1,))],
}


def _config(case):
    case = dict(case)
    if "split" in case:
        case["etm_layers"], case["sdd_layers"] = case.pop("split")
    return tiny.student_config(**case)


def _params(student):
    return tiny.random_params(student, latent_shape=(1, *LATENT))


def _stream(student, params, text, frames, plan):
    """(frames, the noise every chunk started from), both [B, T, H, W, C]."""
    streamer = Streamer(student, plan)

    def body(state, _):
        _, key = jax.random.split(state.key)
        noise = initial_noise(key, state.last.shape)
        state, x = streamer.step(params, state)
        return state, (x, noise)

    def run(params, text):
        state = streamer.init(params, text, jax.random.key(7), LATENT)
        return jax.lax.scan(body, state, length=frames // student.cfg.chunk)[1]

    out = jax.jit(run)(params, text)
    return [jnp.concatenate(list(x), axis=1) for x in out]


def _parallel(student, params, text, frames, noise, sigmas):
    """The same denoising, every chunk at once, given the frames as history."""
    zero = jnp.zeros((len(frames), 1), jnp.float32)
    call = jax.jit(lambda params, x, s, history: student(params, x, s, text, history))
    history, last, rounds = History(frames, zero), noise, 1
    if student.cfg.context == "last_step_kv":
        # Keys come from the last denoising inputs, which depend on earlier chunks' keys: one more chunk is right after
        # every round.
        rounds = student.chunks_of(frames.shape[1])
    for _ in range(rounds):
        if student.cfg.context == "last_step_kv":
            history = history._replace(sdd_frames_BTHWC=last, sdd_sigma_BT=zero + sigmas[-1])
        x = noise
        for sigma, after in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
            last = x
            x = x + (after - sigma) * call(params, x, zero + sigma, history)
    return x


def _compare(case, frames, batch=2):
    student = Student(_config(case))
    params, text = _params(student), tiny.text_rows(batch, jax.random.key(3))
    sigmas = (1.0, 0.6)
    streamed, noise = _stream(student, params, text, frames, StepPlan((sigmas,)))
    full = _parallel(student, params, text, streamed, noise, sigmas)
    assert float(jnp.abs(streamed).mean()) > 0.1
    np.testing.assert_allclose(streamed, full, atol=1e-5 * max(1.0, float(jnp.abs(full).max())))


@pytest.mark.parametrize("case", pairwise(OPTIONS), ids=lambda c: "-".join(str(v) for v in c.values()).replace(" ", ""))
def test_streaming_equals_full(case):
    _compare(case, frames=12)


@pytest.mark.parametrize("fusion", OPTIONS["fusion"])
def test_streaming_equals_full_with_weights_of_the_context_pass(fusion):
    more = dict(selfkv=dict(chunk=2, sink=2), add=dict(rope_mode="absolute"), xattn2=dict(anchor=False)).get(fusion, {})
    _compare(dict(fusion=fusion, context_weights="own", **more), frames=12)


@pytest.mark.parametrize("causal", [False, True], ids=["etm_sdd", "causal"])
def test_copied_weights_of_the_context_pass_change_nothing(causal):
    make, config = (CausalStudent, tiny.causal_config) if causal else (Student, tiny.student_config)
    shared, own = make(config()), make(config(context_weights="own"))
    params, text = _params(shared), tiny.text_rows(2, jax.random.key(3))
    copied = own.with_context(params)
    assert len(jax.tree.leaves(copied)) > len(jax.tree.leaves(params)) and own.with_context(copied) is copied
    assert jax.tree.structure(copied) == jax.tree.structure(_params(own))
    keys = jax.random.split(jax.random.key(5), 3)
    frames, x = (jax.random.normal(k, (2, 6, *LATENT)) for k in keys[:2])
    history, sigma = History(frames, jnp.zeros((2, 1))), jax.random.uniform(keys[2], (2, 6))
    full = [jax.jit(s.__call__)(p, x, sigma, text, history) for s, p in ((shared, params), (own, copied))]
    np.testing.assert_allclose(*full, atol=1e-5)
    streamed = [make_streamer(s, NOISY) for s in (shared, own)]
    streams = []
    for streamer, p in zip(streamed, (params, copied), strict=True):
        state = streamer.init(p, text, jax.random.key(7), LATENT)
        step = jax.jit(streamer.step)
        state, _ = step(p, state)
        state, _ = step(p, streamer.switch_prompt(p, state, text[::-1]))
        streams.append(step(p, state)[1])
    np.testing.assert_allclose(*streams, atol=1e-5)
    moved = jax.tree_util.tree_map_with_path(lambda path, v: v * (1.1 if "context" in path[0].key else 1.0), copied)
    assert float(jnp.abs(jax.jit(own.__call__)(moved, x, sigma, text, history) - full[0]).max()) > 1e-3


@pytest.mark.parametrize("rope_mode", OPTIONS["rope_mode"])
@pytest.mark.parametrize("frames", [24, 1032])
def test_streaming_equals_full_on_long_streams(rope_mode, frames):
    _compare(dict(rope_mode=rope_mode, sink=1, window=3), frames, batch=1)


def test_the_defaults_of_the_quickstart():
    config = read_settings(read_config("configs/quickstart.py:student").lock()).student_config
    base = dataclasses.replace(tiny.BASE, num_layers=config.base.num_layers, prediction=config.base.prediction)
    config = dataclasses.replace(config, base=base)
    assert (config.fusion, config.window, config.rope_frames) == ("selfkv", 4, 8)
    _compare({f.name: getattr(config, f.name) for f in dataclasses.fields(config)}, frames=24, batch=1)


def test_bfloat16_streams_close_to_float32():
    streams = []
    for dtype in ("float32", "bfloat16"):
        student = Student(tiny.student_config(base=dataclasses.replace(tiny.BASE, dtype=dtype)))
        params, text = _params(student), tiny.text_rows(1, jax.random.key(3))
        streams.append(_stream(student, params, text, 4, StepPlan(((1.0, 0.6),)))[0])
    error = jnp.linalg.norm(streams[0] - streams[1]) / jnp.linalg.norm(streams[0])
    assert 0 < float(error) < 0.1


def test_past_the_training_length_of_wan():
    _compare(dict(rope_frames=21, window=7), frames=30, batch=1)


@pytest.mark.parametrize("context_sigma", [0.0, 0.357])
def test_fused_and_clean_give_the_same_stream(context_sigma):
    streams, plan = [], StepPlan.parse("4,3,2", shift=5.0, sampler="renoise", context_sigma=context_sigma)
    for mode in ("clean", "fused"):
        student = Student(tiny.student_config(context=mode))
        params = _params(student)
        streams.append(_stream(student, params, tiny.text_rows(1, jax.random.key(3)), 8, plan)[0])
    np.testing.assert_allclose(*streams, atol=1e-5)


@functools.cache
def _given_history(config, frames):
    """(a video, the parallel form of another one as a function of the video it looks back on)."""
    student = Student(config)
    params, text = _params(student), tiny.text_rows(1, jax.random.key(3))
    keys = jax.random.split(jax.random.key(5), 2)
    frames_, x = (jax.random.normal(k, (1, frames, *LATENT)) for k in keys)
    one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
    return frames_, jax.jit(lambda h: student(params, x, one, text, History(h, zero)))


def _changed(case, frame_changed, frames=8):
    """Which frames of the parallel form change when one history frame does."""
    frames_, call = _given_history(_config(case), frames)
    difference = jnp.abs(call(frames_) - call(frames_.at[:, frame_changed].add(1.0)))
    return [int(i) for i in np.flatnonzero(difference.max(axis=(0, 2, 3, 4)) > 1e-5)]


def test_who_sees_whom():
    # One ETM layer, window 2: slot j reads frames j-2 (through the window) and j-1; SDD adds frames 0 and j-1, and the
    # clean pass of frame j-1 has seen frame j-2 and its own z.
    case = dict(window=2, split=((0,), (1,)))
    assert _changed(case, 0) == [1, 2, 3, 4, 5, 6, 7]
    assert _changed(case, 3) == [4, 5]
    assert _changed(dict(window=1, split=((0,), (1,))), 3) == [4]
    assert _changed(dict(window=2, sink=2, split=((0,), (1,))), 0) == [1, 2, 3, 4, 5, 6, 7]
    assert _changed(case, 7) == []


def test_first_chunk_takes_its_own_step_list():
    student = Student(tiny.STUDENT)
    params, text = _params(student), tiny.text_rows(1, jax.random.key(3))
    outs = []
    for sigmas in [((1.0, 0.5), (1.0,)), ((1.0, 0.5),), ((1.0,),)]:
        streamer = Streamer(student, StepPlan(sigmas, "renoise"))
        state = streamer.init(params, text, jax.random.key(7), LATENT)
        outs.append(jax.jit(streamer.step)(params, state)[1])
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-6)
    assert float(jnp.abs(outs[0] - outs[2]).max()) > 1e-3


STEADY = {
    "etm_sdd": tiny.student_config(window=2, sink=1, rope_frames=4),
    "no history": tiny.student_config(window=1, anchor=False, rope_mode="absolute", fusion="add"),
    "fused": tiny.student_config(window=2, context="fused"),
    "fused, no anchor": tiny.student_config(window=1, context="fused", anchor=False, fusion="xattn2"),
    "last_step_kv": tiny.student_config(window=2, context="last_step_kv", etm_input="clean"),
    "causal": tiny.causal_config(window=4, sink=1, rope_mode="relative"),
    "a sink alone": tiny.causal_config(window=3, sink=2),
}


@pytest.mark.parametrize("case", STEADY)
def test_a_stream_whose_slots_are_full_needs_no_mask(case, monkeypatch):
    config, masks = STEADY[case], []
    plan = StepPlan(((1.0, 0.7, 0.4), (1.0, 0.5)), "renoise")

    def attend(q, k, v, lengths_Q, call):
        masks.append(lengths_Q)
        return reference.attend(q, k, v, lengths_Q, call)

    monkeypatch.setattr(backends, "BACKENDS", (Backend("watched", lambda request: None, attend),))
    streamer = make_streamer(make_student(config), plan)
    params, text = _params(streamer.student), tiny.text_rows(1, jax.random.key(3))
    state, step = streamer.init(params, text, jax.random.key(7), LATENT), jax.jit(streamer.step)
    for _ in range(streamer.warm_up):
        state, _ = step(params, state)
    assert any(lengths is not None for lengths in masks)
    masks.clear()
    steady, full = jax.jit(streamer.steady().step), state
    for _ in range(3):
        (state, expected), (full, found) = step(params, state), steady(params, full)
        np.testing.assert_allclose(found, expected, atol=1e-5)  # roundings add up over chunks
    assert masks and all(lengths is None for lengths in masks)
    for a, b in zip(jax.tree.leaves(state._replace(key=None)), jax.tree.leaves(full._replace(key=None)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_switch_prompt_changes_the_future_only_through_text():
    student = Student(tiny.STUDENT)
    params = _params(student)
    a, b = (tiny.text_rows(1, jax.random.key(i)) for i in (3, 4))
    streamer = Streamer(student, StepPlan(((1.0, 0.5),)))
    step = jax.jit(streamer.step)
    state = streamer.init(params, a, jax.random.key(7), LATENT)
    for _ in range(3):
        state, _ = step(params, state)
    same = step(params, streamer.switch_prompt(params, state, a))[1]
    other = step(params, streamer.switch_prompt(params, state, b))[1]
    np.testing.assert_allclose(same, step(params, state)[1], atol=1e-6)
    assert float(jnp.abs(same - other).max()) > 1e-3


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc (Linux)")
def test_state_and_live_buffers_do_not_grow():
    student = Student(tiny.STUDENT)
    params = _params(student)
    streamer = Streamer(student, StepPlan(((1.0,),)))
    step = jax.jit(streamer.step, donate_argnums=1)
    state = streamer.init(params, tiny.text_rows(1, jax.random.key(3)), jax.random.key(7), LATENT)
    bytes_, live, resident = {}, {}, {}
    for n in range(1, 2049):
        state, x = step(params, state)
        if n in (64, 2048):
            x.block_until_ready()
            gc.collect()
            bytes_[n], live[n], resident[n] = cache_bytes(state), len(jax.live_arrays()), _resident_bytes()
    assert resident[2048] <= 1.01 * resident[64], "the process grew while it streamed"
    assert bytes_[64] == bytes_[2048] and live[64] == live[2048]
    assert step._cache_size() == 1, "the step was compiled more than once"


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Streamer(Student(tiny.student_config(context="last_step_kv")), NOISY), "'last_step_kv' keeps"),
        (lambda: Student(tiny.student_config(chunk=3)).chunks_of(8), "do not divide into chunks of 3"),
        (lambda: tiny.student_config(fusion="sum"), "choose from"),
        (lambda: tiny.student_config(etm_layers=(5,)), "numbered from 0"),
        (lambda: tiny.student_config(window=0), "window >= 1"),
        (lambda: tiny.student_config(context_weights="both"), "choose from"),
        (lambda: tiny.student_config(context_weights="own", context="fused"), "context 'fused' makes no call"),
        (lambda: tiny.causal_config(context_weights="own", context="last_step_kv"), "use context 'clean'"),
    ],
)
def test_bad_input_names_the_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
