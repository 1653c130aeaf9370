"""Jobs checked before hardware is booked: real sizes compiled for slices that are not there, refusals, exit codes."""

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax import compile as command, hlo, pods, topology
from greedy_distill_jax.config_cli import read_config
from greedy_distill_jax.types import UserError

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

HLO = """HloModule step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %g = f32[32,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[4,4]<=[16], dimensions={0}
  %k = f32[8,4]{1,0} custom-call(%g), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%x, %k)
}

%cond (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %c = pred[] constant(true)
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %w = (s32[], f32[8,4]{1,0}) while(%a), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"15"}}
  %u = (s32[], f32[8,4]{1,0}) while(%a), condition=%cond, body=%body
  ROOT %r = f32[8,4]{1,0} all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def test_collectives_are_counted_with_their_trips():
    found = hlo.counts(HLO, unknown=2.5)
    gather, reduce = found["all-gather"], found["all-reduce"]
    assert (gather.instructions, gather.runs) == (2, 17.5)
    assert gather.bytes == 17.5 * 32 * 4 * 4 * 3 / 4
    assert (reduce.runs, reduce.bytes) == (1, 2 * 8 * 4 * 4 * 3 / 4)
    assert found["kernels"].runs == 17.5


def test_collectives_of_a_compiled_program():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*p)) for p in (("x",), ()))

    def call(x):
        return jax.lax.scan(lambda c, _: (jax.lax.with_sharding_constraint(c * 2, whole)[:4] + c, None), x, length=3)[0]

    compiled = jax.jit(call, in_shardings=split, out_shardings=split).lower(jnp.zeros((4, 8))).compile()
    assert sum(count.runs for count in hlo.counts(compiled.as_text()).values()) >= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology=v9:2x2"], "unknown topology 'v9:2x2'; choose from v5e:2x2|4x4"),
        (["--topology=v5e:3x3"], "unknown topology"),
        (["--topology=v5e:4x4", "--config.mesh.fsdp=3"], "does not fit 16 devices"),
        (["--topology=v5e:4x4", "--config.mesh.context=8"], "52 columns of patches, which do not divide by 8; choose"),
        (["--topology=v5e:4x4", "--config.data.accumulate=64"], "it must divide over the 4 data and fsdp parts"),
        (["--topology=v5e:4x4", "--only=nothing"], "no step of this job has that in its name"),
        ([], "--topology is missing"),
    ],
)
@needs_libtpu
def test_what_cannot_be_is_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        command.main(["train", "--config=configs/wan1_3b/teacher.py", *arguments])
    assert message in str(error.value) and "\n" not in str(error.value)


@needs_libtpu
def test_14b_on_four_small_chips_is_refused(capsys):
    arguments = ["--config=configs/wan14b/dmd.py", "--config.data.accumulate=32"]
    code = command.main(["train", *arguments, "--topology=v5e:2x2"])
    out = capsys.readouterr().out
    assert code == command.DOES_NOT_FIT == 3
    assert "DOES NOT FIT" in out and "GiB too much per device" in out and "a larger slice" in out


def check_real_size(record, *, parameters, teacher, critic, batch=64):
    """The job is the published one: nothing was shrunk to make it fit."""
    facts = record["facts"]
    assert (facts["frames"], facts["latents"]) == (21, "60x104")
    assert (facts["tokens_per_frame"], facts["tokens"]) == (1560, 32_760)
    assert (facts["text_rows"], facts["dtype"], facts["ema"], facts["batch"]) == (512, "bfloat16", True, batch)
    assert facts["batch"] == facts["accumulate"] * facts["microbatch_per_group"] * (
        facts["mesh"]["data"] * facts["mesh"]["fsdp"]
    )
    assert facts["parameters"] > parameters and facts["teacher_parameters"] == teacher
    assert facts["critic_parameters"] == critic and facts["cfg_branches"] == (2 if teacher else 1)


@pytest.mark.slow
@needs_libtpu
def test_stage_1_at_1_3b_compiles_for_16_chips():
    config = pods.imaginary_runs(read_config("configs/wan1_3b/teacher_forcing.py"))
    record = pods.report(config, "v6e:4x4", "480p", "forcing", say=print)
    check_real_size(record, parameters=1_418_996_800, teacher=0, critic=0)
    (step,) = record["steps"]
    assert record["fits"] and step["memory"]["peak"] < topology.CHIPS["v6e"].hbm
    assert step["attention"] == "pallas_tpu" and step["collectives"]["kernels"]["runs"] > 0
    assert step["collectives"]["all-gather"]["bytes"] > 0


@needs_libtpu
def test_the_command_exits_with_2_for_bad_input():
    arguments = ["train", "--config=configs/wan1_3b/teacher.py", "--topology=v5e:9x9"]
    done = subprocess.run(
        [sys.executable, "-m", "greedy_distill_jax.compile", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "choose from" in done.stderr
