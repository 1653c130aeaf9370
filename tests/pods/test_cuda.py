"""Lowered for NVIDIA GPUs, of which none is here: which attention the programs of 1.3B call there."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from greedy_distill_jax.config import read_settings
from greedy_distill_jax.ops.attention import select
from greedy_distill_jax.pods.jobs import STREAM, build_job
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.testing.attention_calls import recorded_calls

CUDNN, GRADIENT = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"  # targets of XLA's custom calls


@pytest.fixture
def lower(monkeypatch):
    """``(make, *shapes)`` -> (StableHLO for CUDA of what ``make()`` jits, the attention calls that are traced)."""
    monkeypatch.setattr(select, "device", lambda: ("cuda", "NVIDIA H100 80GB HBM3"))
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)  # else: cuDNN is not here

    def lower(make):
        with recorded_calls() as calls:
            call, *shapes = make()
            text = call.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
        print(*dict.fromkeys(calls), sep="\n")  # shown by -s
        return text, calls

    return lower


@pytest.fixture(scope="module")
def size(benchmarks):
    """1.3B on one device."""
    return benchmarks("sizes").SIZES["wan1_3b"]


@pytest.mark.parametrize("student", ["etm_sdd", "causal"])
def test_streams_attend_by_cudnn_alone(lower, size, student):
    settings = read_settings(size.config(student), imagine_runs=True)
    model, plan, base, key = settings.kind.model(settings), settings.plan, settings.wan, jax.random.key(0)
    streamer = make_streamer(model, plan)
    params = jax.eval_shape(lambda: model.init(key, (1, *size.latent_shape)))
    text = jax.ShapeDtypeStruct((1, base.text_len, base.text_dim), jnp.float32)
    state = jax.eval_shape(lambda p, t: streamer.init(p, t, key, size.latent_shape), params, text)
    made = jax.eval_shape(streamer.make, params, state)
    for filling in (True, False):
        own = streamer if filling else streamer.steady()
        for program, inputs in ((own.make, (state,)), (own.finish, made)):
            found, calls = lower(lambda f=program, x=inputs: (jax.jit(lambda *args: f(*args)), params, *x))
            assert {call.backend for call in calls} == {"cudnn"} and found.count(CUDNN) >= 2
            assert {call.lengths for call in calls if call.keys != base.text_len} == {filling}


@pytest.mark.parametrize("config, step", [("etm_sdd", "teacher_forcing"), ("dmd", "dmd"), ("dmd", "critic")])
def test_training_steps_attend_by_cudnn_alone(lower, size, benchmarks, config, step):
    settings = benchmarks("train_step").training_settings(size, config)

    def make():
        job = build_job(settings, jax.devices()[:1], size.latent_shape[:2], only=step)
        (found,) = [s for s in job.steps if s.name != STREAM]
        return found.call, *found.arguments

    found, calls = lower(make)
    assert {call.backend for call in calls} == {"cudnn"}
    assert found.count(GRADIENT) >= 2 and found.count(CUDNN) > found.count(GRADIENT)
