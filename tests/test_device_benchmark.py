"""``benchmarks/device.py`` on a CPU at the tiny size, two items from end to end; what it refuses, keeps and counts."""

import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ops.attention import Pattern, backends, select, tuning
from tests.conftest import ROOT

ITEMS = ("ceilings", "correctness", "streaming", "torch_peer", "attention", "training", "trace")
ITEMS_RUN = ("ceilings", "streaming")


@pytest.fixture
def items(benchmarks):
    """Imports a module of ``benchmarks/device_items``."""
    return lambda name: benchmarks(f"device_items.{name}")


def run(output, env, *arguments):
    command = [sys.executable, f"{ROOT}/benchmarks/device.py", "--size=tiny", f"--output={output}", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.subprocesses
def test_items_from_end_to_end(tmp_path, subprocess_env):
    """Ceilings, and streams; all items take minutes."""
    only = ("--only", *ITEMS_RUN, "--commit=abc")
    done = run(tmp_path, subprocess_env, "--minutes=60", *only)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [f"{ITEMS.index(item) + 1}-{item}.json" for item in ITEMS_RUN]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "table.md"]
    rows = {}
    for item, name in zip(ITEMS_RUN, names):
        data = json.loads((tmp_path / name).read_text())
        assert (data["item"], data["size"], data["commit"], data["state"]) == (item, "tiny", "abc", "done")
        assert data.keys() >= {"device", "clock", "versions", "card", "host", "limit_s", "wall_s"}
        rows |= {(item, label): row for label, row in data["rows"].items()}
    for label, row in rows.items():
        assert row["status"] in ("ok", "not here"), label
        if row["status"] == "not here":
            assert row["why"], label
        else:
            assert row["figures"] and all(math.isfinite(x) for x in row["figures"].values()), label
            assert all(value < limit for value, limit in row.get("checks", {}).values()), label
    assert not [label for (_, label), row in rows.items() if "not built yet" in row.get("why", "")]
    assert rows["streaming", "4 steps, XLA scan"]["status"] == "ok"
    again = rows["streaming", "saved executable"]
    assert again["checks"].keys() == {"frames, cache", "frames, serialised"} and not again["not measured"]
    assert again["starts"]["first"]["bytes"].keys() == {"cache", "serialised"}
    checked = rows["streaming", "4 steps"]["checks"].keys()
    assert checked > {"frame 0 against XLA scan", "frame 2 against XLA scan"}
    table = (tmp_path / "table.md").read_text()
    assert done.stdout.endswith(table) and all(f"| {item} | {label} |" in table for item, label in rows)
    # Again: nothing is left to do, and figures of another commit are not mixed with these.
    assert run(tmp_path, subprocess_env, *only).stdout == table
    other = run(tmp_path, subprocess_env, "--commit=def")
    assert other.returncode == 2 and "holds figures of commit abc" in other.stderr


@pytest.fixture
def chosen(items, tmp_path, monkeypatch):
    """``chosen(item, rows)``: every row of an item by name, of which those in ``rows`` are measured."""
    records = items("record")

    def rows_of(item, measured=()):
        record = records.Record(tmp_path / "rows.json", 600.0, {"item": item, "size": "tiny"})
        whole, found = record.row, {}
        monkeypatch.setattr(
            record,
            "row",
            lambda name, work, needs=0.0: found.update({name: whole(name, work) if name in measured else {}}),
        )
        items(item).run(record)
        return found

    return rows_of


def test_rows_of_the_attention_item(chosen):
    measured = (
        "stream SDD tiny: ours, key lengths",
        "stream ETM tiny: cuDNN, no mask",
        "train ETM tiny: ours, XLA scan",
    )
    kernels = "train SDD tiny: kernels 128 x 128, 128 x 64, 64 x 128"
    rows = chosen("attention", (*measured, kernels))
    kinds = {name.partition(":")[0] for name in rows}
    assert kinds == {f"{kind} {part} tiny" for kind in ("stream", "train") for part in ("SDD", "ETM", "causal")}
    assert [rows[name]["status"] for name in measured] == ["ok", "not here", "ok"], rows
    assert rows[measured[2]]["checks"].keys() >= {"output", "dq"} and "NVIDIA GPU" in rows[measured[1]]["why"]
    assert rows[kernels]["status"] == "not here" and "H100 or H200" in rows[kernels]["why"]


def test_a_tuned_table_from_rows(items, tmp_path):
    """Each kernel's best sizes, and whether ours with them take less time than cuDNN; nothing from half of the rows."""
    tune, attention = items("tune"), items("attention")
    table = Pattern.sliding_window(4, 1560, 2)
    works = [attention.Work(f"{kind} it", table, 12, 128, "bfloat16", kind == "stream") for kind in ("stream", "train")]
    peers = {"stream": "cuDNN", "train": "slices"}

    def row(forward, both=None):
        return {"status": "ok", "figures": {"forward ms": forward} | ({"forward + backward ms": both} if both else {})}

    times = {tune.TRIED[0]: (3.0, 2.0, 9.0), tune.TRIED[1]: (1.0, 2.0, 8.0), tune.TRIED[2]: (2.0, 2.0, 9.5)}
    rows = {"stream it: cuDNN": row(2.0), "train it: slices": row(3.0, 7.5)}
    for blocks, (stream, forward, both) in times.items():
        rows[f"stream it: {tune.label(blocks)}"] = row(stream)
        rows[f"train it: {tune.label(blocks)}"] = row(forward, both)
    key, about = tuning.key(1560, 1560, 128, "bfloat16"), {"device": "NVIDIA H200", "commit": "abc"}
    written = json.loads(tune.write(tmp_path, "h200", about, rows, works, peers).read_text())
    assert written["blocks"][key] == {"forward": [128, 96], "dq": [128, 128], "dkv": [64, 128]}
    assert written["measured"][key] == {
        "ms": {"stream it": 1.0, "train it": 8.0},
        "cudnn_ms": {"stream it": 2.0, "train it": 7.5},
    }
    assert written["fastest"] == [] and written["device"] == "NVIDIA H200", "not for what is slower"
    rows["train it: slices"] = row(3.0, 8.5)
    assert json.loads(tune.write(tmp_path, "h200", about, rows, works, peers).read_text())["fastest"] == [key]
    rows["stream it: cuDNN"] = {"status": "wrong", "why": "x"}
    assert tune.write(tmp_path, "h200", about, rows, works, peers) is None


@pytest.mark.subprocesses  # the item starts one for the clips, which ends with it
def test_rows_of_the_correctness_item(chosen):
    measured = {f"{name}, float32" for name in ("xla", "lengths at run time, xla")}
    rows = chosen("correctness", measured)
    assert {rows[name]["status"] for name in measured} == {"ok"}, rows
    assert rows.keys() >= {"cudnn, bfloat16", "clip, etm_sdd, tiny", "pixels, Wan VAE, tiny"}


@pytest.mark.parametrize(
    "item, rows",
    [
        ("torch_peer", {"float32, tiny", "eager", "compiled, reduce-overhead"}),
        ("training", {"stage 1", "stage 1, Hopper kernels", "critic", "generator", "rollout gradient"}),
        ("trace", {"stage 1", "frame, 4 steps"}),
    ],
)
def test_rows_of_an_item(chosen, item, rows):
    """What they measure is tested with the benchmarks it is from (``test_benchmarks.py``)."""
    assert chosen(item).keys() >= rows


@pytest.mark.subprocesses
def test_a_limit_is_kept_and_said(tmp_path, subprocess_env):
    done = run(tmp_path, subprocess_env, "--minutes=0.02", "--only", "ceilings", "--commit=abc")
    assert done.returncode == 1 and "| ceilings | | stopped: stopped after 1 s, its limit |" in done.stdout
    assert json.loads((tmp_path / "1-ceilings.json").read_text())["state"] == "stopped"


def test_no_time_at_all(tmp_path, subprocess_env):
    done = run(tmp_path, subprocess_env, "--minutes=0")
    assert done.returncode == 2 and "must be positive" in done.stderr


CARD = {"name": "NVIDIA H100", "driver_version": "580.1", "memory.free": "80000 MiB"}
SEEN = {"platform": "gpu", "kind": "NVIDIA H100", "free": 74 * 2**30}
CPU = {"platform": "cpu", "kind": "cpu", "free": 0}
SOME = ["ceilings", "streaming", "training"]


@pytest.mark.parametrize(
    "seen, card, items_, line",
    [
        (SEEN, CARD, SOME, ""),
        (SEEN | {"free": 0}, {}, SOME, ""),
        (SEEN, CARD | {"memory.free": "[N/A]"}, SOME, ""),
        ({"error": "the package grain is not installed."}, CARD, SOME, "the package grain is not installed."),
        (CPU, CARD, SOME, "jax does not use the NVIDIA H100; install its build for CUDA"),
        (CPU, {}, SOME, "there is no accelerator; --size tiny tries"),
        (
            SEEN,
            CARD | {"memory.free": "40960 MiB"},
            SOME,
            "40.0 GiB of the device are free and training needs 72; end what else uses it, or measure the others "
            "(--only ceilings streaming).",
        ),
        (
            SEEN | {"platform": "tpu", "free": 2**30},
            {},
            ["trace"],
            "1.0 GiB of the device are free and trace needs 51; end",
        ),
    ],
)
def test_what_is_missing_is_said_first(items, monkeypatch, capsys, seen, card, items_, line):
    needs = items("needs")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(needs, "_look", lambda of: seen)
    monkeypatch.setattr(needs, "driver", lambda: card)
    told = needs.missing("1_3b", items_)
    assert told.startswith(line) and bool(told) == bool(line)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("needs: a device with ") and f"jax {jax.__version__}" in second
    assert second.startswith(f"here: {seen.get('kind', 'no device')}, ")
    assert needs.missing("tiny", items_) == seen.get("error", "")


def test_an_old_jax_is_said_before_it_is_imported(items, monkeypatch):
    needs = items("needs")
    monkeypatch.setattr(needs, "versions", lambda: {"jax": "0.9.2"})
    monkeypatch.setattr(needs, "_look", None)
    assert needs.missing("tiny", SOME) == "jax 0.9.2 is too old; 0.10.2 or newer is needed."


def test_the_bound_is_that_of_the_package(items):
    assert f'"jax>={items("needs").JAX}"' in pathlib.Path(ROOT, "setup.py").read_text()
    assert set(items("needs").MEMORY) == set(ITEMS)


@pytest.mark.parametrize(
    "name, line",
    [
        ("surely_not_there.part", "the package surely_not_there is not installed"),
        ("jax.gone", "the package jax that is installed has no jax.gone"),
    ],
)
def test_a_package_that_is_missing_is_named(items, monkeypatch, name, line):
    needs = items("needs")

    def absent(module):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(needs.importlib, "import_module", absent)
    with pytest.raises(UserError, match=line):
        needs.load(SOME)


def test_a_process_that_looks_in_vain_is_quoted(items, monkeypatch):
    needs, run_ = items("needs"), subprocess.run
    for script, line in (
        ("import sys; sys.exit('error: one line.')", "one line."),
        ("raise RuntimeError('no')", "looking for a device: RuntimeError: no"),
        ("import os; os._exit(7)", "looking for a device: it ended with 7"),
        (
            "import time; time.sleep(60)",
            "the device has not answered for 1 s; end what holds it, or start the machine again.",
        ),
    ):
        monkeypatch.setattr(needs, "SECONDS", 1 if "sleep" in script else 60)
        monkeypatch.setattr(subprocess, "run", lambda _, s=script, **o: run_([sys.executable, "-c", s], **o))
        assert needs._look(SOME) == {"error": line}


def test_the_driver_is_asked_for_the_card_in_use_and_may_hang(items, monkeypatch, tmp_path):
    record, script = items("record"), tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\nfor last; do :; done\necho "$last, 580.1, 81559 MiB, 80000 MiB, 1, 2, 3, 4"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    found = record.driver()
    assert (found["name"], found["memory.free"]) == ("--id=3", "80000 MiB")

    def hangs(*args, timeout, **kwargs):
        raise subprocess.TimeoutExpired(args, timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert record.driver() == {}


@pytest.mark.subprocesses
def test_a_cpu_is_refused_at_once(tmp_path, subprocess_env):
    done = run(tmp_path / "out", subprocess_env, "--size=1_3b")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "error: JAX_PLATFORMS is 'cpu', so that jax uses no accelerator" in done.stderr
    assert not (tmp_path / "out").exists()


def test_rows_are_written_judged_and_kept(items, tmp_path, capsys):
    record, path = items("record"), tmp_path / "item.json"

    def fail():
        raise RuntimeError("no such kernel")

    def begin(seconds=100.0):
        return record.Record(path, seconds, {"item": "some", "size": "wan1_3b"})

    first = begin()
    first.row("right", lambda: {"figures": {"ms": 2.0}, "checks": {"error": (0.1, 0.2)}})
    first.row("wrong", lambda: {"figures": {"ms": 1.0}, "checks": {"error": (0.3, 0.2)}})
    first.row("not a number", lambda: {"figures": {"ms": 1.0}, "checks": {"error": (math.nan, 0.2)}})
    first.row("infinite", lambda: {"figures": {"ms": math.inf}})
    first.row("failed", fail)
    first.row("late", fail, needs=1e3)
    first.leave_out("later", "not built yet: nobody wrote it")
    rows = json.loads(path.read_text())["rows"]  # before the item has finished
    assert {name: row["status"] for name, row in rows.items()} == {
        "right": "ok",
        "wrong": "wrong",
        "not a number": "wrong",
        "infinite": "wrong",
        "failed": "failed",
        "late": "no time",
        "later": "not here",
    }
    assert "figures" not in rows["wrong"] and rows["wrong"]["does not count"] == {"ms": 1.0}
    assert rows["failed"]["why"] == "RuntimeError: no such kernel" and ROOT not in str(rows["failed"]["traceback"])
    first.finish()
    assert json.loads(path.read_text())["state"] == "incomplete"

    again = begin()
    assert again.data["rows"].keys() == {"right", "later"}  # the rest is tried again
    assert again.row("right", fail)["figures"] == {"ms": 2.0}
    for name in ("wrong", "not a number", "infinite", "failed", "late"):
        again.row(name, lambda: {"figures": {"ms": 3.0}})
    again.finish()
    assert json.loads(path.read_text())["state"] == "done"
    assert "some: failed: failed: RuntimeError: no such kernel" in capsys.readouterr().out


def test_other_ways_to_attend_are_for_what_is_traced_meanwhile(items, monkeypatch):
    ways, before = items("ways"), backends.BACKENDS
    with ways.by_scan():
        assert backends.names() == ("xla", "reference")
    assert backends.BACKENDS is before
    with pytest.raises(items("record").NotHere, match="needs an NVIDIA H100 or H200"):
        ways.by_kernels()
    monkeypatch.setattr(select, "device", lambda: ("gpu", "NVIDIA H200"))
    monkeypatch.setattr(plgpu, "InterpretGPUParams", None, raising=False)  # whatever jax this is, it has the kernels
    q, frame = jnp.zeros((1, 1560, 1, 128), jnp.bfloat16), Pattern.full(1, 1560)
    with ways.by_kernels():
        assert select.choose(None, q, frame, function="f").name == "mosaic_gpu"
        assert select.choose(None, q.astype(jnp.float32), frame, function="f").name == "xla"
    assert backends.BACKENDS is before


def test_medians_are_of_finished_work(items):
    timing, calls = items("timing"), []
    ms, runs = timing.median_ms(lambda: calls.append(1) or jnp.zeros(1), seconds=60.0)
    assert ms > 0 and runs >= 3 and len(calls) == runs + 2  # two count for nothing
    assert timing.error(jnp.asarray([3.0, 4.5]), jnp.asarray([3.0, 4.0])) == pytest.approx(0.1)
