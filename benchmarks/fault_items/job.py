"""A training in several processes of this machine: started, watched, and what it leaves."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from processes import Process, variables

from greedy_distill_jax.cli import RETRY
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.checkpoint import Checkpointer
from greedy_distill_jax.training.metrics import read_scalars

CONFIG = Path(__file__).with_name("config.py")
JOIN = 120.0  # JOIN_TIMEOUT: one that is killed before it has joined is missed for so long
DEVICES = 4  # of all processes together
_PAUSE = 0.002  # seconds between two looks


class Job:
    """A training command in several processes.

    Args:
      root: folder of all jobs; they share compiled programs in it.
      name: of the job's folder in it.
      processes: how many; each has its part of four devices.
      changes: of the configuration, such as "steps=8".
      silence: seconds without a sign of life after which a process counts as gone.
      own: more variables of some processes.
      folders: in which each process runs; None for this one.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        processes: int,
        changes: Sequence[str],
        *,
        silence: float,
        own: Mapping[int, Mapping[str, str]] | None = None,
        folders: Sequence[Path] | None = None,
    ):
        self.workdir, self.begun = root / name, time.monotonic()
        changes = (f"compile_cache={root / 'compiled'}", *changes)
        command = [sys.executable, "-m", "greedy_distill_jax.train", f"--config={CONFIG}", f"--workdir={self.workdir}"]
        command += [f"--config.{change}" for change in changes]
        here = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        more = {"SILENCE_TIMEOUT": f"{silence:g}", "JOIN_TIMEOUT": f"{JOIN:g}", "PYTHONPATH": paths}
        self.processes = [
            Process(command, env | more | (own or {}).get(index, {}), folders[index] if folders else None)
            for index, env in enumerate(variables(processes, DEVICES // processes))
        ]

    def steps(self) -> list[int]:
        """The whole checkpoints."""
        return sorted(int(name) for name in self._checkpoints() if name.isdigit())

    def saving(self) -> list[str]:
        """Folders of checkpoints that are being written, or were when their writer was killed."""
        return [name for name in self._checkpoints() if "orbax-checkpoint-tmp" in name]

    def logged(self) -> int:
        """Steps whose scalars are written."""
        try:
            return (self.workdir / "scalars.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def _checkpoints(self) -> list[str]:
        try:
            return os.listdir(self.workdir / "checkpoints")
        except FileNotFoundError:
            return []

    def wait(self, reached: Any, limit: float) -> bool:
        """Waits until ``reached()`` holds; False if a process has ended before, UserError after ``limit`` seconds."""
        until = time.monotonic() + limit
        while not reached():
            if any(process.ended for process in self.processes):
                return False
            if time.monotonic() > until:
                said = " / ".join(line for process in self.processes for _, line in process.said[-2:])
                raise UserError(f"a training did not come so far within {limit:g} s ({said}); give it more: --limit.")
            time.sleep(_PAUSE)
        return True

    def gone(self, limit: float, but: Sequence[int] = ()) -> bool:
        """Waits until all processes, ``but`` some, have ended; False after ``limit`` seconds."""
        return gone([process for index, process in enumerate(self.processes) if index not in but], limit)

    def codes(self) -> list[int | None]:
        """Exit codes of all processes, -9 for one that was killed, None for one that runs."""
        return [process.code() for process in self.processes]

    def said(self, since: float) -> list[list[str]]:
        """Lines of every process after a moment."""
        return [[line for moment, line in process.said if moment >= since and line] for process in self.processes]

    def end(self) -> None:
        """Ends all for certain."""
        for process in self.processes:
            process.end()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_) -> None:
        self.end()


def gone(processes: Sequence[Process], limit: float) -> bool:
    """Waits until all have ended; False after ``limit`` seconds."""
    until = time.monotonic() + limit
    while not all(process.ended for process in processes) and time.monotonic() < until:
        time.sleep(_PAUSE)
    return all(process.ended for process in processes)


def hashes(workdir: Path) -> dict[str, list[str]]:
    """Of every whole step of a run, as text: hashes of all its arrays, and of all that was logged up to it."""
    if not (workdir / "checkpoints").is_dir():
        return {}
    found = {}
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpointer:
        for step in checkpointer.steps():
            try:
                arrays = _arrays(checkpointer.restore_subtree(step, "nets"))
            except UserError as error:  # a step that counts as whole and is not
                arrays = str(error).replace(str(workdir), workdir.name)
            found[str(step)] = [arrays, _scalars(workdir, step)]
    return found


def _arrays(tree: Any) -> str:
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode() + array.tobytes())
    return total.hexdigest()[:16]


def _scalars(workdir: Path, last: int) -> str:
    lines = [{k: v for k, v in line.items() if k != "time"} for line in read_scalars(workdir) if line["step"] <= last]
    return hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()[:16]


def finished(start: Callable[[], Job], limit: float) -> None:
    """Lets a job that is started end; UserError if it does not end with 0 in time.

    It is started once more where its processes came to each other too late, which a busy machine does.
    """
    for left in (1, 0):
        with start() as job:
            if job.gone(limit) and set(job.codes()) == {0}:
                return
        if not left or set(job.codes()) != {RETRY}:
            said = " / ".join(line for process in job.processes for _, line in process.said[-3:])
            raise UserError(f"{job.workdir}: a training that nobody disturbs ended with {job.codes()} ({said}).")
