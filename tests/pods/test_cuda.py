"""Lowered and compiled for NVIDIA cards, of which none is here: which attention the programs of 1.3B call there."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from greedy_distill_jax import compile as command
from greedy_distill_jax.cli.config_flags import read_config
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.wan.linear import compute_precision
from greedy_distill_jax.ops.attention import Pattern, aot, select, tuning
from greedy_distill_jax.ops.attention.api import chunk_attention
from greedy_distill_jax.ops.attention.calls import recorded_calls
from greedy_distill_jax.pods import hlo, topologies
from greedy_distill_jax.pods.jobs import STREAM, build_job
from greedy_distill_jax.streaming.make import make_streamer
from tests.pods.compiled import compile_train

CUDNN, GRADIENT = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"  # targets of XLA's custom calls


@pytest.fixture
def lower(monkeypatch):
    """``(make, *shapes)`` -> (StableHLO for CUDA of what ``make()`` jits, the attention calls that are traced)."""
    monkeypatch.setattr(select, "device", lambda: ("cuda", "NVIDIA H100 80GB HBM3"))
    monkeypatch.setattr(tuning, "record", lambda target: {})  # a table may prefer the kernels
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
    stored = jax.eval_shape(lambda: model.init(key, (1, *size.latent_shape)))
    params = compute_precision(stored, base.dtype)  # as a stream holds them
    read, kept = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (params, stored))
    assert 0.5 <= read / kept < 0.52, "half, but for time embedding, head, biases and norms"
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


@pytest.mark.parametrize("file, step", [("teacher_forcing", "teacher_forcing"), ("dmd", "dmd")])
def test_the_cards_of_a_host_attend_by_cudnn_alone(lower, file, step):
    """FSDP over eight, at full width with two layers: the calls are under ``shard_map``."""
    config = read_config(f"configs/wan1_3b/nvidia.py:{file}@h100:8")
    config.model.num_layers, config.data.frames, config.data.batch, config.data.accumulate = 2, 4, 8, 1

    def make():
        job = build_job(read_settings(config, imagine_runs=True), jax.devices(), only=step)
        (found,) = [s for s in job.steps if s.name != STREAM]
        return found.call, *found.arguments

    found, calls = lower(make)
    assert {call.backend for call in calls} == {"cudnn"} and {call.queries[0] for call in calls} == {1}
    assert found.count(GRADIENT) >= 2


# --- Compiled -------------------------------------------------------------------------------------------------------

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax's CUDA plugin is not installed"
)


def called_types(text):
    """Operands and results of the attention calls of a program, without cuDNN's workspace, transposed as in memory."""
    out = []
    for line in text.splitlines():
        if "custom_call @__cudnn$fmha" in line or "custom_call @stand_in_" in line:
            operands, results = line.rsplit(" : ", 1)[1].split(" -> ")
            shapes = [re.findall(r"tensor<([^>]*)>", part) for part in (operands, results)]
            shapes[1] = [shape for shape in shapes[1] if not shape.endswith("ui8")]
            out.append(shapes)
    return out


@pytest.mark.parametrize("visible", [False, True])
def test_a_stand_in_has_the_shapes_of_the_call_it_stands_in_for(lower, visible):
    pattern = Pattern(16, 16, 3, ((0,), (0, 1), (1, 2)))
    shape = jax.ShapeDtypeStruct((2, 48, 2, 64), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((3,), jnp.int32)

    def make():
        def gradient(q, k, v, lengths):
            def total(q, k, v):
                out = chunk_attention(q, k, v, pattern, lengths_Q=lengths if visible else None)
                return out.astype(jnp.float32).sum()

            return jax.grad(total, (0, 1, 2))(q, k, v)

        return jax.jit(gradient), shape, shape, shape, lengths

    real, calls = lower(make)
    assert not any(call.stand_in for call in calls)
    with recorded_calls(stand_ins=True) as calls:
        call, *shapes = make()
        stand_in = call.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert {(call.backend, call.stand_in) for call in calls} == {("cudnn", True)}
    wanted, found = called_types(real), called_types(stand_in)
    assert len(wanted) == 4 and [f[0] for f in found] == [w[0] for w in wanted]  # two lengths of lists, both passes

    def sizes(results):  # cuDNN's are [B, N, L, K], laid out in memory as [B, L, N, K]
        return [sorted(shape.split("x")) for shape in results]

    assert [sizes(f[1]) for f in found] == [sizes(w[1]) for w in wanted]


def test_stand_ins_are_counted_as_kernels():
    text = """HloModule m

ENTRY %main (x: bf16[2]) -> bf16[2] {
  %x = bf16[2]{0} parameter(0)
  ROOT %y = (bf16[2]{0}, u8[4]{0}) custom-call(%x), custom_call_target="stand_in_forward"
}
"""
    assert hlo.counts(text)["kernels"].runs == 1


@pytest.mark.parametrize(
    "topology, message",
    [
        ("h100:3", "unknown topology 'h100:3'; choose from"),
        ("h200", "h200 is a generation of chips; search it for a slice, or name one: h200:1, h200:2, h200:4, h200:8"),
    ],
)
def test_cards_that_there_are_not(topology, message):
    with pytest.raises(UserError) as error:
        topologies.devices(topology)
    assert message in str(error.value) and "h200:1" in str(error.value)


def test_cards_need_their_compiler(monkeypatch, capsys):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    arguments = ["--config=configs/wan1_3b/nvidia.py:dmd@h100:1", "--topology=h100:1"]
    with pytest.raises(UserError, match="pip install 'jax>=0.11.2' jax-cuda13-plugin") as error:
        command.main(["train", *arguments])
    assert "\n" not in str(error.value) and not capsys.readouterr().out
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(aot.jax, "__version_info__", (0, 10, 2))
    with pytest.raises(UserError, match="needs jax 0.11.2, and this is"):
        aot.describe("h200:1")


@pytest.mark.parametrize("cards, count", [("h100:1", 1), ("h200:8", 8)])
@pytest.mark.parametrize("file", ["teacher", "teacher_forcing", "causal", "dmd:diagonal"])
def test_presets_keep_the_batch(file, cards, count):
    name, _, own = file.partition(":")
    plain = read_config(f"configs/wan1_3b/{name}.py" + f":{own}" * bool(own))
    config = read_config(f"configs/wan1_3b/nvidia.py:{file}@{cards}")
    settings = read_settings(config, imagine_runs=True)
    mesh = make_mesh(dataclasses.asdict(settings.mesh), jax.devices()[:count])
    assert dict(mesh.shape) == {"data": 1, "fsdp": count, "context": 1, "tensor": 1}
    assert settings.data.batch == 64 == settings.data.accumulate * count  # a video on every card
    for key in ("data.accumulate", "mesh.data", "mesh.fsdp", "mesh.context"):
        group, key = key.split(".")
        config[group][key] = plain[group][key]
    assert config.to_dict() == plain.to_dict()


@pytest.mark.parametrize("arg", ["dmd", "dmd@v5e:2x2", "rl@h100:1"])
def test_presets_that_there_are_not(arg):
    with pytest.raises(
        UserError, match="is not FILE@CARDS; FILE is one of teacher, teacher_forcing, causal, dmd, CARDS"
    ):
        read_config(f"configs/wan1_3b/nvidia.py:{arg}")


# Training steps take minutes to compile: benchmarks/pods.py does them.


@pytest.mark.slow
@pytest.mark.subprocesses
@needs_plugin
@pytest.mark.parametrize("cards", ["h200:1", "h100:8"])
def test_a_stream_compiles_without_a_card(cards, tmp_path):
    """At full width with two layers: cuDNN's calls by their stand-ins, parameters over the cards of a host."""
    arguments = [f"--config=configs/wan1_3b/nvidia.py:dmd@{cards}", "--config.model.num_layers=2", "--only=stream"]
    record, said = compile_train(tmp_path, *arguments, f"--topology={cards}")
    assert "cudnn compiles on a card only: its calls were compiled as calls that compute nothing" in said
    (step,) = record["steps"]
    assert step["fits"] and step["memory"]["temporaries"] > 0 and step["hbm"] == int(topologies.CHIPS[cards[:4]].hbm)
    assert {(call["backend"], call["stand_in"]) for call in step["attention_calls"]} == {("cudnn", True)}
    # One chunk: ETM once, SDD four times to denoise; a block each, self-attention and text. The pass for its keys needs
    # no attention in a last block.
    assert step["collectives"]["kernels"]["runs"] == (1 + 4) * 2
    assert bool(step["sent_bytes_per_device"]) == (cards != "h200:1")
