"""``benchmarks/device.py`` from end to end on a CPU at the tiny size; what it refuses, keeps and counts."""

import importlib
import json
import math
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from greedy_distill_jax.ops.sliding_window import Schedule, chunk_attention
from greedy_distill_jax.testing.attention import dense_attention, relative_error

ITEMS = ("ceilings", "correctness", "streaming", "torch_peer", "attention", "training", "trace")
NOT_BUILT = {"diagonal plan", "saved executable", "block sizes"}


@pytest.fixture
def items(monkeypatch):
    """Imports a module of ``benchmarks/device_items``."""
    monkeypatch.syspath_prepend(f"{ROOT}/benchmarks")
    return lambda name: importlib.import_module(f"device_items.{name}")


def run(output, env, *arguments):
    command = [sys.executable, f"{ROOT}/benchmarks/device.py", "--size=tiny", f"--output={output}", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.subprocesses
@pytest.mark.timeout(2400)
def test_every_item(tmp_path, subprocess_env):
    done = run(tmp_path, subprocess_env, "--minutes=300", "--commit=abc")
    assert done.returncode == 0, done.stdout + done.stderr
    names = [f"{number}-{item}.json" for number, item in enumerate(ITEMS, 1)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "table.md"]
    rows = {}
    for item, name in zip(ITEMS, names):
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
    assert {label for (_, label), row in rows.items() if "not built yet" in row.get("why", "")} == NOT_BUILT
    assert rows["streaming", "as it is, 4 steps"]["status"] == "ok"
    assert {"frame 0 against as it is", "frame 2 against as it is"} < rows["streaming", "prefix, 4 steps"][
        "checks"
    ].keys()
    assert rows["correctness", "clip, etm_sdd, tiny"]["status"] == "ok"
    table = (tmp_path / "table.md").read_text()
    assert done.stdout.endswith(table) and all(f"| {item} | {label} |" in table for item, label in rows)
    # Again: nothing is left to do, and figures of another commit are not mixed with these.
    assert run(tmp_path, subprocess_env, "--commit=abc").stdout == table
    other = run(tmp_path, subprocess_env, "--commit=def")
    assert other.returncode == 2 and "holds figures of commit abc" in other.stderr


@pytest.mark.subprocesses
def test_a_limit_is_kept_and_said(tmp_path, subprocess_env):
    done = run(tmp_path, subprocess_env, "--minutes=0.02", "--only", "ceilings", "--commit=abc")
    assert done.returncode == 1 and "| ceilings | | stopped: stopped after 1 s, its limit |" in done.stdout
    assert json.loads((tmp_path / "1-ceilings.json").read_text())["state"] == "stopped"


def test_no_time_at_all(tmp_path, subprocess_env):
    done = run(tmp_path, subprocess_env, "--minutes=0")
    assert done.returncode == 2 and "must be positive" in done.stderr


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
        "right": "ok", "wrong": "wrong", "not a number": "wrong", "infinite": "wrong", "failed": "failed",
        "late": "no time", "later": "not here",
    }  # fmt: skip
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


@pytest.mark.parametrize("visible", [((1, 0, 1, 1), (1, 1, 0, 1)), ((0, 0, 0, 1), (0, 0, 0, 0))])
def test_visible_chunks_first_is_the_same_attention(items, visible):
    prefix, rng = items("prefix"), np.random.default_rng(0)
    table, visible = Schedule.from_table([(3, 1, 0), (0, 2, 3)], q_chunk=6, num_k_chunks=4), np.asarray(visible, bool)
    q, k, v = (rng.standard_normal((2, n, 2, 8)).astype(np.float32) for n in (12, 24, 24))
    found = prefix.attend(*map(jnp.asarray, (q, k, v)), table, jnp.asarray(visible), inner="xla")
    mask = table.dense_mask() & visible.repeat(6, 0).repeat(6, 1)
    assert relative_error(found, dense_attention(q, k, v, mask, 8**-0.5)) < 1e-6


def test_the_probe_says_when_it_replaced_nothing(items):
    from greedy_distill_jax import parallel

    prefix = items("prefix")
    with pytest.raises(RuntimeError, match="replaced no attention"), prefix.streams_by():
        pass
    assert parallel.chunk_attention is chunk_attention


def test_medians_are_of_finished_work(items):
    timing = items("timing")
    ms, runs = timing.median_ms(lambda: sum(i for i in range(200_000)), seconds=0.1)
    assert ms > 0.5 and runs >= 3
    begin = time.perf_counter()
    timing.median_ms(lambda: jnp.zeros(1), seconds=60.0)
    assert time.perf_counter() - begin < 30
    assert timing.error(jnp.asarray([3.0, 4.5]), jnp.asarray([3.0, 4.0])) == pytest.approx(0.1)
