"""Kills of a run at random moments, which goes on after each: all that it leaves is as of one that nobody disturbed."""

import random
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fault_items.job import JOIN, Job, finished, hashes
from greedy_distill_jax.cli import RETRY
from greedy_distill_jax.training.metrics import read_scalars

PROCESSES = (1, 2, 4)
EACH = 4  # kills of one run
STEPS, EVERY, KEEP = 24, 3, 2
CHANGES = (f"steps={STEPS}", f"checkpoint.every={EVERY}")
MARGIN = 20.0  # seconds, with the time of a process to end, after which "gone" is late
_STARTS = 4  # that no kill ends, until one ends with 0


def undisturbed(root: Path, processes: int, silence: float, limit: float) -> dict[str, Any]:
    """Hashes of every step that a run saves which nobody disturbs, and its seconds until the first."""
    name, setup = f"undisturbed-{processes}", []

    def start() -> Job:
        shutil.rmtree(root / name, ignore_errors=True)
        job = Job(root, name, processes, (*CHANGES, f"checkpoint.keep={STEPS}"), silence=silence)
        job.wait(job.logged, limit)
        setup.append(time.monotonic() - job.begun)
        return job

    finished(start, limit)
    return {"setup": round(setup[-1], 1), "steps": hashes(root / name)}


def killed(
    root: Path, seed: int, number: int, whole: Mapping[int, Mapping[str, Any]], silence: float, limit: float
) -> dict[str, Any]:
    """Kills a run again and again, then lets it end, and tells what was seen.

    Args:
      root, silence, limit: see ``Job``.
      seed, number: of the run, which say when and whom to kill.
      whole: by number of processes, see ``undisturbed``.
    """
    processes, name, rng = PROCESSES[number % len(PROCESSES)], f"killed-{number}", random.Random(f"{seed} {number}")
    shutil.rmtree(root / name, ignore_errors=True)
    kills, ended, said = [], [], []
    while len(ended) < _STARTS and (not ended or set(ended[-1]) != {0}):
        with Job(root, name, processes, (*CHANGES, f"checkpoint.keep={KEEP}"), silence=silence) as job:
            kept = _scalars(job)
            found = _kill(job, rng, len(kills), whole[processes]["setup"], limit) if len(kills) < EACH else None
            in_time = job.gone(limit)
        if found is None:
            ended.append(job.codes() if in_time else [None])
            said += [line for lines in job.said(0) for line in lines if line.startswith("error")]
        else:
            kills.append(found | {"steps_kept": hashes(root / name), "anew": _scalars(job)[: len(kept)] != kept})
    return {
        "run": number,
        "seed": seed,
        "processes": processes,
        "kills": kills,
        "ended": ended,
        "said": said,
        "steps": hashes(root / name),
    }


def _kill(job: Job, rng: random.Random, count: int, setup: float, limit: float) -> dict[str, Any] | None:
    """Kills a process or all at a moment, and waits until all are gone; None if they had ended before."""
    old, lines = job.saving(), job.logged()
    base = max([lines, *job.steps(), *(int(name.split(".")[0]) for name in old)])  # what is beyond is of this start
    moment = _wait(job, rng, base, (STEPS - base) // (EACH - count), setup, limit)
    if moment is None:
        return None
    everybody = len(job.processes) == 1 or rng.random() < 0.3
    victims = list(range(len(job.processes))) if everybody else [rng.randrange(len(job.processes))]
    before, sent = job.steps(), time.monotonic()
    for victim in victims:
        job.processes[victim].told(signal.SIGKILL)
    in_time = job.gone(limit)
    if -signal.SIGKILL not in job.codes():
        return None
    return {
        "victims": victims,
        "moment": moment,
        "joined": job.logged() > base,  # all have, for certain
        "inside_save": bool(set(job.saving()) - set(old)),
        "codes": job.codes(),
        "seconds": round(max(process.ended or sent + limit for process in job.processes) - sent, 2),
        "all_gone": in_time,
        "steps_before": before,
    }


def _wait(job: Job, rng: random.Random, base: int, reach: int, setup: float, limit: float) -> str | None:
    """Waits for the moment of a kill, at most ``reach`` steps on, and names it; None if a process ended before."""
    kind = rng.random()
    if kind < 0.1:
        moment = job.begun + rng.uniform(0, setup)
        return "any time" if job.wait(lambda: time.monotonic() > moment, limit) else None
    if kind < 0.5:
        step = min(base + rng.randint(1, max(1, reach)), STEPS - 1)
        name, came, pause = f"step {step}", lambda: job.logged() >= step, 0.05
    else:  # aimed into a save: after its folder is begun, for about as long as it takes
        save = EVERY * (base // EVERY + rng.randint(1, max(1, reach // EVERY)))
        name, came, pause = f"save {save}", lambda: any(name.startswith(f"{save}.") for name in job.saving()), 0.1
    if not job.wait(came, limit):
        return None
    time.sleep(rng.uniform(0, pause))
    return name


def _scalars(job: Job) -> list[dict[str, Any]]:
    """What is logged of the steps up to the newest whole checkpoint, which a run that goes on from there keeps."""
    newest = max(job.steps(), default=0)
    return [line for line in read_scalars(job.workdir) if line["step"] <= newest]


def verdict(found: Mapping[str, Any], reference: Mapping[str, Any], silence: float) -> list[str]:
    """What is wrong with a run that was killed: nothing, or a line each."""
    wrong = []
    for number, kill in enumerate(found["kills"]):
        if not kill["all_gone"]:
            wrong.append(f"kill {number}: a process stayed")
        if not set(map(str, kill["steps_before"][-1:])) <= set(kill["steps_kept"]):
            wrong.append(f"kill {number}: a checkpoint was lost")
        if kill["anew"]:
            wrong.append(f"kill {number}: the run had not gone on from its newest checkpoint")
        if any(reference["steps"].get(step) != value for step, value in kill["steps_kept"].items()):
            wrong.append(f"kill {number}: a checkpoint is another one")
        most = silence if kill["joined"] else JOIN
        if kill["seconds"] > most + MARGIN:
            wrong.append(f"kill {number}: late")
    # Processes that came to each other too late, on a busy machine, ask for another start; jax aborts who loses them.
    for number, codes in enumerate(found["ended"][:-1]):
        if RETRY not in codes or not set(codes) <= {RETRY, -signal.SIGABRT}:
            wrong.append(f"end {number}, of no kill: {codes}")
    if not found["ended"] or set(found["ended"][-1]) != {0}:
        wrong.append(f"it did not end: {found['said'][-1:]}")
    elif str(STEPS) not in found["steps"]:
        wrong.append("its last step is not there")
    if any(reference["steps"].get(step) != value for step, value in found["steps"].items()):
        wrong.append("it ended otherwise")
    return wrong
