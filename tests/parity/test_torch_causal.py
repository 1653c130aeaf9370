"""The causal student's stream against the same model in eager PyTorch: same noise in, same frames out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.models.students.causal import CausalStudent
from greedy_distill_jax.streaming.causal import CausalStreamer
from greedy_distill_jax.testing import tiny

pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")

SIGMAS, LATENT = (1.0, 0.8, 0.4), (4, 6, 4)


@pytest.mark.parametrize("chunk, window, sink", [(1, 4, 1), (2, 6, 0), (1, 0, 0)], ids=["sink", "chunk", "whole"])
def test_streams_the_same_frames(benchmarks, chunk, window, sink):
    peer = benchmarks("torch_causal")
    base = dataclasses.replace(tiny.BASE, prediction="velocity", dtype="float32", remat="none")
    cfg = tiny.causal_config(base=base, chunk=chunk, window=window, sink=sink)
    streamer = CausalStreamer(CausalStudent(cfg), StepPlan((SIGMAS,), "renoise"))
    params = tiny.random_params(streamer.student, latent_shape=(1, *LATENT))
    text = tiny.text_rows(2, jax.random.key(1))
    other = peer.TorchCausal(params, cfg, np.asarray(text), SIGMAS, LATENT[:2])
    state, step = streamer.init(params, text, jax.random.key(7), LATENT), jax.jit(streamer.step)
    for _ in range(12 // chunk):
        noise = peer.step_noise(state, len(SIGMAS))
        state, ours = step(params, state)
        theirs = other.step([other.tensor(x) for x in noise]).numpy()
        scale = max(1.0, float(jnp.std(ours)))
        np.testing.assert_allclose(theirs / scale, np.asarray(ours) / scale, atol=2e-5, rtol=0)


def test_refuses_what_it_does_not_stream(benchmarks):
    cfg = tiny.causal_config(rope_mode="relative")
    with pytest.raises(ValueError, match="absolute positions"):
        benchmarks("torch_causal").TorchCausal({}, cfg, np.zeros((1, 3, 6), np.float32), SIGMAS, LATENT[:2])
