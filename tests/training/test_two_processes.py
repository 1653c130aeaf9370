"""Two processes of one run: a signal to one of them stops both after the same step, and what ends one ends both."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from greedy_distill_jax.storage.checkpoint import Checkpointer, load_params
from greedy_distill_jax.storage.lock import held
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.train import train
from greedy_distill_jax.training.metrics import read_scalars

CONFIG = """
import os, pathlib, resource, time
import jax
from greedy_distill_jax.distribution import agreement
from greedy_distill_jax.errors import Diverged
from greedy_distill_jax.training import job, stop
from greedy_distill_jax.training.metrics import MetricWriter
from greedy_distill_jax.testing.tiny import train_config
def hold(at):
    file = pathlib.Path(os.environ["HOLD"] + str(jax.process_index()))
    if file.name.startswith(str(at) + "-"):
        file.touch()
        while file.exists():
            time.sleep(0.01)
write, open_data = MetricWriter.scalars, job.open_data
def scalars(self, step, *args):
    write(self, step, *args)
    hold(step)
    if step == 4 and os.environ.get("FAIL") in (str(jax.process_index()), "all"):
        raise Diverged("not finite")
    if step == 4 and os.environ.get("FULL") == str(jax.process_index()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, 2**13))  # of a checkpoint it writes larger files
def opened(*args):
    hold("setup")
    return open_data(*args)
MetricWriter.scalars, job.open_data = scalars, opened
agreement.ANSWER, stop._LEADER = 200.0, 10.0  # the machine may be busy
if os.environ.get("FAIL") == "all":
    stop._SAME = 4.0
def get_config(stage="teacher"):
    return train_config(stage, steps=16, checkpoint__every=5, mesh__fsdp=4, mesh__data=1)
"""
# TensorStore's report of an array whose write fails after that of another, to a loop that Orbax has closed.
LATE = re.compile(r"Traceback \(most recent call last\):\n(?:  .*\n)+RuntimeError: Event loop is closed\n")
# The state of Muon, and a rate that decays. Its update talks to the other process far more often than AdamW's.
MUON = dict(optimizer__name="muon", optimizer__final=0.05)
FLAGS = [f"--config.{key.replace('__', '.')}={value}" for key, value in MUON.items()]


def joined(env):
    """The variables of two processes that join, but for their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return {
        **env,
        "XLA_FLAGS": f"{env['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }


class _Pair:
    """A training command in two processes with two devices each, which wait for signals at a step, or in the setup."""

    def __init__(self, tmp_path, workdir, env, hold="none", changes=(), own=((), ())):
        config, self.hold = tmp_path / "config.py", tmp_path / f"{hold}-"
        config.write_text(CONFIG)
        env = {**joined(env), "HOLD": str(self.hold)}
        command = [sys.executable, "-m", "greedy_distill_jax.train", f"--config={config}", f"--workdir={workdir}"]
        self.files = [tmp_path / f"err{index}" for index in (0, 1)]
        self.processes = []
        for index in (0, 1):
            numbered = {**env, "JAX_PROCESS_ID": str(index)}
            options = dict(env=numbered, stderr=subprocess.PIPE)  # a file would be as full as the disk
            self.processes.append(subprocess.Popen([*command, *changes, *own[index]], **options))
        told = zip(self.processes, self.files, strict=True)
        self.threads = [threading.Thread(target=_keep, args=(process.stderr, file)) for process, file in told]
        for thread in self.threads:
            thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
        for thread in self.threads:
            thread.join()

    def signal(self, number, *indices, between=0.0):
        """Sends a signal to some of the processes once they wait, then lets all go on."""
        files = [self.hold.with_name(f"{self.hold.name}{index}") for index in (0, 1)]
        while not all(file.exists() for file in files):
            assert all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.01)
        for index in indices:
            self.processes[index].send_signal(number)
            time.sleep(between)
        for file in files:
            file.unlink()

    def said(self):
        return "\n".join(file.read_text() for file in self.files)

    def codes(self):
        codes = [process.wait(timeout=900) for process in self.processes]
        for thread in self.threads:
            thread.join()
        return codes


def _keep(lines, file):
    with lines, open(file, "wb", buffering=0) as kept:
        for line in lines:
            kept.write(line)


def _saved(workdir):
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpointer:
        return checkpointer.latest_step()


@pytest.mark.slow
@pytest.mark.subprocesses
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path, subprocess_env):
    """A step that is damaged since is passed over by both; two processes or one go on with what two have saved."""
    workdir = tmp_path / "run"
    stops = [
        (4, signal.SIGTERM, (1,), 0),
        (8, signal.SIGTERM, (0, 1), 0),
        (12, signal.SIGINT, (0,), 130),
    ]
    for step, number, indices, code in stops:
        with _Pair(tmp_path, workdir, subprocess_env, hold=step, changes=FLAGS) as pair:
            pair.signal(number, *indices, between=0.5)
            assert pair.codes() == [code, code], pair.said()
            kept = _saved(workdir)
            assert step <= kept < step + 4
            assert pair.said().count(f"saved step {kept} of 16") == 1, pair.said()
            assert pair.said().count(f"stopping after step {kept}") == 1, pair.said()
            assert pair.said().count("is damaged") == (step == 12), pair.said()
        if step == 8:
            for file in (workdir / "checkpoints" / str(kept) / "state" / "ocdbt.process_1" / "d").iterdir():
                file.write_bytes(bytes(len(file.read_bytes())))
    assert f"checkpoints-damaged-{kept}" not in {path.name for path in workdir.iterdir()}
    assert [path.name[:20] for path in workdir.glob("checkpoints-*")] == ["checkpoints-damaged-"]
    shutil.copytree(workdir, tmp_path / "pair")
    with _Pair(tmp_path, tmp_path / "pair", subprocess_env, changes=FLAGS) as pair:
        assert pair.codes() == [0, 0], pair.said()
        assert pair.said().count("teacher: 16/16 ") == 1 and _saved(tmp_path / "pair") == 16, pair.said()
    for name, mesh in (("run", dict(mesh__data=2, mesh__fsdp=4)), ("undisturbed", dict(mesh__data=8))):
        config = tiny.train_config("teacher", steps=16, checkpoint__every=5, **MUON, **mesh)
        train(config, tmp_path / name, show_progress=False)
    other = load_params(tmp_path / "undisturbed" / "checkpoints", "nets/teacher/ema")
    losses = [x["teacher/loss"] for x in read_scalars(tmp_path / "undisturbed")]
    for name in ("run", "pair"):
        lines = read_scalars(tmp_path / name)
        assert [line["step"] for line in lines] == list(range(1, 17))
        np.testing.assert_allclose([x["teacher/loss"] for x in lines], losses, rtol=1e-5)
        own = load_params(tmp_path / name / "checkpoints", "nets/teacher/ema")
        assert optax.tree.norm(jax.tree.map(jnp.subtract, own, other)) < 1e-5 * optax.tree.norm(other)


@pytest.mark.slow
@pytest.mark.subprocesses
def test_a_signal_before_the_first_step_ends_all(tmp_path, subprocess_env):
    workdir = tmp_path / "run"
    with _Pair(tmp_path, workdir, subprocess_env, hold="setup") as pair:
        pair.signal(signal.SIGTERM, 1)
        assert pair.codes() == [143, 143], pair.said()
        line = "teacher: stopped, nothing to save yet; the same command goes on from there."
        told = [text for text in pair.said().splitlines() if text]
        assert [re.sub("^(process .*?) on .*", r"\1", text) for text in told] == [
            "process 0 of 2",
            line,
            "process 1 of 2",
        ]
    assert not workdir.exists()


@pytest.mark.slow
@pytest.mark.subprocesses
def test_processes_with_different_configurations_end_before_they_start(tmp_path, subprocess_env):
    with _Pair(tmp_path, tmp_path / "run", subprocess_env, own=[(), ("--config.data.batch=12",)]) as pair:
        assert pair.codes() == [2, 2], pair.said()
        for index, file in enumerate(pair.files):
            joined, error = file.read_text().splitlines()
            assert re.match(
                rf"process {index} of 2 on \S+: JAX_COORDINATOR_ADDRESS, coordinator 127.0.0.1:\d+, ", joined
            )
            assert re.match(r"error: config.data.batch is 12 at process 1 \(\S+\), \d+ at the others; start all", error)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.subprocesses
def test_a_refusal_of_one_process_ends_the_other_with_its_line(tmp_path, subprocess_env):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with held(workdir / "writer.lock", "it"), _Pair(tmp_path, workdir, subprocess_env) as pair:
        assert pair.codes() == [2, 2], pair.said()
        first, second = (file.read_text() for file in pair.files)
    assert f"error: --workdir: {workdir} is being written by another process (process {os.getpid()}" in first
    assert f"error: process 0 has ended ({workdir} is being written by another process" in second


@pytest.mark.slow
@pytest.mark.subprocesses
@pytest.mark.parametrize("fails", ["0", "all"])
def test_an_error_of_one_process_ends_the_other_inside_its_step(tmp_path, subprocess_env, fails):
    """Which waits for the one that failed; an error of both is said by both."""
    with _Pair(tmp_path, tmp_path / "run", {**subprocess_env, "FAIL": fails}) as pair:
        assert pair.codes() == [4, 4], pair.said()
        said = [file.read_text() for file in pair.files]
    other = f"error: process {fails} has ended (not finite); the others end, too"
    for index, text in enumerate(said):
        assert ("error: not finite" if fails in (str(index), "all") else other) in text
        assert text.count("error:") == 1 and "Traceback" not in text


@pytest.mark.slow
@pytest.mark.subprocesses
def test_a_disk_that_is_full_to_one_process_ends_both_and_keeps_the_last_step(tmp_path, subprocess_env):
    workdir = tmp_path / "run"
    changes = ("--config.checkpoint.every=2", "--config.steps=100000")
    with _Pair(tmp_path, workdir, {**subprocess_env, "FULL": "1"}, changes=changes) as pair:
        assert pair.codes() == [2, 2], pair.said()
        first, second = (LATE.sub("", file.read_text()) for file in pair.files)
    kept = _saved(workdir)
    line = f"{workdir}/checkpoints cannot be written (File too large); step {kept} is kept. Free space and run the same"
    assert f"error: {line}" in second and f"error: process 1 has ended ({line}" in first
    assert kept in (2, 4) and "Traceback" not in first + second


SHARE = """
import sys
import jax
from greedy_distill_jax.distribution.hosts.join import share
index, count = share()
print(index, count, jax.process_index(), jax.process_count(), flush=True)
sys.stdin.read()
sys.exit(3)
"""


@pytest.mark.slow
@pytest.mark.subprocesses
def test_who_takes_a_share_waits_for_nobody_at_its_end(tmp_path, subprocess_env):
    env = joined(subprocess_env)
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", SHARE],
            env={**env, "JAX_PROCESS_ID": str(index)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        assert [process.stdout.readline() for process in pair] == ["0 2 0 1\n", "1 2 0 1\n"]
        for process in reversed(pair):
            process.communicate("", timeout=900)
            assert process.returncode == 3
    finally:
        for process in pair:
            process.kill()
            process.communicate()
