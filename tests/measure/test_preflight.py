"""What a job's hosts are looked at for, and the command that does it, in two processes."""

import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from greedy_distill_jax.distribution.hosts.join import Joined
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.measure import preflight
from tests.conftest import ROOT
from tests.training.test_two_processes import joined as joining

FACTS = {
    "seen": 8,
    "expected": 8,
    "kind": "NVIDIA H100",
    "device_free": 79 * 2**30,
    "memory_free": 900 * 2**30,
    "disk_free": 2**40,
    "time": 1000.0,
    "versions": {"python": "3.12.1", "jax": "0.12.0"},
    "shared": True,
    "wrong": [],
}


def _facts(*changes):
    return [FACTS | {"host": f"node{index}"} | change for index, change in enumerate(changes)]


@pytest.mark.parametrize(
    "change, lines",
    [
        ({}, []),
        ({"time": 1004.9}, []),
        (
            {"time": 1007.5},
            ["process 1 (node1): its clock is +7.5 s from the others'; set the clocks of all hosts by NTP"],
        ),
        ({"seen": 7}, ['devices is "7 x NVIDIA H100" at process 1 (node1), "8 x NVIDIA H100" at the others']),
        ({"wrong": ["7 of 8 devices"]}, ["process 1 (node1): 7 of 8 devices"]),
    ],
)
def test_what_is_wrong_names_process_and_host(change, lines):
    assert preflight.problems(_facts({}, change, {})) == lines


def test_the_table_has_a_row_per_process():
    unknown = {"expected": 0, "device_free": 0, "shared": False, "time": 998.5}
    head, first, second, _, versions = preflight.table_of_hosts(_facts({}, unknown, {})).splitlines()
    assert head.split("  ")[0] == "process" and versions == "python 3.12.1 jax 0.12.0"
    assert re.split(r"  +", first) == [
        "0",
        "node0",
        "8 of 8",
        "NVIDIA H100",
        "79.0",
        "900.0",
        "1024.0",
        "+0.00",
        "good",
    ]
    assert re.split(r"  +", second)[2:5:2] == ["8 of ?", "?"] and re.split(r"  +", second)[-2:] == ["-1.50", "wrong"]


def test_the_table_of_sums_says_what_a_device_sends():
    sums = [preflight.Sum("data", 4, True, 0.003, 1.5 * 2e6), preflight.Sum("fsdp", 2, False, 0.001, 2e6)]
    head, data, fsdp = preflight.table_of_sums(sums, 2 * 2**20).splitlines()
    assert re.split(r"  +", data) == ["data", "4", "3.00 ms", "1.00"] and "sum of 2 MiB" in head
    assert re.split(r"  +", fsdp) == ["fsdp", "2", "1.00 ms", "wrong sum"]
    assert preflight.table_of_sums([], 1) == ""


def test_sums_over_every_axis_of_a_mesh(monkeypatch):
    mesh, added = make_mesh({"data": 2, "context": 4}), []
    total = jax.lax.psum
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis_name: added.append(axis_name) or total(x, axis_name))
    data, context = preflight.sums(mesh, 4096, repeats=1)
    assert added == ["data", "context"]
    assert (data.axis, data.devices, data.right, data.sent) == ("data", 2, True, 4096)
    assert (context.axis, context.devices, context.right, context.sent) == ("context", 4, True, 6144)
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis_name: total(x, axis_name) * np.float32(1.5))
    assert not any(found.right for found in preflight.sums(mesh, 4096, repeats=1))


def test_a_shared_folder_is_read_by_the_next_process(tmp_path):
    folder, first = tmp_path / "run", Joined(0, 2)
    (line,) = preflight.shared_folder(first, folder)  # nobody else writes here
    assert line.startswith(f"{folder} is not the folder that the other processes see (.preflight-1: No such file")
    (folder / ".preflight-1").write_text(".preflight-1")
    assert preflight.shared_folder(first, folder) == []
    (folder / ".preflight-1").write_text("an older one")
    assert "is not what its process wrote" in preflight.shared_folder(first, folder)[0]
    assert preflight.shared_folder(Joined(), folder) == []
    assert [path.name for path in folder.iterdir()] == [".preflight-1"]
    file = tmp_path / "file"
    file.touch()
    assert preflight.shared_folder(Joined(), file)[0].startswith(f"{file} cannot be written (")


def test_memory_that_programs_can_take(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  4 kB\nMemFree:  1 kB\nMemAvailable:       3 kB\n")
    assert preflight.available_memory(tmp_path / "meminfo") == 3072
    assert preflight.available_memory(tmp_path / "nothing") == 0


@pytest.mark.subprocesses
def test_two_processes_are_looked_at(tmp_path, subprocess_env):
    command = [sys.executable, f"{ROOT}/launch/preflight.py", "--config=configs/quickstart.py:teacher", "--mib=1"]
    command += [f"--workdir={tmp_path / 'run'}", "--devices=2", "--config.mesh.fsdp=2"]
    env = joining(subprocess_env)
    running = [
        subprocess.Popen(
            command,
            env=env | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for index in (0, 1)
    ]
    outputs = [process.communicate(timeout=900) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    rows = [re.split(r"  +", line.strip()) for line in outputs[0][0].splitlines() if not line.startswith("[Gloo]")]
    hosts = [row for row in rows if len(row) == 9]
    assert [row[0] for row in hosts] == ["process", "0", "1"]
    assert [row[2] for row in hosts[1:]] == ["2 of 2"] * 2 and [row[-1] for row in hosts[1:]] == ["good"] * 2
    assert [row[:2] for row in rows if len(row) == 4] == [["axis", "devices"], ["data", "2"], ["fsdp", "2"]]
    assert not [line for line in outputs[1][0].splitlines() if not line.startswith("[Gloo]")]
    assert [index for index in (0, 1) if f"process {index} of 2 on" in outputs[index][1]] == [0, 1]
    assert not list((tmp_path / "run").iterdir())
