"""Mesh axes that span processes: what every stage learns and streams there, held against one process and one device."""

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from processes import Process, variables

from fault_items.job import gone
from greedy_distill_jax.errors import UserError

MESHES = {  # of two processes with two devices each, whose devices come one process after the other
    "one": {"data": 1},
    "fsdp": {"data": 1, "fsdp": 4},
    "context": {"data": 1, "context": 2, "tensor": 2},
    "tensor": {"data": 1, "tensor": 4},
}
STEPS = {"teacher": 1, "teacher_forcing": 1, "dmd": 2, "rl": 1, "ode": 1}
CASES = [f"{stage}:{mesh}" for stage in (*STEPS, "stream") for mesh in ("fsdp", "context", "tensor")]
FAR = 1e-5
LOSSES = ("loss", "flow_matching", "dmd", "grpo", "ode")  # begin the names of scalars that are compared
WAYS = {"1 x 1": (1, 1), "1 x 4": (1, 4), "2 x 2": (2, 2)}
SPREAD = ("2 x 2", "1 x 4")


def trained(
    root: Path, way: str, cases: Iterable[str], limit: float, environment: Mapping[str, str] = os.environ
) -> None:
    """Trains cases in as many processes and devices as ``way`` says; UserError if they do not end with 0 in time.

    Args:
      root: folder of all runs.
      way: of ``WAYS``.
      cases: see ``spans_job``.
      limit: seconds.
      environment: of the processes, besides what joins them.
    """
    processes, devices = WAYS[way]
    script = Path(__file__).with_name("spans_job.py")
    paths = (str(script.parents[1]), str(script.parents[2]), environment.get("PYTHONPATH"))
    environment = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(script), str(root), *cases]
    running = [Process(command, one) for one in variables(processes, devices, environment)]
    try:
        in_time = gone(running, limit)
        codes = [process.code() for process in running]  # None: it runs
    finally:
        for process in running:
            process.end()
    said = " / ".join("\n".join(line for _, line in process.said)[-2000:] for process in running)
    if any(codes):
        raise UserError(f"{way}: {' '.join(cases)} ended with {codes}: {said}")
    if not in_time:
        raise UserError(f"{way}: {' '.join(cases)} did not end within {limit:g} s ({said}); give it more: --limit.")


def apart(root: Path, way: str, case: str) -> dict[str, Any]:
    """How far a case is from one device: its updates, by norm over all leaves; its scalars, the farthest of them."""
    stage, mesh = case.split(":")
    processes, devices = WAYS[way]
    own = np.load(root / f"{processes}x{devices}-{stage}-{mesh}.npz")
    one = np.load(root / f"1x1-{stage}-one.npz")
    if set(own.files) != set(one.files):
        raise UserError(f"{way}, {case}: {sorted(set(own.files) ^ set(one.files))} are of one of them alone.")
    for made, x in ((way, own), ("1 x 1", one)):
        if bad := [name for name in x.files if _counts(name) and not np.isfinite(x[name]).all()]:
            raise UserError(f"{made}, {case}: {', '.join(bad)} are not finite; there is nothing to compare.")
    far: dict[str, Any] = {"norm": 0.0, "update": 0.0, "scalars": 0.0}
    nets = sorted({name.split("/")[1] for name in one.files if name.startswith("moved/")})
    for net in nets:
        a, b = (
            np.concatenate([x[n].ravel() for n in sorted(x.files) if n.startswith(f"moved/{net}")]) for x in (own, one)
        )
        if np.linalg.norm(b):
            far["norm"] = max(far["norm"], float(np.linalg.norm(b)))
            far["update"] = max(far["update"], float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    for name in one.files:
        if name.startswith("scalar/") and _counts(name):
            far["scalars"] = max(far["scalars"], float(abs(own[name] - one[name]) / max(abs(one[name]), 1e-3)))
    return far | {"good": far["norm"] > 0 and max(far["update"], far["scalars"]) <= FAR}


def _counts(name: str) -> bool:
    """Whether an array is compared."""
    return name.startswith("moved/") or name.split("/")[-1].startswith(LOSSES)


def spanned(root: Path, case: str, way: str, limit: float) -> dict[str, Any]:
    """Trains a case in one way, and before on one device what it is compared with where that is not there."""
    root.mkdir(exist_ok=True)
    stage = case.split(":")[0]
    first = [] if (root / "student" / "checkpoints" / "2").exists() else ["origin"]
    first += ["trajectories"] if stage == "ode" else []
    if not (root / f"1x1-{stage}-one.npz").exists():
        trained(root, "1 x 1", [*first, f"{stage}:one"], limit)
    trained(root, way, [case], limit)
    return {"span": [case, way], **apart(root, way, case)}
