"""Kills at random moments: the run that goes on ends as one that nobody disturbed."""

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from fault_items.job import JOIN, Job, finished, hashes

PROCESSES = (1, 2, 4)
STEPS, EVERY, KEEP = 12, 3, 2
CHANGES = (f"steps={STEPS}", f"checkpoint.every={EVERY}", f"checkpoint.keep={KEEP}")
_STARTS = 4  # of the same command, until it ends with 0
_TRIES = 5  # draws of a moment, until one comes before the run ends
_SETUP = 12.0  # seconds, about, until the first step


def undisturbed(root: Path, processes: int, silence: float, limit: float) -> dict[str, str]:
    """Hashes of a run that nobody disturbs."""
    name = f"undisturbed-{processes}"
    shutil.rmtree(root / name, ignore_errors=True)
    return finished(Job(root, name, processes, CHANGES, silence=silence), limit)


def killed(root: Path, seed: int, number: int, silence: float, limit: float) -> dict[str, Any]:
    """Kills a run once, starts it again until it has ended, and tells what was seen."""
    processes, name = PROCESSES[number % len(PROCESSES)], f"killed-{number}"
    for attempt in range(_TRIES):
        rng = random.Random(f"{seed} {number} {attempt}")
        shutil.rmtree(root / name, ignore_errors=True)
        with Job(root, name, processes, CHANGES, silence=silence) as job:
            moment = _wait(job, rng, number, limit)
            if moment is None:  # it ended before
                continue
            everybody = processes == 1 or rng.random() < 0.3
            victims = list(range(processes)) if everybody else [rng.randrange(processes)]
            before = job.steps()
            sent = time.monotonic()
            for victim in victims:
                job.processes[victim].told(signal.SIGKILL)
            in_time = job.gone(limit)
            ended = max((process.ended or sent + limit) for process in job.processes)
            found = {
                "kill": number,
                "seed": seed,
                "processes": processes,
                "victims": victims,
                "moment": moment,
                "logged": job.logged(),
                "inside_save": bool(job.saving()),
                "codes": job.codes(),
                "seconds": round(ended - sent, 2),
                "all_gone": in_time,
                "steps_before": before,
                "steps_after": job.steps(),
            }
        return found | _again(root, name, processes, silence, limit)
    return {"kill": number, "seed": seed, "processes": processes, "moment": "none in time"}


def _wait(job: Job, rng: random.Random, number: int, limit: float) -> str | None:
    """Waits for the moment of a kill, and names it; None if the run ended before."""
    if number % 2:  # aimed into a save: after its folder is begun, for about as long as it takes
        save = EVERY * rng.randint(1, STEPS // EVERY)
        if not job.wait(lambda: any(name.startswith(f"{save}.") for name in job.saving()), limit):
            return None
        time.sleep(rng.uniform(0, 0.1))
        return f"save {save}"
    if rng.random() < 0.25:
        moment = job.begun + rng.uniform(0, _SETUP)
        return "any time" if job.wait(lambda: time.monotonic() > moment, limit) else None
    step = rng.randint(1, STEPS - 1)
    if not job.wait(lambda: job.logged() >= step, limit):
        return None
    time.sleep(rng.uniform(0, 0.05))
    return f"step {step}"


def _again(root: Path, name: str, processes: int, silence: float, limit: float) -> dict[str, Any]:
    codes = []
    for _ in range(_STARTS):
        with Job(root, name, processes, CHANGES, silence=silence) as job:
            job.gone(limit)
            codes.append(job.codes())
            said = [line for lines in job.said(0) for line in lines if line.startswith("error")]
        if set(codes[-1]) == {0}:
            return {"starts": codes, **hashes(root / name)}
    return {"starts": codes, "said": said}


def verdict(found: dict[str, Any], reference: dict[str, str], silence: float) -> str:
    """What is wrong with the result of a kill, "" for nothing."""
    if "codes" not in found:
        return "no kill before the end"
    if not found["all_gone"]:
        return "a process stayed"
    if not set(found["steps_before"][-1:]) <= set(found["steps_after"]):
        return "a checkpoint was lost"
    if any(found.get(key) != value for key, value in reference.items()):
        return "it ended otherwise"
    most = silence if found["logged"] else JOIN  # before the first step it may not have joined yet
    return "" if found["seconds"] <= most + MARGIN else "late"


MARGIN = 20.0  # seconds, with the time of a process to end, after which "gone" is late
