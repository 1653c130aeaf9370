"""The benchmarks of streams and training steps, from end to end at the tiny size; what they refuse."""

import dataclasses
import importlib
import importlib.util
import itertools
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.config import read_settings
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.measure import clock, environment
from greedy_distill_jax.ops.attention.arg_specs import Spec
from greedy_distill_jax.ops.attention.pattern import Pattern
from greedy_distill_jax.pods import kernels
from greedy_distill_jax.storage.checkpoint import Checkpointer
from tests.conftest import ROOT, exit_code


@pytest.fixture
def benchmark(monkeypatch):
    """Imports ``benchmarks/NAME.py``; the test's process keeps its threads and cores."""
    monkeypatch.syspath_prepend(f"{ROOT}/benchmarks")
    monkeypatch.setattr(clock, "one_thread", lambda: None)

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", f"{ROOT}/benchmarks/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


ENVIRONMENT = {"device", "cpu", "clock", "versions", "commit"}


def test_attention(benchmark, tmp_path, capsys, monkeypatch):
    attention, output = benchmark("attention"), tmp_path / "attention.json"
    base, *growth = (
        Spec(f"{chunks} chunks", Pattern.sliding_window(chunks, 4, 2), heads=1, dim=8, dtype="float32")
        for chunks in (3, 4, 8)
    )
    monkeypatch.setattr(kernels, "CPU_PEERS", base)
    monkeypatch.setattr(kernels, "CPU_GROWTH", growth)
    monkeypatch.setattr(attention, "RECORDS", tmp_path)
    monkeypatch.setitem(environment.MATMUL, "cpu", 64)
    monkeypatch.setitem(environment.COPY, "cpu", 2**12)
    attention.main([f"--output={output}"])
    result = json.loads(output.read_text())
    assert result.keys() >= {"device", "versions", "commit"} and result["cpu"]
    row = result["milliseconds"]["3 chunks"]
    assert row.keys() == {"ours", "torch SDPA on slices", "masked dense"} and row["ours"]["forward_backward"] > 0
    peers, libraries = {"torch SDPA on slices", "masked dense"}, {"jax", "torch"}
    if importlib.util.find_spec("torch") is None:
        assert "ModuleNotFoundError" in row["torch SDPA on slices"]["error"]
        peers, libraries = {"masked dense"}, {"jax"}
    assert result["matmul_flops_per_s"].keys() == libraries and min(result["matmul_flops_per_s"].values()) > 0
    expected = {f"{peer} / ours, {label}" for peer in peers for label in ("forward", "forward_backward")}
    assert result["ratios"].keys() == expected | {"time per chunk, longest / shortest"}
    assert capsys.readouterr().out.splitlines()[-1].endswith("in 1 records")


def test_attention_over_machines(benchmark, capsys):
    """The range in the documents is that of the committed records."""
    attention = benchmark("attention")
    attention.main(["--ranges"])
    said = dict(re.findall(r"^(.*): (\S+ to \S+) in \d+ records$", capsys.readouterr().out, re.M))
    page = pathlib.Path(ROOT, "docs", "attention.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith("| CPU, one thread, float32, 32 chunks"))
    for name in ("torch SDPA on slices / ours, forward", "torch SDPA on slices / ours, forward_backward"):
        assert said[name] in row.replace("x", ""), name


def test_stream(benchmark, tmp_path, capsys):
    stream, output = benchmark("stream"), tmp_path / "stream.json"
    stream.main(
        ["--size=tiny", "--student=etm_sdd", "--steps", "diagonal", "--frames=36", "--repeats=1", f"--output={output}"]
    )
    result = json.loads(output.read_text())
    expected = {"size", "video", "latents", "dtype", "weights", "schedules", "models", "checks", "ceilings"}
    assert result.keys() >= ENVIRONMENT | expected
    assert all(difference < stream.TOLERANCE for difference in result["checks"].values())
    (row,) = result["rows"]
    assert (row["student"], row["schedule"], row["steps"]) == ("etm_sdd", "diagonal", [4, 3, 2])
    assert row["ms_per_latent_frame"].keys() == {"model", "clean", "fused", "tiny VAE", "Wan VAE"}
    assert row["first_chunk_ms"].keys() == {"latents", "tiny VAE", "Wan VAE"}
    assert row["pixel_fps"]["clean"] == pytest.approx(4e3 / row["ms_per_latent_frame"]["clean"])
    assert row["mfu"] > 0 and row["model_flops_per_latent_frame"] > 0
    assert row["late"]["frame"] == 36 and row["late"]["over_early"] > 0
    assert row["program_bytes"]["clean"]["total"] > row["cache_bytes"] > 0
    assert row["peak"]["bytes"] > 0 and row["peak"]["source"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("| etm_sdd | diagonal | ")


def test_second_start(benchmark, tmp_path, capsys, monkeypatch):
    """The table and its medians; the starts themselves are a row of ``test_device_benchmark.py``."""
    second_start, output, seconds = benchmark("second_start"), tmp_path / "start.json", iter(range(1, 100))
    found = dict(trace_and_lower_s=0.5, compile_or_read_s=0.25, run_s=0.125, process_s=9.0)
    differences = {"cache": 0.0, "serialised": 0.0}

    def measure(size, student, way, folder):
        assert (size, student) == ("tiny", "etm_sdd") and folder.is_dir()
        return {"seconds": float(next(seconds)), **found} | ({} if way == "first" else {"difference": differences[way]})

    monkeypatch.setattr(second_start, "measure", measure)
    second_start.main(["--size=tiny", "--repeats=3", f"--output={output}"])
    result = json.loads(output.read_text())
    assert result.keys() >= ENVIRONMENT and [len(result["repeats"][way]) for way in second_start.WAYS] == [3, 3, 3]
    assert [result["starts"][way]["seconds"] for way in second_start.WAYS] == [4, 5, 6]
    assert capsys.readouterr().out.splitlines()[-1] == "| serialised | 6.00 | 0.500 | 0.250 | 0.125 | 9.00 |"
    differences["cache"] = 0.5
    with pytest.raises(RuntimeError, match="frames of the start 'cache' differ by 5.0e-01 from the first one's"):
        second_start.main(["--size=tiny", "--repeats=1"])


def test_stream_next_to_torch(benchmark, tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
    stream_torch, output = benchmark("stream_torch"), tmp_path / "torch.json"
    tiny = stream_torch.SIZES["tiny"]
    half = dataclasses.replace(tiny, model={**tiny.model, "dtype": "bfloat16"})
    monkeypatch.setitem(stream_torch.SIZES, "half", half)
    stream_torch.main(["--size", "half", "--steps=2", "--repeats=1", f"--output={output}"])
    result = json.loads(output.read_text())
    assert result.keys() >= ENVIRONMENT
    row = result["sizes"]["half"]
    assert len(row["ms_per_latent_frame"]) == 4 and all(ratio > 0 for ratio in row["ratios"].values())
    # The same in float32 first: bfloat16 frames are only near.
    assert result["float32_check"] < 1e-3 < row["largest_difference"] < 0.2
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| half | 4x4 | ")]
    assert [row.split(" | ")[3] for row in rows] == list(row["ms_per_latent_frame"])
    with pytest.raises(UserError, match="--compile fastest: choose from default, reduce-overhead"):
        stream_torch.main(["--size", "half", "--compile", "fastest"])


def test_gradient_precision(benchmarks):
    """On one device the float32 gradient is its own reference, and rounded ones are further from everything."""
    found = benchmarks("gradient_precision").measure(1, 32, 1, 2)
    assert found["float32, to the same forward pass"] == 0.0 < found["velocity"] < 0.02
    for kind in ("to float32", "to the same forward pass"):
        assert 0 < found[f"compute, {kind}"] == found[f"compute, bfloat16 sums, {kind}"] < 0.02
    assert found["float32, to float32"] < found["compute, to float32"]


def test_diagonal(benchmarks, tmp_path, monkeypatch):
    """Every row is a configuration that can be trained; the gate asks for the right figures."""
    diagonal = benchmarks("diagonal")
    bench = diagonal.Rows(tmp_path, 4, "smoke")
    monkeypatch.setattr(diagonal.Rows, "start", lambda self, cell: (tmp_path / "teacher", tmp_path / "student"))
    for task, student in itertools.product(diagonal.ROLLOUT, diagonal.STUDENTS):
        for row in diagonal.ROWS:
            settings = read_settings(bench.stage2_config(diagonal.Cell(task, student, 0), row))
            chosen = [1, 2] if row.startswith("uniform") else [4, 3, 2]
            assert settings.plan.lengths.tolist() == ([int(row[-1])] if len(chosen) == 2 else chosen), row
    times = {"uniform 4": {"short": 1.0}, "diagonal": {"short": 0.6}, "diagonal, motion": {"short": 0.7}}
    cells = {
        "uniform 4": [dict(fd_first=0.10, valid=0.80), dict(fd_first=0.12, valid=0.82)],
        "uniform 2": [dict(fd_first=0.20, valid=0.50), dict(fd_first=0.24, valid=0.50)],
        "diagonal": [dict(fd_first=0.104, valid=0.80), dict(fd_first=0.1248, valid=0.82)],
        "diagonal, motion": [dict(fd_first=0.10, valid=0.80), dict(fd_first=0.12, valid=0.82)],
    }
    cells = {row: [cell | {"fd": 2 * cell["fd_first"]} for cell in of_row] for row, of_row in cells.items()}
    fast, slow = diagonal.gates_of(cells, times)
    assert fast["quality"] == fast["quality_of_stream"] == pytest.approx((0.98, 0.0))
    assert fast["validity"] == pytest.approx((1.0, 0.0))
    assert fast["passed"] and not slow["passed"]
    cells["diagonal"][1]["fd_first"] = 0.16  # one seed of two is far off: the lower bound is below the limit
    assert not diagonal.gates_of(cells, times)[0]["passed"]


def test_rl(benchmarks, tmp_path, monkeypatch):
    """Every row is a configuration that can be trained; a row passes by all four figures and by none alone."""
    rl = benchmarks("rl")
    bench = rl.Rows(tmp_path, 4, "smoke", 1.0)
    monkeypatch.setattr(rl.Rows, "start", lambda self, seed: (tmp_path / "teacher", tmp_path / "student"))
    for name, row in rl.ROWS.items():
        settings = read_settings(bench.row_config(name, 0, 3.0))
        assert settings.losses["rl"].loss == row.loss and settings.optimizer.learning_rate == pytest.approx(3e-4)
        assert ("dmd" in settings.losses) == row.regularised and bool(settings.teacher_from) == row.scored
    assert read_settings(bench.row_config(rl.CONTROL, 0, 1.0)).stage == "dmd"
    base = [dict(colour=4.0, fd=0.06, motion=0.8, drift=2.0), dict(colour=3.0, fd=0.05, motion=0.8, drift=2.1)]
    good = [dict(colour=1.6, fd=0.06, motion=0.8, drift=0.5), dict(colour=1.2, fd=0.05, motion=0.8, drift=0.4)]
    worse = {"colour": 2.1, "fd": 0.07, "motion": 0.7, "drift": 2.0}
    cells = {rl.BASE: base, rl.CONTROL: base, "good": good}
    cells |= {key: [row | {key: value} for row in good] for key, value in worse.items()}
    assert {v["row"]: v["passed"] for v in rl.verdicts(cells)} == {"good": True} | dict.fromkeys(worse, False)


def test_bad_inputs(benchmark, tmp_path, monkeypatch):
    """The judge tells what is refused well from what is not; cases are drawn again as they were."""
    benchmark("bad_inputs")
    from bad_items import case, judge

    kinds = {case.kind_of(number) for number in range(1000)}
    assert kinds == set(case.KINDS) and len(kinds) > 20
    made, scratch = tmp_path / "made", tmp_path / "scratch"
    made.mkdir()
    scratch.mkdir()
    argv = ("inspect", "{here}/none.safetensors")
    bad = case.Case("convert", argv, needs=(("SRC",), ("{here}/none.safetensors",)))
    expected = {
        "refused well": bad,
        "said badly": dataclasses.replace(bad, needs=(("nothing that it says",),)),
        "control refused": dataclasses.replace(bad, expect=case.ACCEPTED),
        "wrong exit 0": case.Case("sample", ("--help",)),
        "accepted": case.Case("sample", ("--help",), case.ACCEPTED),
        "other code": case.Case("convert", argv, case.DIVERGED),
    }
    assert {verdict: judge.judged(of, made, scratch)["verdict"] for verdict, of in expected.items()} == {
        verdict: verdict for verdict in expected
    }
    assert not list(scratch.iterdir())
    for text, verdict in (("1 / 0", "their traceback"), ("def get_config(:", "traceback")):
        files = {"own.py": text.encode()}
        own = case.Case("train", ("--config={here}/own.py", "--workdir={here}/run"), case.THEIRS, files=files)
        assert (judge.judged(own, made, scratch)["verdict"] == "their traceback") == (verdict == "their traceback")
    drawn = [number for number in range(400) if case.kind_of(number) in ("names of keys", "switches", "meshes")]
    keys = [case.draw(0, number, made).key() for number in drawn[:20] if case.kind_of(number) == "switches"]
    assert keys == [case.draw(0, number, made).key() for number in drawn[:20] if case.kind_of(number) == "switches"]


def test_bad_inputs_are_counted_and_gone_on_with(benchmark, tmp_path):
    bad_inputs = benchmark("bad_inputs")
    rows = [
        {"seed": 0, "case": n, "kind": "switches", "verdict": v, "s": 0.1} for n, v in enumerate(("accepted", "hang"))
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"cut off')
    found = bad_inputs.read(path, 0)
    text, counts = bad_inputs.table(found)
    assert counts["all"]["cases"] == 2 and counts["switches"]["hang"] == counts["all"]["accepted"] == 1
    assert text.splitlines()[-1].startswith("| all | 2 | 2 |")
    with pytest.raises(UserError, match="of seed 0, not 1"):
        bad_inputs.read(path, 1)


def test_stop(benchmark, tmp_path, capsys, monkeypatch):
    """What a run's record says becomes seconds from the first signal; a process that did not save is a failure."""
    stop = benchmark("stop")
    for step, process in ((12, 0), (12, 1), ("13.orbax-checkpoint-tmp", 1)):
        (file := tmp_path / f"{step}/state/array_metadatas/process_{process}").parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    steps = stop.steps_in(tmp_path)
    assert steps == {"0": [12], "1": [12]}
    with Checkpointer(tmp_path / "really") as checkpoints:
        checkpoints.save(3, {"x": jnp.ones(2)}, {})
        checkpoints.wait()
    assert stop.steps_in(tmp_path / "really") == {"0": [3]}
    said = [[(9.0, "loss"), (10.25, "stopping after step 12 ..."), (11.5, "teacher: stopped, saved")], [(12.0, "x")]]
    seen = dict(sent=[10.0, 10.5], begun=10.5, whole=11.0, said=said, ended=[12.0, 11.75], codes=[0, 0], steps=steps)
    good = stop.row(seen)
    assert good == {
        **dict(agreed=0.25, begun=0.5, whole=1.0, ended=[2.0, 1.75], codes=[0, 0]),
        **dict(saved={"0": [12], "1": [12]}, good=True),
    }
    assert not stop.row({**seen, "codes": [0, 143]})["good"] and not stop.row({**seen, "steps": {"0": [12]}})["good"]
    nothing = stop.row({**seen, "said": [[], []], "begun": None, "whole": None, "steps": {}})
    assert nothing["agreed"] is nothing["whole"] is None and not nothing["good"]
    alone = stop.row({**seen, "said": said[:1], "ended": [15.0], "codes": [0], "steps": {"0": [12]}})
    runs = iter([good, nothing, good, good, alone, alone])
    monkeypatch.setattr(stop, "stopped", lambda *_: None)
    monkeypatch.setattr(stop, "row", lambda _: next(runs))
    assert stop.main(["--repeats=2", f"--output={tmp_path / 'stop'}"]) == 1, "a run saved nothing"
    first, *_, last = (tmp_path / "stop.md").read_text().splitlines()[4:]
    assert first == "| process 1 of 2 | 2 | 0.250 | 0.500 | 1.00 | 2.00 | 1.75 | 0/0 | 12/12, none |"
    assert last == "| one alone | 2 | 0.250 | 0.500 | 1.00 | 5.00 |  | 0 | 12, 12 |"
    assert json.loads((tmp_path / "stop.json").read_text()).keys() >= ENVIRONMENT | {"cases"}
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_faults(benchmark, tmp_path, capsys, monkeypatch):
    """All that a killed run leaves is held against the undisturbed one; what is there is not run again."""
    faults = benchmark("faults")
    whole = {"setup": 9.0, "steps": {"3": ["a", "b"], "6": ["c", "d"], "24": ["e", "f"]}}
    kill = dict(victims=[0], codes=[-9], seconds=1.0, all_gone=True, inside_save=True, joined=True, anew=False)
    kill |= dict(steps_before=[3, 6], steps_kept={"6": ["c", "d"]})
    ended = dict(run=0, seed=0, processes=1, kills=[kill, kill], ended=[[0]], said=[], steps={"24": ["e", "f"]})

    def wrong(number=1, ended=ended, **changes):
        kills = [kill | changes if i == number else kill for i in (0, 1)]
        return faults.kills.verdict(ended | {"kills": kills}, whole, 15.0)

    assert wrong() == wrong(seconds=36.0, joined=False) == []
    assert wrong(seconds=36.0) == ["kill 1: late"]
    assert wrong(all_gone=False) == ["kill 1: a process stayed"]
    assert wrong(steps_kept={"3": ["a", "b"]}) == ["kill 1: a checkpoint was lost"]
    assert wrong(anew=True) == ["kill 1: the run had not gone on from its newest checkpoint"]
    assert wrong(steps_kept={"6": ["x", "d"]}) == ["kill 1: a checkpoint is another one"]
    assert wrong(ended=ended | {"steps": {"24": ["e", "x"]}}) == ["it ended otherwise"]
    assert wrong(ended=ended | {"steps": {"6": ["c", "d"]}}) == ["its last step is not there"]
    assert wrong(ended=ended | {"ended": [[75, -6], [75, 75], [0, 0]]}) == [], "they came to each other too late"
    for codes in ([1], [75, 1], [-6], [None]):
        assert wrong(ended=ended | {"ended": [codes, [0]]}) == [f"end 0, of no kill: {codes}"]
    assert wrong(ended=ended | {"ended": [[75]], "said": ["error: x"]}) == ["it did not end: ['error: x']"]

    ran = []

    def happened(root, name, *times):
        ran.append(name)
        said = [["error: process 1 has ended (a|b)"], []]
        return dict(fault=name, codes=[75, None], seconds=20.0, said=said, good=name != "SIGTERM at both")

    monkeypatch.setattr(faults.kills, "undisturbed", lambda *_: whole)
    monkeypatch.setattr(faults.kills, "killed", lambda root, seed, number, *_: {**ended, "run": number})
    monkeypatch.setattr(faults.others, "happened", happened)
    command = ["--kills=3", "--only", "kills", "faults", f"--output={tmp_path / 'faults'}"]
    assert faults.main(command) == 1, "one fault ended otherwise"
    assert capsys.readouterr().out.splitlines()[-1] == "SIGTERM at both: [75, None]"
    assert ran == list(faults.others.FAULTS)
    first, _, row, *rest = (tmp_path / "faults.md").read_text().splitlines()[2:]
    assert (
        first.startswith("| processes | kills | inside a save | runs | as undisturbed")
        and row == "| 1 | 4 | 4 | 2 | 2 |  | 1.00 |"
    )
    assert rest[-1].endswith("| 75 | error: process 1 has ended (a\\|b) | stays | nothing | 20.0 |")
    assert json.loads((tmp_path / "faults.json").read_text()).keys() >= ENVIRONMENT | {"results", "bad"}
    with open(tmp_path / "faults.lines.jsonl", "a") as lines:
        lines.write('{"cut off')
    assert faults.main(command) == 1 and len(ran) == len(faults.others.FAULTS)
    result = json.loads((tmp_path / "faults.json").read_text())
    assert result["silence"] == 15.0 and {x["commit"] for x in result["results"]} == {result["commit"]}
    old = dict(fault="NaN at process 1", codes=[4, 4], seconds=1.0, said=[[], []], good=True)  # of an older version
    faults.record.append_line(tmp_path / "faults.lines.jsonl", old)
    assert faults.main([*command, "--tables", "--silence=20"]) == 1
    told, older = (tmp_path / "faults.md").read_text().split("\n\n")[:2]
    assert re.match(rf"{len(ran) + 4} results: CPU, .*; SILENCE_TIMEOUT=15; commit {result['commit']}; python ", told)
    assert older == "1 result: commit, versions and SILENCE_TIMEOUT are not recorded."
    result = json.loads((tmp_path / "faults.json").read_text())
    assert result["commit"] == result["silence"] == "differs"
    with pytest.raises(UserError, match="holds kills of seed 0, not 1"):
        faults.main([*command, "--seed=1"])
    faults.record.append_line(tmp_path / "faults.lines.jsonl", {"kill": 0})
    with pytest.raises(UserError, match="holds results of another version"):
        faults.main(command)


def test_spans_are_compared_by_norm(benchmark, tmp_path, monkeypatch):
    faults, spans = benchmark("faults"), importlib.import_module("fault_items.spans")
    made = []

    def trained(root, way, cases, limit):
        made.append((way, *cases))
        moved = np.ones(9, np.float32) * (1 + (way == "2 x 2") * 1e-6) * (1 + ("rl:tensor" in cases) * 1e-3)
        for case in cases:
            stage, mesh = case.split(":") if ":" in case else ("teacher", "origin")
            name = f"{way.replace(' ', '')}-{stage}-{mesh}.npz"
            np.savez(root / name, **{"moved/student/x": moved, "scalar/1/rl/loss": 2.0, "scalar/1/rl/rate": len(way)})

    monkeypatch.setattr(spans, "trained", trained)
    monkeypatch.setattr(spans, "CASES", ["rl:fsdp", "rl:tensor"])
    assert faults.main(["--only=spans", f"--folder={tmp_path}", f"--output={tmp_path / 'faults'}"]) == 1
    assert made[:2] == [("1 x 1", "origin", "rl:one"), ("2 x 2", "rl:fsdp")] and len(made) == 5
    *_, first, second, third, fourth = (tmp_path / "faults.md").read_text().splitlines()
    assert first.startswith("| rl:fsdp | 2 x 2 | 9.5e-07 |") and second == "| rl:fsdp | 1 x 4 | 0.0e+00 | 0.0e+00 |"
    assert third.startswith("| rl:tensor | 2 x 2 | 1.0e-03 |")
    bad = json.loads((tmp_path / "faults.json").read_text())["bad"]
    assert len(bad) == 2 and bad[0].startswith("rl:tensor 2 x 2: apart by 0.001")

    here = environment.environment()
    for commit, compared in (("a", ["1 x 1"]), ("a", []), ("b", ["1 x 1"])):
        made.clear()
        monkeypatch.setattr(faults.environment, "environment", lambda commit=commit: here | {"commit": commit})
        faults.main(["--only=spans", f"--folder={tmp_path}"])
        assert {way for way, *_ in made} == {*compared, "2 x 2", "1 x 4"}, "what is compared with is of the same commit"
    np.savez(tmp_path / "spans" / "2x2-rl-fsdp.npz", **{"moved/student/x": np.full(9, np.nan), "scalar/1/rl/loss": 2.0})
    np.savez(tmp_path / "spans" / "1x1-rl-one.npz", **{"moved/student/x": np.ones(9), "scalar/1/rl/loss": 2.0})
    with pytest.raises(UserError, match="2 x 2, rl:fsdp: moved/student/x are not finite"):
        spans.apart(tmp_path / "spans", "2 x 2", "rl:fsdp")


def test_a_move_whose_steps_are_missing_is_no_number(benchmark, tmp_path):
    benchmark("faults")
    moves = importlib.import_module("fault_items.moves")
    for name, last in (("whole", moves.STEPS), ("moved", moves.STEPS - 2)):
        lines = [json.dumps({"step": step, "teacher/loss": 2.0}) for step in range(1, last + 1)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "scalars.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"moved: the scalars of steps \[7, 8\] are missing"):
        moves._losses_apart(tmp_path)


def test_train_step(benchmark, tmp_path, capsys):
    train_step, output = benchmark("train_step"), tmp_path / "train.json"
    train_step.main(["--size=tiny", "--only", "stage 1", "critic", "--repeats=1", f"--output={output}"])
    result = json.loads(output.read_text())
    assert result.keys() >= ENVIRONMENT | {"size", "latents", "dtype", "ceilings"}
    assert result["steps"].keys() == {"stage 1", "critic"}
    for row in result["steps"].values():
        assert row["executed_flops"] > row["model_flops"] > 0
        assert row["mfu"] == pytest.approx(row["model_flops"] / row["ms"] * 1e3 / _ceiling(result))
        assert row["program_bytes"]["total"] > 0 and row["peak"]["bytes"] > 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| critic | ")


def test_train_step_of_the_quickstart(benchmark, tmp_path, capsys, monkeypatch):
    """Its configurations are those of the repository, wherever it runs; it has no gradient to measure."""
    train_step = benchmark("train_step")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert train_step.training_settings(None, "dmd").stage == "dmd"
    assert exit_code(train_step.main, "--size=quickstart", "--only", "gradient") == 2
    assert "--only gradient: not measured with --size quickstart" in capsys.readouterr().err


def test_train_step_gradient(benchmark, tmp_path, capsys):
    output = tmp_path / "train.json"
    benchmark("train_step").main(["--size=tiny", "--only", "gradient", "--repeats=1", f"--output={output}"])
    forms = json.loads(output.read_text())["rollout_gradient"]
    assert forms.pop("relative_difference") < 1e-4
    assert forms.keys() == {"parallel", "sequential"}
    assert all(row.keys() == {"compile_s", "temporary_MiB", "ms"} for row in forms.values())
    assert "| parallel | " in capsys.readouterr().out


def _ceiling(result):
    return result["ceilings"]["matmul_flops_per_s"]


@pytest.mark.parametrize("name", ["stream", "stream_torch", "train_step"])
def test_an_unknown_size(benchmark, name, capsys):
    assert exit_code(benchmark(name).main, "--size", "huge") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "huge" in line and "small" in line


@pytest.mark.parametrize(
    "name, argument, words",
    [
        ("stream", "--frames=20", "use at least 68 frames"),
        ("stream_torch", "--steps=0", "at least 1"),
        ("train_step", "--repeats=0", "at least 1"),
    ],
)
def test_refused_numbers(benchmark, name, argument, words, capsys):
    assert exit_code(benchmark(name).main, "--size", "tiny", argument) == 2
    assert words in capsys.readouterr().err
