"""The causal student's stream against the same model in eager PyTorch: same noise in, same frames out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.models.students.causal import CausalStudent
from greedy_distill_jax.streaming.causal import CausalStreamer
from greedy_distill_jax.streaming.loop import CONTEXT_FOLD, draw_noise, split_key
from greedy_distill_jax.streaming.session import Session
from greedy_distill_jax.testing import tiny

pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")

SIGMAS, LATENT = (1.0, 0.8, 0.4), (4, 6, 4)


WINDOW = dict(recache=True, recache_of="window")
CASES = {  # configuration, noise level of kept chunks, chunks at which the prompt changes
    "sink": (dict(chunk=1, window=4, sink=1), 0.0, ()),
    "chunk": (dict(chunk=2, window=6, sink=0), 0.0, ()),
    "whole": (dict(chunk=1, window=0, sink=0), 0.0, ()),
    "switch": (dict(chunk=1, window=4, sink=1), 0.0, (2, 6)),
    "three": (dict(chunk=3, window=12, sink=3), 0.25, (2,)),
    "relative": (dict(chunk=2, window=8, sink=2, rope_mode="relative"), 0.1, (3,)),
    "ring": (dict(chunk=1, window=5, sink=1, recache=True), 0.1, (1, 3, 8)),
    "ring, relative": (dict(chunk=1, window=4, sink=2, recache=True, rope_mode="relative"), 0.0, (2, 7)),
    # LongLive's window of 12 frames in chunks of 3: switches before the window is full, as it is, and later.
    "longlive": (dict(chunk=3, window=12, sink=3, **WINDOW), 0.0, (2, 4, 6)),
    "longlive, another sink": (dict(chunk=3, window=12, sink=3, global_sink=False, **WINDOW), 0.0, (2, 5)),
    "longlive, two sinks": (dict(chunk=1, window=5, sink=2, global_sink=False, **WINDOW), 0.1, (3, 5, 6, 9)),
    "longlive, noise": (dict(chunk=1, window=5, sink=1, **WINDOW), 0.1, (1, 5, 6, 9)),
    "longlive, relative": (dict(chunk=1, window=4, sink=1, rope_mode="relative", **WINDOW), 0.0, (3, 7)),
    "longlive, relative, another sink": (
        dict(chunk=1, window=4, sink=1, rope_mode="relative", global_sink=False, **WINDOW),
        *(0.0, (7, 9)),
    ),
    "longlive, no sink": (dict(chunk=1, window=4, sink=0, **WINDOW), 0.0, (2, 7)),
    "longlive, sink alone": (dict(chunk=1, window=3, sink=2, **WINDOW), 0.0, (2, 6)),
}


@pytest.mark.parametrize("case", CASES)
def test_streams_the_same_frames(benchmarks, case):
    peer, (options, level, switches) = benchmarks("torch_causal"), CASES[case]
    base = dataclasses.replace(tiny.BASE, prediction="velocity", dtype="float32", remat="none", num_layers=2)
    cfg = tiny.causal_config(base=base, **options)
    plan = StepPlan((SIGMAS,), "renoise", (level,))
    streamer = CausalStreamer(CausalStudent(cfg), plan)
    params = tiny.random_params(streamer.student, latent_shape=(1, *LATENT))
    texts = [tiny.text_rows(2, jax.random.key(1 + n)) for n in range(len(switches) + 1)]
    other = peer.TorchCausal(params, cfg, np.asarray(texts[0]), SIGMAS, LATENT[:2], context_sigma=level)
    state, step = streamer.init(params, texts[0], jax.random.key(7), LATENT), jax.jit(streamer.step)
    switch = jax.jit(streamer.switch_prompt)
    for i in range(max(switches, default=8) + 3):
        if i in switches:
            text = texts[1 + switches.index(i)]
            state = switch(params, state, text)
            other.switch_prompt(np.asarray(text))
        noise = peer.step_noise(state, len(SIGMAS), context=level > 0)
        state, ours = step(params, state)
        theirs = other.step([other.tensor(x) for x in noise]).numpy()
        scale = max(1.0, float(jnp.std(ours)))
        np.testing.assert_allclose(theirs / scale, np.asarray(ours) / scale, atol=1e-5, rtol=0, err_msg=f"chunk {i}")


def test_goes_on_behind_given_frames(benchmarks):
    """A prefix of two chunks, kept at a noise level, then chunks of its own and a switch that recomputes all."""
    peer, level = benchmarks("torch_causal"), 0.1
    base = dataclasses.replace(tiny.BASE, prediction="velocity", dtype="float32", remat="none", num_layers=2)
    cfg = tiny.causal_config(base=base, chunk=2, window=8, sink=2, **WINDOW)
    streamer = CausalStreamer(CausalStudent(cfg), StepPlan((SIGMAS,), "renoise", (level,)))
    params = tiny.random_params(streamer.student, latent_shape=(1, *LATENT))
    texts = [tiny.text_rows(2, jax.random.key(1 + n)) for n in range(2)]
    given = np.asarray(jax.random.normal(jax.random.key(3), (2, 4, *LATENT), jnp.float32))
    other = peer.TorchCausal(params, cfg, np.asarray(texts[0]), SIGMAS, LATENT[:2], context_sigma=level)

    class Text:
        """Rows of one prompt, then of another."""

        def __call__(self, prompts):
            return texts[prompts[0] == "then"]

    session = Session(streamer, params, None, Text(), ["first", "first"], seed=7, latent_shape=LATENT)
    session.give(given)
    for i in range(6):
        if i == 4:
            session.switch_prompts("then")
            other.switch_prompt(np.asarray(texts[1]))
        shape = session.state.last.shape
        key = split_key(session.state.key)[1]
        drawn = [other.tensor(draw_noise(key, n, shape)) for n in (0, 1, 2, CONTEXT_FOLD)]
        ours = np.asarray(session.next_latents())
        if i < 2:
            np.testing.assert_array_equal(ours, given[:, 2 * i : 2 * i + 2])
            other.observe(other.tensor(ours), drawn[-1])
        else:
            theirs = other.step(drawn).numpy()
            scale = max(1.0, float(ours.std()))
            np.testing.assert_allclose(theirs / scale, ours / scale, atol=1e-5, rtol=0, err_msg=f"chunk {i}")


def test_refuses_what_it_does_not_stream(benchmarks):
    cfg = tiny.causal_config(context="last_step_kv")
    with pytest.raises(ValueError, match="clean context"):
        benchmarks("torch_causal").TorchCausal({}, cfg, np.zeros((1, 3, 6), np.float32), SIGMAS, LATENT[:2])
