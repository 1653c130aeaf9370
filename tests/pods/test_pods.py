"""Jobs checked before hardware is booked: real sizes compiled for slices that are not there, refusals, exit codes."""

import importlib.util
import json
import pathlib
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from greedy_distill_jax import compile as command
from greedy_distill_jax.cli.config_flags import read_config
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.flops import Flops
from greedy_distill_jax.ops.attention import aot
from greedy_distill_jax.pods import compile_step as step_compiler, facts, hlo, jobs, report, topologies
from greedy_distill_jax.training.cost import Cost
from tests.pods.compiled import compile_train

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
ROOT = pathlib.Path(__file__).parents[2]
MIB, GIB = 2**20, 2**30
TEACHER, DMD, RL = (f"configs/wan1_3b/{name}.py" for name in ("teacher", "dmd", "rl"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology=v9:2x2"], "--topology: unknown topology 'v9:2x2'; choose from v5e:2x2|2x4"),
        (["--topology=v5e:3x3"], "unknown topology"),
        (["--topology=v5e"], "--topology: v5e is a generation of chips; search it for a slice, or name one: v5e:2x2"),
        (["--topology=v5e:4x4", "--config.mesh.fsdp=3"], "does not fit 16 devices; choose sizes whose product is 16"),
        (["--topology=v5e:2x2", "--config.mesh.context=13"], "does not fit 4 devices; take a multiple of 13 devices"),
        (["--topology=v5e:4x4", "--config.mesh.context=8"], "52 columns of patches, which do not divide by 8; choose"),
        (["--topology=v5e:4x4", "--config.data.accumulate=64"], "it must divide over the 4 data and fsdp parts"),
        (["--topology=v5e:8x8"], "Here config.data.accumulate=4 gives every group of devices one video at a time"),
        (
            ["--topology=v5e:4x4", "--only=nothing"],
            "--only: no step of this job has 'nothing' in its name; choose",
        ),
        (
            ["--topology=v5e:4x4", "--config.mesh.context=1", "--config.mesh.tensor=8", "--config.data.accumulate=1"],
            "the mesh axis tensor is 8, which does not divide the 12 attention heads",
        ),
        # Four machines of four chips, all of which feed the same part.
        (
            ["--topology=v5e:4x4", "--config.mesh.tensor=4", "--config.data.accumulate=64"],
            "config.data.max_bad_records is 10, but with 1 data and fsdp parts over 4 processes several feed the same",
        ),
        (["--topology=v5e", "--search", "--only=nothing"], "--only: no step of this job has 'nothing' in its name"),
        (["--topology=v5e", "--search", "--config.optimizer.name=none"], "optimizer.name is 'none'; it must be one of"),
        (["--topology=v5e", "--search", "--config.model.num_heads=7"], "num_heads"),
        (
            ["--topology=v9", "--search"],
            "--topology: 'v9' is no generation of chips; a search takes one of v5e,",
        ),
        (["--topology=v5e:4x4", "--search"], "--topology: 'v5e:4x4' is no generation of chips"),
        (["--topology=v5e:4x4", "--size=1080p"], "--size: frames of '1080p' are not known; choose from 480p, 720p"),
        (["--topology=v5e:4x4", "--json=/not/there/x.json"], "--json: /not/there/x.json cannot be written"),
        (["--topology=v5e:4x4", "--host-days=0"], "--host-days: it is 0; it must be above 0"),
        ([], "--topology is missing"),
    ],
)
@needs_libtpu
def test_what_cannot_be_is_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        command.main(["train", f"--config={TEACHER}", *arguments])
    assert message in str(error.value) and "\n" not in str(error.value)


@needs_libtpu
@pytest.mark.parametrize("error", [KeyError("clean"), ValueError("of\nlines"), IndexError("9")])
def test_a_step_that_a_loss_of_somebody_else_breaks_shows_where(error):
    job = toy_job(error=error)
    with pytest.raises(type(error)):  # with its traceback: it is not a mistake in the configuration
        step_compiler.compile_step(job, job.steps[0], GIB)


@pytest.mark.parametrize("search", [[], ["--search"]])
def test_a_compiler_that_is_not_installed_is_said_once(monkeypatch, capsys, search):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install libtpu"):
        command.main(["train", f"--config={TEACHER}", f"--topology=v5e{'' if search else ':4x4'}", *search])
    assert "libtpu" not in capsys.readouterr().out


@needs_libtpu
@pytest.mark.subprocesses
def test_the_command_exits_with_2_for_bad_input():
    arguments = ["train", f"--config={TEACHER}", "--topology=v5e:9x9"]
    done = subprocess.run(
        [sys.executable, "-m", "greedy_distill_jax.compile", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "choose from" in done.stderr


# --- Memory ---------------------------------------------------------------------------------------------------------


# libtpu ends a process that has the XLA_FLAGS of this one: what really compiles does so in a process of its own.
class ToyProgram:
    """A jitted step and its compiled form: 4 MiB of arguments, donated, and 1 MiB of temporaries."""

    def __init__(self, error=None):
        self.error = error

    def lower(self, *arguments):
        if self.error:
            raise self.error
        return self

    def compile(self, compiler_options):
        return self

    def memory_analysis(self):
        sizes = dict(argument=4, output=5, alias=4, temp=1, generated_code=0)
        return SimpleNamespace(**{f"{name}_size_in_bytes": size * MIB for name, size in sizes.items()})

    def as_text(self):
        return "HloModule toy\n\nENTRY %main (x: f32[]) -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}\n"


def settings_of(path, **changes):
    """The settings of a configuration file, ``changes`` with "__" for "."."""
    config = read_config(path)
    with config.unlocked():
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return read_settings(config, imagine_runs=True)


def toy_job(unused=0, config="configs/quickstart.py:teacher", error=None):
    """A job of one step that uses one tree of 4 MiB, and keeps another of ``unused`` MiB beside it, on 4 chips."""
    mesh = make_mesh({"fsdp": 4}, topologies.devices("v5e:2x2"))
    whole = NamedSharding(mesh, PartitionSpec())
    trees = {
        name: (jax.ShapeDtypeStruct((size, 2**18), jnp.float32), whole)
        for name, size in (("used", 4), ("unused", unused))
    }
    cost, stage = Cost(Flops(1.0), Flops(1.0)), jobs.build_networks(settings_of("configs/quickstart.py:teacher")).stage
    step = jobs.Step("toy", ToyProgram(error), (), cost, ("used", "unused"))
    return jobs.Job(settings_of(config), mesh, stage, (21, 60, 104, 16), trees, (step,))


@needs_libtpu
def test_what_a_step_does_not_use_is_still_in_memory():
    lean, full = toy_job(), toy_job(unused=100)
    without, with_ = (step_compiler.compile_step(job, job.steps[0], GIB) for job in (lean, full))
    assert without.memory["peak"] == (4 + 5 - 4 + 1) * MIB and without.memory["held"] == 4 * MIB
    assert with_.memory["peak"] == 106 * MIB and with_.memory["held"] == 104 * MIB
    assert without.fits and with_.fits
    tight = step_compiler.compile_step(full, full.steps[0], 105 * MIB)
    assert not tight.fits and tight.shortfall == MIB
    refused = step_compiler.compile_step(full, full.steps[0], MIB)
    assert not refused.fits and refused.seconds is None and refused.memory == {"held": 104 * MIB, "peak": 104 * MIB}


@needs_libtpu
def test_the_critic_keeps_the_teacher_in_memory():
    job = jobs.build_job(settings_of(DMD), topologies.devices("v5e:4x4"), only="critic")
    (step,) = job.steps
    assert step.holds == ("state", "frozen", "batch")
    assert jobs.device_bytes(*job.trees["frozen"]) > 0.1 * GIB


@needs_libtpu
def test_attention_that_is_no_kernel_is_not_called_one():
    job = toy_job(config=TEACHER)
    with pytest.raises(RuntimeError, match="said to be mosaic_tpu, but no kernel"):
        step_compiler.compile_step(job, job.steps[0], GIB)


@pytest.mark.parametrize(
    "message, memory",
    [
        ("CompileTimeHbmOom: Ran out: Used 23.50G of 15.75G hbm. More.", {"held": 5, "peak": int(23.5 * GIB)}),
        (
            "the total memory required for HLO temporaries (4.25T) exceeds available HBM (15.75G).",
            {"held": 5, "temporaries": int(4.25 * 1024 * GIB), "peak": 5 + int(4.25 * 1024 * GIB)},
        ),
    ],
)
def test_refusals_of_libtpu(message, memory):
    assert step_compiler._asked(RuntimeError(message), 5) == memory


def test_a_signal_ends_the_wait_for_the_compiler():
    running, release, ended = (threading.Event() for _ in range(3))

    def compiler():
        running.set()
        release.wait()
        ended.set()

    def interrupt():
        running.wait()
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as cli.run does
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(SystemExit):
            aot.interruptible(compiler)
        assert running.is_set() and not ended.is_set(), "it waited for the compiler"
    finally:
        release.set()
        signal.signal(signal.SIGTERM, before)


def test_other_errors_of_libtpu_stay_errors():
    with pytest.raises(RuntimeError, match="Mosaic"):
        step_compiler._asked(RuntimeError("Mosaic failed"), 5)


# --- Search, output -------------------------------------------------------------------------------------------------


def fake_compiler(monkeypatch, fits):
    """``compile_step`` without a compiler: a job fits where ``fits(job)``; returns the jobs it was asked for."""
    asked = []

    def compile_step(job, step, hbm):
        asked.append(job)
        good = fits(job)
        memory = {"held": GIB, "peak": GIB if good else 100 * GIB}
        kinds = {kind: hlo.Count() for kind in (*hlo.KINDS, "kernels")}
        flops = Flops(1.0)
        return step_compiler.Compiled(step.name, good, 1.0, 1.0, memory, int(hbm), kinds, flops, flops, "reference")

    monkeypatch.setattr(report, "compile_step", compile_step)
    return asked


@needs_libtpu
def test_search_keeps_the_global_batch(monkeypatch, capsys, tmp_path):
    asked = fake_compiler(monkeypatch, lambda job: job.mesh.size >= 64)
    arguments = ["--topology=v5e", "--search", f"--json={tmp_path / 'out.json'}"]
    arguments += ["--host-days=100", "--write-rate=2"]
    assert command.main(["train", f"--config={TEACHER}", *arguments]) == 0
    out = capsys.readouterr().out
    assert "smallest slice of v5e that fits: v5e:8x8, with --config.data.accumulate=4" in out
    assert "by each of 16 hosts; save every " in out and "(a fault per host and 100 days, 2 GB/s per host" in out
    records = json.loads((tmp_path / "out.json").read_text())
    assert [record["topology"] for record in records] == ["v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8"]
    assert [record["facts"]["accumulate"] for record in records] == [64, 32, 16, 8, 4]
    assert {record["facts"]["batch"] for record in records} == {64} and len(asked) == 5
    assert {record["facts"]["microbatch_per_group"] for record in records} == {1}
    known, saved = records[-1]["facts"], records[-1]["checkpoint"]
    kept = sum(known[name] for name in ("parameters", "ema_parameters", "optimizer_parameters"))
    assert 0 <= saved["bytes"] - 4 * kept < 100 and saved["bytes_per_host"] == saved["bytes"] / 16


@needs_libtpu
def test_a_search_without_success_says_so(monkeypatch, capsys, tmp_path):
    fake_compiler(monkeypatch, lambda job: False)
    arguments = ["--topology=v5e", "--search", f"--json={tmp_path / 'out.json'}", "--config.mesh.fsdp=16"]
    assert command.main(["train", f"--config={TEACHER}", *arguments]) == command.DOES_NOT_FIT == 3
    out = capsys.readouterr().out
    assert "v5e:2x2: mesh (data=1, fsdp=16, context=4, tensor=1) does not fit 4 devices" in out
    assert "none of these slices of v5e fits" in out
    assert [record["topology"] for record in json.loads((tmp_path / "out.json").read_text())] == ["v5e:8x8"]


@needs_libtpu
def test_a_stream_that_does_not_fit_is_not_told_to_accumulate(monkeypatch, capsys):
    fake_compiler(monkeypatch, lambda job: False)
    arguments = ["--topology=v5e:4x4", "--config.data.accumulate=4", "--config.model.remat=none"]
    assert command.main(["train", f"--config={DMD}", *arguments]) == 3
    critic, stream = capsys.readouterr().out.split("  critic: ")[1].split("  stream: ")
    assert "accumulate=16 (microbatch of 1 instead of 4)" in critic and "config.model.remat=full" in critic
    assert "such as v5e:4x8" in stream
    assert not any(word in stream for word in ("accumulate", "remat", "context"))


@needs_libtpu
def test_14b_on_four_small_chips_is_refused(capsys):
    arguments = ["--config=configs/wan14b/dmd.py", "--config.data.accumulate=32", "--only=dmd"]
    code = command.main(["train", *arguments, "--topology=v5e:2x2"])
    out = capsys.readouterr().out
    assert code == command.DOES_NOT_FIT == 3
    assert "DOES NOT FIT" in out and "GiB too much per device" in out
    assert "a larger slice, such as v5e:4x8 (missing" in out  # 107.6 GiB each on four chips
    assert "held 1" in out and "not compiled" in out and "compiled in 0 s" not in out
    assert "config.mesh.context=" not in out  # what is kept does not shrink with the activations


@needs_libtpu
def test_every_leaf_has_a_layout(capsys):
    assert command.main(["sharding", f"--config={DMD}", "--topology=v5e:4x4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (kernel,) = [line for line in lines if line.startswith("state/nets/student/params/etm/blocks/ffn/up/kernel ")]
    assert "float32[15, 1536, 8960]" in kernel and "('fsdp', 'context'), 'tensor'" in kernel
    assert f"{15 * 1536 * 8960 * 4 // 16} bytes per device" in kernel
    assert lines[0] == "v5e:4x4: 16 chips, mesh {'data': 1, 'fsdp': 4, 'context': 4, 'tensor': 1}"
    assert [line.split(":")[0] for line in lines[-5:]] == [
        "state",
        "frozen",
        "batch",
        "stream",
        "params (of state, alone while streaming)",
    ]


# --- The published sizes --------------------------------------------------------------------------------------------


@pytest.fixture
def published_sizes(benchmarks):
    return benchmarks("published_sizes")


def record_of(settings, only=""):
    job = jobs.build_job(settings, topologies.devices("v5e:4x4"), only=only)
    steps = [{"step": step.name, "collectives": {}, "attention": ""} for step in job.steps]
    return {"facts": facts.facts(job), "steps": steps, "only": only}


@needs_libtpu
@pytest.mark.parametrize(
    "overrides, said",
    [
        ({}, []),
        ({"data.frames": 20}, ["frames is 20, not 21"]),
        ({"data.batch": 32, "data.accumulate": 8}, ["batch is 32, not 64"]),
        ({"model.num_layers": 28}, ["'etm': [14, 1536]", "parameters is"]),
        ({"model.ffn_dim": 1024}, ["parameters is"]),
        ({"model.text_len": 128}, ["text_rows is 128, not 512"]),
        ({"model.dtype": "float32"}, ["dtype is float32"]),
        ({"distill.guidance": 1.0}, ["cfg_branches is 1, not 2"]),
        ({"distill.fake": "self_sg", "distill.generator_every": 1}, ["critic_parameters is 0", "['dmd', 'stream']"]),
        ({"distill.teacher_size": "wan14b"}, ["'teacher': {'': [40, 5120]}", "teacher_parameters is 14288491584"]),
        ({"optimizer.name": "muon"}, ["the optimiser keeps"]),
    ],
)
def test_a_job_that_was_shrunk_is_found(published_sizes, overrides, said):
    settings = settings_of(DMD, **overrides)
    found = published_sizes.differences(record_of(settings), stage="dmd", size="wan1_3b", teacher="wan1_3b")
    assert bool(found) == bool(said)
    for part in said:
        assert any(part in line for line in found), found


@needs_libtpu
def test_part_of_a_job_is_not_the_job(published_sizes):
    record = record_of(settings_of(DMD), only="critic")
    wanted = dict(stage="dmd", size="wan1_3b", teacher="wan1_3b")
    assert any("--only='critic'" in line for line in published_sizes.differences(record, **wanted))
    assert not published_sizes.differences(record, **wanted, only="critic")


def test_cfg_branches_of_every_real_score():
    settings = settings_of(DMD, distill__real="autoregressive")
    assert settings.own["distill"].guidance != 1.0 and facts.cfg_branches(settings) == 2
    settings = settings_of(DMD, distill__guidance=1.0)
    assert facts.cfg_branches(settings) == 1 == facts.cfg_branches(settings_of(TEACHER))


def test_trips_of_a_rollout():
    assert jobs.rollout_trips(settings_of(DMD), 1, 21) == 2.5  # four steps, each exit as likely
    assert jobs.rollout_trips(settings_of(DMD, distill__exit="last"), 1, 21) == 4.0
    changes = dict(distill__exit="last", sample__steps=(8, 4), data__frames=2, distill__frames=4)
    assert jobs.rollout_trips(settings_of(DMD, **changes), 2, 21) == (8 + 4) / 2


@needs_libtpu
def test_stage_3_is_compiled_around_its_rewards(published_sizes, tmp_path):
    """A part on the host is none of the job's programs; what is behind it is one, with loops of mean length."""
    (tmp_path / "host.py").write_text(
        "from greedy_distill_jax.rewards import reward\n\n\n"
        "@reward(kind='host')\ndef dark(view):\n    return -view.video_BTHWC.mean((1, 2, 3, 4))\n"
    )
    config = read_config(RL)
    config.rl.rewards.host = dict(reward=f"{tmp_path}/host.py:dark", weight=1.0)
    settings = read_settings(config, imagine_runs=True)
    job = jobs.build_job(settings, topologies.devices("v5p:2x2x4"))
    assert [part.name for part in job.stage.parts] == ["rollout", "rewards", "rl"]
    assert {step.name: step.dynamic_trips for step in job.steps} == {"rollout": 31.5, "rl": 31.5, "stream": None}
    record = {"facts": facts.facts(job), "only": ""}
    record["steps"] = [{"step": step.name, "collectives": {}, "attention": ""} for step in job.steps]
    assert not published_sizes.differences(record, stage="rl", size="wan1_3b", batch=16)
    record["facts"]["episode"] |= {"group": 4}
    (said,) = published_sizes.differences(record, stage="rl", size="wan1_3b", batch=16)
    assert "'group': 4" in said


def test_loops_of_stage_3_that_cannot_be_told_apart():
    settings = settings_of(RL, sample__steps=(4, 2))
    with pytest.raises(UserError, match=r"sample.steps = \(4, 2\) has 2 lists"):
        jobs.loop_trips(settings, jobs.build_networks(settings).stage, (21, 60, 104, 16))


# --- The benchmark --------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(benchmarks):
    return benchmarks("pods")


def fake_command(benchmark, monkeypatch, code=0, overrides=None):
    """The benchmark with a command that compiles nothing; returns what it was asked for."""
    asked = []

    def run(command, **options):
        if command[0] == "git":
            return SimpleNamespace(stdout="0123abc\n")
        asked.append(command[3:])
        given = dict(argument.removeprefix("--").split("=", 1) for argument in command[4:])
        record = record_of(settings_of(given["config"], **(overrides or {})), given.get("only", ""))
        for step in record["steps"]:
            step |= dict(
                fits=not code,
                memory={"peak": GIB},
                hbm=16 * GIB,
                model_flops=1.0,
                model_flops_per_device=1.0,
                sent_bytes_per_device=None,
                flops_per_sent_byte=None,
                chip_flops_per_link_byte=985.0,
                seconds=None,
                cpu_seconds=None,
            )
        pathlib.Path(given["json"]).write_text(json.dumps([record | {"host_bytes": GIB}]))
        return SimpleNamespace(returncode=code, stdout="", stderr="why")

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    return asked


@needs_libtpu
def test_the_benchmark_goes_on_where_it_stopped(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "JOBS", {"one": benchmark.Row(DMD, "v5e:4x4", "dmd")})
    monkeypatch.setattr(benchmark, "SCALING", {})
    asked = fake_command(benchmark, monkeypatch)
    for step in ("critic", ""):
        monkeypatch.setattr(sys, "argv", ["pods.py", f"--output={tmp_path / 'out.json'}", f"--step={step}"])
        benchmark.main()
    only = [[a for a in command if "only" in a] for command in asked]
    assert only == [["--only=critic"], ["--only=dmd"], ["--only=stream"]]
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"].values()
    assert [step["step"] for step in row["steps"]] == row["facts"]["steps"] == ["dmd", "critic", "stream"]
    assert all(step["command"].startswith("python -m greedy_distill_jax.compile train") for step in row["steps"])
    table = (tmp_path / "out.md").read_text()
    assert "not run" in table and "| one | 16 | fsdp 4, context 4 | 64 = 16 x 1 x 4 | dmd | 1.00 / 16.00 |" in table


@needs_libtpu
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(code=3), "exit code 3, not 0"),
        (dict(overrides={"data.frames": 5}), "not the published job: frames is 5, not 21"),
    ],
)
def test_the_benchmark_takes_no_other_job(benchmark, monkeypatch, options, message):
    fake_command(benchmark, monkeypatch, **options)
    with pytest.raises(RuntimeError, match=message):
        benchmark.compiled(benchmark.JOBS["1.3B stage 2, v5e:4x4"], "dmd")


# --- Compiled at full size ------------------------------------------------------------------------------------------


# Training steps take minutes to compile: benchmarks/pods.py does them, and compares each with the published sizes.


@pytest.mark.slow
@pytest.mark.subprocesses
@needs_libtpu
def test_streaming_at_1_3b_compiles_for_one_chip_each(published_sizes, tmp_path):
    job = "--config=configs/wan1_3b/sample.py", "--topology=v5e:2x2", "--only=stream"
    record, _ = compile_train(tmp_path, *job)
    wanted = dict(stage="dmd", size="wan1_3b", teacher="wan1_3b", only="stream")
    assert not published_sizes.differences(record, **wanted)
    (step,) = record["steps"]
    # One chunk: ETM once, SDD four times to denoise and once for its keys; 15 blocks each, self-attention and text.
    assert record["fits"] and step["collectives"]["kernels"]["runs"] == (1 + 4 + 1) * 15 * 2
    assert step["sent_bytes_per_device"] == 0  # nothing is split
