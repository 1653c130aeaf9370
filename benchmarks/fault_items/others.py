"""Faults other than kills, in one of two processes: what each says, how it ends, and when all are gone."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fault_items.job import Job
from greedy_distill_jax.data.video_io import VideoWriter
from greedy_distill_jax.errors import UserError

LOGGED = 5  # steps before the fault
FOREVER = ("steps=1000000", "checkpoint.every=40", "data.max_bad_records=2")
_PAUSE = 5.0  # seconds
_BYTES = 2**10  # that a full disk still takes of a file
_CLIPS, _FRAMES, _SIZE = 6, 24, 16


class Fault(NamedTuple):
    """What is done to a job (given a folder of its own), how its processes end then, and which of them stay."""

    act: Callable[[Job, Path], None]
    codes: tuple[int | None, int | None]
    fault: str = ""  # see ``config``
    stay: tuple[int, ...] = ()


def _signal(number: int, *processes: int) -> Callable[[Job, Path], None]:
    def act(job: Job, folder: Path) -> None:
        for index in processes:
            job.processes[index].told(number)

    return act


def _pause(job: Job, folder: Path) -> None:
    """Less than the time after which silence counts: the job goes on, and is told to stop for an end to come.

    Seconds until all are gone count from the stop, with the pause and the steps after it.
    """
    job.processes[1].told(signal.SIGSTOP)
    time.sleep(_PAUSE)
    job.processes[1].told(signal.SIGCONT)
    before = job.logged()
    job.wait(lambda: job.logged() > before + LOGGED, 10 * _PAUSE)
    job.processes[1].told(signal.SIGTERM)


def _fill(index: int) -> Callable[[Job, Path], None]:
    """What a process writes from now on fails; the kernel says "File too large" of a limit, not "No space".

    Process 0 meets it in its scalars, after every step; another one in its part of the next checkpoint.
    """

    def act(job: Job, folder: Path) -> None:
        resource.prlimit(job.processes[index].pid, resource.RLIMIT_FSIZE, (_BYTES, _BYTES))

    return act


def _damage(job: Job, folder: Path) -> None:
    for shard in (folder / "1" / "data").glob("train-*.array_record"):
        with open(shard, "r+b") as file:
            file.write(bytes(shard.stat().st_size))


def _trigger(job: Job, folder: Path) -> None:
    (folder / "now").touch()


FAULTS = {
    "process 1 killed": Fault(_signal(signal.SIGKILL, 1), (75, -9)),
    "process 0 killed": Fault(_signal(signal.SIGKILL, 0), (-9, -6)),
    "process 1 stopped (SIGSTOP)": Fault(_signal(signal.SIGSTOP, 1), (75, None), stay=(1,)),
    "SIGTERM at process 1": Fault(_signal(signal.SIGTERM, 1), (0, 0)),
    "SIGTERM at both": Fault(_signal(signal.SIGTERM, 0, 1), (0, 0)),
    "process 1 stopped for 5 s, then SIGTERM": Fault(_pause, (0, 0)),
    "full disk at process 0": Fault(_fill(0), (2, 2)),
    "full disk at process 1": Fault(_fill(1), (2, 2)),
    "unreadable shard at process 1": Fault(_damage, (2, 2)),
    "NaN at process 1": Fault(_trigger, (4, 4), fault="nan"),
}


def prepared(root: Path) -> Path:
    """A prepared folder of some clips, made once."""
    folder = root / "clips"
    if not (folder / "data" / "dataset.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "in").mkdir(parents=True)
        names = [f"{number}.mp4" for number in range(_CLIPS)]
        for number, name in enumerate(names):
            with VideoWriter(folder / "in" / name, fps=8) as writer:
                for frame in range(_FRAMES):
                    writer.write(np.full((_SIZE, _SIZE, 3), 10 * number + 5 * frame, np.uint8))
        rows = [f"{name},number {number}" for number, name in enumerate(names)]
        (folder / "captions.csv").write_text("\n".join(["clip,caption", *rows]) + "\n")
        command = [sys.executable, "-m", "greedy_distill_jax.prepare", "clips", "--clips", str(folder / "in")]
        command += ["--captions", str(folder / "captions.csv"), "--output", str(folder / "data")]
        command += ["--size", f"{_SIZE}x{_SIZE}", "--frames", "4", "--stride", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
    return folder / "data"


def happened(root: Path, name: str, silence: float, limit: float) -> dict[str, Any]:
    """Lets a fault happen to a job of two processes, whose hosts have copies of the data; tells what was seen."""
    fault, folder = FAULTS[name], root / "fault"
    shutil.rmtree(folder, ignore_errors=True)
    for host in ("0", "1"):
        shutil.copytree(prepared(root), folder / host / "data")
    own = {1: {"FAULT": fault.fault, "FAULT_AT": str(folder / "now")}}
    changes = (*FOREVER, "data.source=clips:data")
    folders = [folder / host for host in ("0", "1")]
    with Job(folder, "run", 2, changes, silence=silence, own=own, folders=folders) as job:
        if not job.wait(lambda: job.logged() >= LOGGED and job.steps(), limit):
            raise UserError(f"{name}: a process ended before: {job.said(0)}")
        sent, before = time.monotonic(), job.steps()
        fault.act(job, folder)
        in_time = job.gone(limit, but=fault.stay)
        ended = [process.ended for process in job.processes]
        found = {
            "fault": name,
            "codes": job.codes(),
            "seconds": round(max(moment or 0.0 for moment in ended) - sent, 2) if in_time else None,
            "stays": [index for index, moment in enumerate(ended) if not moment],
            "said": [_told(lines, folder) for lines in job.said(sent)],
            "steps": [before, job.steps()],
        }
    expected = list(fault.codes)
    kept = set(before[-1:]) <= set(found["steps"][1]) or found["steps"][1][-1:] > before[-1:]
    return found | {"good": in_time and found["codes"] == expected and kept}


def _told(lines: list[str], folder: Path) -> list[str]:
    """What a process says of the fault, without paths of this machine."""
    begins = ("error", "warning", "stopping", "teacher: stopped", "Fatal Python error")
    told = [line for line in lines if line.startswith(begins) or "UserWarning" in line or "distributed service" in line]
    return [re.sub(rf"[^\s(]*/(?={folder.name}/)|{re.escape(os.getcwd())}/", "", line)[:300] for line in told]


def rows(results: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """Cells of a table."""
    return [
        [name, *(cell for index in (0, 1) for cell in _cells(found, index)), found["seconds"]]
        for name, found in results.items()
    ]


def _cells(found: Mapping[str, Any], index: int) -> tuple[Any, str]:
    said = found["said"][index]
    code = found["codes"][index]
    return "stays" if code is None else code, " / ".join(line.replace("|", "\\|") for line in said) or "nothing"
