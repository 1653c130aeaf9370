"""A run that goes on with other processes and on another mesh: how far it is from one that nobody disturbed."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fault_items.job import Job, finished
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.checkpoint import load_params
from greedy_distill_jax.training.metrics import read_scalars

STEPS, HALF = 8, 4
MESHES = {  # name -> (processes, mesh)
    "1 process, fsdp 4": (1, {"data": 1, "fsdp": 4}),
    "2 processes, data 4": (2, {"data": 4, "fsdp": 1}),
    "2 processes, fsdp 2, context 2": (2, {"data": 1, "fsdp": 2, "context": 2}),
    "4 processes, data 2, fsdp 2": (4, {"data": 2, "fsdp": 2}),
}
FAR = 1e-5


def _changes(steps: int, mesh: Mapping[str, int]) -> tuple[str, ...]:
    return (f"steps={steps}", "checkpoint.every=4", *(f"mesh.{axis}={size}" for axis, size in mesh.items()))


def begun(root: Path, silence: float, limit: float) -> None:
    """Trains half a run in two processes, which others go on with, and a whole one."""
    for name, steps in (("half", HALF), ("whole", STEPS)):

        def start(name=name, steps=steps) -> Job:
            shutil.rmtree(root / name, ignore_errors=True)
            return Job(root, name, 2, _changes(steps, {}), silence=silence)

        finished(start, limit)


def moved(root: Path, name: str, silence: float, limit: float) -> dict[str, Any]:
    """Goes on with the half run, and compares with the whole one: losses of every step, the average's parameters."""
    processes, mesh = MESHES[name]

    def start() -> Job:
        shutil.rmtree(root / "moved", ignore_errors=True)
        shutil.copytree(root / "half", root / "moved")
        return Job(root, "moved", processes, _changes(STEPS, mesh), silence=silence)

    finished(start, limit)
    far = {"losses": _losses_apart(root), "average": _averages_apart(root)}
    return {"move": name, **far, "good": all(value <= FAR for value in far.values())}


def _losses_apart(root: Path) -> float:
    """Largest difference of a step's loss, over the loss; UserError if a step is missing in one of them."""
    steps, losses = range(1, STEPS + 1), []
    for name in ("whole", "moved"):
        logged = {line["step"]: line["teacher/loss"] for line in read_scalars(root / name)}
        if absent := [step for step in steps if step not in logged]:
            raise UserError(f"{root / name}: the scalars of steps {absent} are missing; its training did not log them.")
        losses.append([logged[step] for step in steps])
    own, other = losses
    return float(np.max(np.abs(np.subtract(own, other)) / np.abs(own)))


def _averages_apart(root: Path) -> float:
    """Norm of the difference of the averages, over the norm of the average."""
    trees = [load_params(root / name / "checkpoints", "nets/teacher/ema", step=STEPS) for name in ("whole", "moved")]
    own, other = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in trees)
    return float(np.linalg.norm(own - other) / np.linalg.norm(own))
