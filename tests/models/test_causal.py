"""The causal student: the teacher's parameters, who sees whom, streaming equals full, recaches at a prompt switch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.models.students import patterns
from greedy_distill_jax.models.students.base import History
from greedy_distill_jax.models.students.causal import CausalStudent
from greedy_distill_jax.models.students.config import CausalConfig
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.ops.attention import Pattern
from greedy_distill_jax.streaming.causal import CausalStreamer
from greedy_distill_jax.streaming.loop import cache_bytes, initial_noise
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.testing.pairwise import pairwise

LATENT = (4, 4, 4)
OPTIONS = {
    "chunk": [1, 3],
    "window": [12, 6, 0],
    "sink": [0, 3],
    "rope_mode": ["absolute", "relative"],
    "context": ["clean", "last_step_kv"],
    "sampler": ["euler", "renoise"],
    "recache": [False, True],
}


def _student(**changes):
    return CausalStudent(tiny.causal_config(**changes))


def _params(student):
    return tiny.random_params(student, latent_shape=(1, *LATENT))


def _stream(student, params, text, frames, plan):
    """(frames [B, T, H, W, C], the key each chunk was made with)."""
    streamer = CausalStreamer(student, plan)

    def body(state, _):
        key = jax.random.split(state.key)[1]
        state, x = streamer.step(params, state)
        return state, (x, key)

    def run(params, text):
        state = streamer.init(params, text, jax.random.key(7), LATENT)
        return jax.lax.scan(body, state, length=student.chunks_of(frames))[1]

    x, keys = jax.jit(run)(params, text)
    return jnp.concatenate(list(x), axis=1), keys


def _noise(keys, n, shape):
    """Noise number n of every chunk, [B, T, H, W, C]; 0 is the start."""
    draw = initial_noise if n == 0 else lambda k, s: jax.random.normal(jax.random.fold_in(k, n), s, jnp.float32)
    return jnp.concatenate([draw(k, shape) for k in keys], axis=1)


def _parallel(student, params, text, frames, keys, plan):
    """The same denoising, every chunk at once, given the streamed frames as history."""
    sigmas, shape = plan.sigmas[0], (len(frames), student.cfg.chunk, *LATENT)
    zero = jnp.zeros((len(frames), 1), jnp.float32)
    call = jax.jit(lambda params, x, s, history: student(params, x, s, text, history))
    noises = [_noise(keys, n, shape) for n in range(len(sigmas))]
    history, last, rounds = History(frames, zero), noises[0], 1
    if student.cfg.context == "last_step_kv":
        # Keys come from the last denoising inputs, which depend on earlier chunks' keys: one more chunk is right after
        # every round.
        rounds = student.chunks_of(frames.shape[1])
    for _ in range(rounds):
        if student.cfg.context == "last_step_kv":
            history = history._replace(sdd_frames_BTHWC=last, sdd_sigma_BT=zero + sigmas[-1])
        x = noises[0]
        for n, (sigma, after) in enumerate(zip(sigmas, (*sigmas[1:], 0.0), strict=True)):
            last = x
            v = call(params, x, zero + sigma, history)
            if plan.sampler == "euler" or after == 0:
                x = x + (after - sigma) * v
            else:
                x = (1 - after) * (x - sigma * v) + after * noises[n + 1]
    return x


def _compare(frames, batch=2, sampler="euler", **changes):
    student = _student(**changes)
    params, text = _params(student), tiny.text_rows(batch, jax.random.key(3))
    plan = StepPlan(((1.0, 0.6),), sampler)
    streamed, keys = _stream(student, params, text, frames, plan)
    full = _parallel(student, params, text, streamed, keys, plan)
    assert float(jnp.abs(streamed).mean()) > 0.1
    np.testing.assert_allclose(streamed, full, atol=1e-5 * max(1.0, float(jnp.abs(full).max())))


@pytest.mark.parametrize("case", pairwise(OPTIONS), ids=lambda c: "-".join(str(v) for v in c.values()))
def test_streaming_equals_full(case):
    _compare(frames=18, **({"max_frames": 9} | case))


@pytest.mark.parametrize("rope_mode", ["absolute", "relative"])
def test_longlives_window_past_its_eviction_point(rope_mode):
    """12 frames = 3 sink + 6 history + 3 own: from frame 12 on something is evicted for every chunk."""
    _compare(frames=36, batch=1, chunk=3, window=12, sink=3, rope_mode=rope_mode)


@pytest.mark.parametrize("rope_mode", ["absolute", "relative"])
def test_past_frame_1024(rope_mode):
    _compare(frames=1032, batch=1, rope_mode=rope_mode, chunk=3, window=12, sink=3)


@pytest.mark.parametrize("window, sink", [(1, 0), (3, 2)], ids=["own chunk only", "a sink without a ring"])
def test_windows_without_sliding_history(window, sink):
    for recache in (False, True):
        _compare(frames=6, batch=1, window=window, sink=sink, recache=recache)


def test_bfloat16_streams_close_to_float32():
    streams = []
    for dtype in ("float32", "bfloat16"):
        student = _student(base=dataclasses.replace(tiny.BASE, dtype=dtype))
        text = tiny.text_rows(1, jax.random.key(3))
        streams.append(_stream(student, _params(student), text, 6, StepPlan(((1.0, 0.6),)))[0])
    error = jnp.linalg.norm(streams[0] - streams[1]) / jnp.linalg.norm(streams[0])
    assert 0 < float(error) < 0.1


# --- The teacher's parameters ---------------------------------------------------------------------------------------


def test_the_tree_is_the_teachers_and_has_wans_size():
    base = WanConfig(**WAN_SIZES["wan1_3b"])
    trees = [
        jax.eval_shape(lambda k, m=m: m.init(k, (3, 4, 4, 16)), jax.random.key(0))
        for m in (CausalStudent(CausalConfig(base=base)), Teacher(base))
    ]
    assert sum(x.size for x in jax.tree.leaves(trees[0])) == 1_418_996_800
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
    assert jax.tree.leaves(trees[0]) == jax.tree.leaves(trees[1])


def test_one_chunk_of_all_frames_is_the_teacher():
    teacher, student = Teacher(tiny.BASE), _student(chunk=6, window=6, sink=0)
    weights = tiny.random_params(teacher)
    params = student.from_teacher(jax.random.key(0), weights, (6, *LATENT))
    assert jax.tree.structure(params) == jax.tree.structure(weights)
    x, text = jax.random.normal(jax.random.key(2), (2, 6, *LATENT)), tiny.text_rows(2, jax.random.key(3))
    sigma = jnp.asarray([[0.3], [0.9]])
    history = History(jnp.zeros_like(x), jnp.zeros((2, 1)))
    one, whole = jax.jit(lambda p: student(p, x, sigma, text, history)), jax.jit(lambda p: teacher(p, x, sigma, text))
    np.testing.assert_allclose(one(params), whole(weights), atol=1e-5)


# --- Who sees whom --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_layer():
    """A student, its parameters, x, text and history of 8 frames."""
    student = _student(base=dataclasses.replace(tiny.BASE, num_layers=1), window=4, sink=1)
    keys = jax.random.split(jax.random.key(5), 2)
    frames, x = (jax.random.normal(k, (1, 8, *LATENT)) for k in keys)
    return student, _params(student), x, tiny.text_rows(1, jax.random.key(3)), frames


def test_who_sees_whom(one_layer):
    """One layer: chunk i sees its own x, the sink 0 and the two frames before it."""
    student, params, x, text, frames = one_layer
    one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
    call = jax.jit(lambda x, h: student(params, x, one, text, History(h, zero)))
    base = call(x, frames)

    def changed(x, h):
        difference = jnp.abs(call(x, h) - base).max(axis=(0, 2, 3, 4))
        return [int(i) for i in np.flatnonzero(difference > 1e-5)]

    assert changed(x, frames.at[:, 0].add(1.0)) == [1, 2, 3, 4, 5, 6, 7]
    assert changed(x, frames.at[:, 3].add(1.0)) == [4, 5]
    assert changed(x, frames.at[:, 7].add(1.0)) == []
    assert changed(x.at[:, 3].add(1.0), frames) == [3]


def test_the_layout_is_the_sliding_window_of_the_op():
    cfg = tiny.causal_config(chunk=3, window=12, sink=3)
    layout = patterns.causal_parallel(cfg, 8, 5)
    picked = [[layout.source[p] for p in row] for row in layout.pattern.table]
    expected = Pattern.sliding_window(8, 5, window=3, sink=1).table  # its sink is on top of the window
    assert [tuple(sorted(row)) for row in picked[:7]] == list(expected[:7])
    clean = [sorted({7 + i, *row} - {i}) for i, row in enumerate(expected)]
    assert [sorted(row) for row in picked[7:]] == clean
    assert list(layout.key_position) == [min(c, c - 7 if c >= 7 else c) for c in layout.source]


def test_relative_positions_stay_within_the_window():
    cfg = tiny.causal_config(window=5, sink=2, rope_mode="relative")
    assert [int(patterns.causal_positions(cfg, np.asarray(i), i)) for i in range(9)] == [0, 1, 2, 3, 4, 4, 4, 4, 4]
    assert patterns.causal_positions(cfg, np.asarray([0, 1, 18, 19, 20]), 20).tolist() == [0, 1, 2, 3, 4]
    traced = jax.jit(lambda i: patterns.causal_positions(cfg, jnp.asarray([0, 1, 18, 19, 20]), i))(20)
    assert traced.tolist() == [0, 1, 2, 3, 4]


def test_noise_draws_share_the_clean_half(one_layer):
    student, params, x, text, frames = one_layer
    history = History(frames, jnp.zeros((1, 1)))
    other = jnp.flip(x, axis=1)
    sigma = jnp.linspace(0.1, 1.0, 16)[None]
    call = jax.jit(lambda x, s: student(params, x, s, text, history))
    both = call(jnp.concatenate([x, other], axis=1), sigma)
    for draw, s, v in zip((x, other), jnp.split(sigma, 2, axis=1), jnp.split(both, 2, axis=1), strict=True):
        np.testing.assert_allclose(call(draw, s), v, atol=1e-5)


def test_gradients_reach_every_parameter_and_match_a_finite_difference(one_layer):
    student, params, x, text, frames = one_layer
    sigma = jnp.linspace(0.1, 1.0, 8)[None]

    @jax.jit
    def loss(params):
        return jnp.mean(student(params, x, sigma, text, History(frames, jnp.zeros((1, 1)))) ** 2)

    grads = jax.jit(jax.grad(loss))(params)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert float(jnp.abs(g).max()) > 0, jax.tree_util.keystr(path)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    step = 1e-2
    ends = [loss(jax.tree.map(lambda p, g, s=s: p + s * step * g / norm, params, grads)) for s in (1.0, -1.0)]
    assert float(ends[0] - ends[1]) / (2 * step) == pytest.approx(float(norm), rel=1e-2)


# --- Prompt switch and recache --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["absolute", "relative"])
def switching(request):
    """(student, params, two prompts, jitted step, the streamer, state after 3 chunks) with recache and no sink."""
    student = _student(rope_mode=request.param, window=4, sink=0, recache=True)
    params, streamer = _params(student), CausalStreamer(student, StepPlan(((1.0, 0.5),)))
    a, b = (tiny.text_rows(1, jax.random.key(i)) for i in (3, 4))
    step = jax.jit(streamer.step)
    state, made = streamer.init(params, a, jax.random.key(7), LATENT), []
    for _ in range(3):
        state, x = step(params, state)
        made.append(x)
    return student, params, (a, b), step, streamer, state, jnp.concatenate(made, axis=1)


def test_switch_prompt_changes_the_future(switching):
    student, params, (a, b), step, streamer, state, _ = switching
    plain = CausalStreamer(CausalStudent(dataclasses.replace(student.cfg, recache=False)), streamer.plan)
    old = state._replace(frames=None)
    outs = [
        step(params, s)[1]
        for s in (
            state,
            plain.switch_prompt(params, old, a)._replace(frames=state.frames),
            plain.switch_prompt(params, old, b)._replace(frames=state.frames),
            streamer.switch_prompt(params, state, b),
        )
    ]
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-6)
    for i, j in ((0, 2), (0, 3), (2, 3)):
        assert float(jnp.abs(outs[i] - outs[j]).max()) > 1e-3


def test_recached_keys_are_the_teachers_of_those_frames(switching):
    """Three frames, no sink: one bidirectional pass at sigma 0, so the next frame sees what the teacher would cache."""
    student, params, (_, b), _, streamer, state, frames = switching
    cache = streamer.switch_prompt(params, state, b).cache
    whole = dataclasses.replace(student.cfg, chunk=3, window=3, max_frames=3)  # the three frames as one chunk
    one = CausalStudent(whole)
    own = (
        one.dit(patterns.causal_step(whole, 12), emit=("own",))
        .apply(
            {"params": params},
            frames,
            jnp.zeros((1, 1)),
            b,
            rope_q=one.rope(np.zeros(1, np.int32), (2, 2)),
            rope_k=one.rope(np.zeros(1, np.int32), (2, 2)),
        )[1]
        .own
    )
    np.testing.assert_allclose(cache.k, own.k, atol=1e-5)
    np.testing.assert_allclose(cache.v, own.v, atol=1e-5)


@pytest.mark.parametrize("made", [2, 7])
def test_recache_keeps_the_sink_and_reads_only_filled_slots(made):
    student = _student(chunk=2, window=8, sink=2, recache=True)
    params, streamer = _params(student), CausalStreamer(student, StepPlan(((1.0,),)))
    step = jax.jit(streamer.step)
    state = streamer.init(params, tiny.text_rows(1, jax.random.key(3)), jax.random.key(7), LATENT)
    for _ in range(made):
        state, x = step(params, state)
    switch, other = jax.jit(streamer.switch_prompt), tiny.text_rows(1, jax.random.key(4))
    after, tokens = switch(params, state, other), 8
    np.testing.assert_array_equal(after.cache.k[:, :, :tokens], state.cache.k[:, :, :tokens])
    changed = jnp.abs(after.cache.k - state.cache.k).max(axis=(0, 1, 3, 4)).reshape(3, tokens).max(1)[1:]
    filled = state.slots[1:] >= 0
    assert bool(jnp.all(changed[filled] > 1e-3)) and int(filled.sum()) == min(2, made - 1)
    newest = int(jnp.argmax(state.slots[1:]))
    np.testing.assert_array_equal(state.frames[:, 2 * newest : 2 * newest + 2], x)
    garbage = state._replace(frames=jnp.where(jnp.repeat(filled, 2)[None, :, None, None, None], state.frames, 9.0))
    same = step(params, switch(params, garbage, other))[1]
    np.testing.assert_allclose(step(params, after)[1], same, atol=1e-6)


def test_what_a_recache_recomputes_matters():
    """As long as the video is in the window a sink is recomputed either way; later each choice gives other frames."""
    choices = [{}, dict(recache_of="window"), dict(recache_of="window", global_sink=False)]
    made = {}
    for choice in range(3):
        student = _student(window=4, sink=1, recache=True, **choices[choice])
        params, streamer = _params(student), CausalStreamer(student, StepPlan(((1.0,),)))
        step, switch = jax.jit(streamer.step), jax.jit(streamer.switch_prompt)
        state = streamer.init(params, tiny.text_rows(1, jax.random.key(3)), jax.random.key(7), LATENT)
        for i in range(7):
            if i in (3, 6):
                other = switch(params, state, tiny.text_rows(1, jax.random.key(4)))
                made[i, choice] = step(params, other)[1]
            state, _ = step(params, state)
    np.testing.assert_allclose(made[3, 1], made[3, 2], atol=1e-6)
    for i, *pair in ((3, 0, 1), (6, 0, 1), (6, 0, 2), (6, 1, 2)):
        one, other = (made[i, choice] for choice in pair)
        assert float(jnp.abs(one - other).max()) > 1e-3, (i, pair)


def test_the_state_does_not_grow_and_the_step_compiles_once():
    student = _student(recache=True)
    params, streamer = _params(student), CausalStreamer(student, StepPlan(((1.0, 0.5), (1.0,)), "renoise"))
    step = jax.jit(streamer.step, donate_argnums=1)
    state = streamer.init(params, tiny.text_rows(1, jax.random.key(3)), jax.random.key(7), LATENT)
    sizes = []
    for _ in range(12):
        state, _ = step(params, state)
        sizes.append(cache_bytes(state))
    assert len(set(sizes)) == 1 and step._cache_size() == 1
    keys = 2 * 3 * 4 * tiny.BASE.num_layers * tiny.BASE.dim * 4  # K, V of 3 chunks of 4 tokens
    assert keys < sizes[0] < 2 * keys


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(chunk=0), "chunk >= 1"),
        (dict(recache_of="sink"), "recache_of"),
        (dict(global_sink=False), "recache_of 'ring' leaves the sink alone"),
        (dict(sink=-1), "sink >= 0; got 1 and -1"),
        (dict(chunk=3, window=10, sink=3), "window is 10 latent frames.*multiple of 3"),
        (dict(chunk=3, window=12, sink=2), "sink is 2 latent frames.*multiple of 3"),
        (dict(chunk=3, window=0, sink=0, max_frames=20), "max_frames is 20"),
        (dict(window=2, sink=2), "window is 2;.*at least 3"),
        (dict(window=-4, sink=0), "window is -4"),
        (dict(rope_mode="clamped"), "CausalConfig.rope_mode is 'clamped'; choose from absolute, relative"),
        (dict(context="fused"), "CausalConfig.context is 'fused'; choose from clean, last_step_kv"),
    ],
)
def test_bad_configs_name_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.causal_config(**changes)


def test_frames_that_do_not_fit_name_themselves():
    student = _student(chunk=3, window=6, sink=0)
    with pytest.raises(ValueError, match="8 latent frames do not divide into chunks of 3"):
        student.chunks_of(8)
    x = jnp.zeros((1, 4, *LATENT))
    with pytest.raises(ValueError, match="4 noisy frames are not a multiple of the 3 history frames"):
        student({}, x, jnp.ones((1, 1)), jnp.zeros((1, 2, 16)), History(x[:, :3], jnp.zeros((1, 1))))
