"""How long a training takes to save and to end after SIGTERM: two processes of one run, and one alone.

    python benchmarks/stop.py --output benchmarks/results/stop

Trains the quickstart's smoke run for ever, in two processes on this machine that share its parameters, and in one. When
steps are logged, SIGTERM goes to process 1, to both half a second apart, or to the one. Seconds count from the first
signal: until the step is agreed on (process 0 says so), until its folder is begun, until it is whole, until each
process has ended. What a training adds that is not tiny: the rest of a step, one more, and its checkpoint's size over
the disk's rate. Every cell is the slowest of --repeats runs; "saved" is the step that is whole and whose arrays each
process has written. Exits with 1 if a process ended with another code than 0, or did not write that step.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from processes import Process, variables

from greedy_distill_jax import cli
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.measure import environment, record
from greedy_distill_jax.ranges import Count, Positive

CASES = {  # name -> (processes, those that are told)
    "process 1 of 2": (2, (1,)),
    "both of 2, .5 s apart": (2, (0, 1)),
    "one alone": (1, (0,)),
}
BETWEEN = 0.5  # seconds between two signals
LOGGED = 5  # steps before the first signal
CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.py"
CHANGES = ("steps=1000000", "log.every=1", "log.samples_every=0", "checkpoint.every=1000000")


def started(processes: int, workdir: Path) -> list[Process]:
    """Starts the processes of a run."""
    changes = (*CHANGES, f"mesh.fsdp={processes}", "mesh.data=1")
    command = [sys.executable, "-m", "greedy_distill_jax.train", f"--config={CONFIG}:teacher,smoke"]
    command += [f"--workdir={workdir}", *(f"--config.{change}" for change in changes)]
    return [Process(command, env) for env in variables(processes)]


def steps_in(folder: Path) -> dict[str, list[int]]:
    """Whole steps of a folder of checkpoints, by the processes whose arrays they hold: {"0": [12], "1": [12]}."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*/state/array_metadatas/process_*")):
        if path.parents[2].name.isdigit():
            found.setdefault(path.name.removeprefix("process_"), []).append(int(path.parents[2].name))
    return found


def stopped(processes: int, told: Sequence[int], workdir: Path, limit: float) -> dict[str, Any]:
    """Trains, stops, and returns what was seen, on one clock."""
    running, folder, log = started(processes, workdir), workdir / "checkpoints", workdir / "scalars.jsonl"
    until = time.monotonic() + limit
    seen: dict[str, Any] = {"sent": [], "begun": None, "whole": None}

    def check() -> None:
        early = doing != "end" and any(process.ended for process in running)
        if early or time.monotonic() > until:
            said = " / ".join(line for process in running for _, line in process.said[-2:])
            why = "ended" if early else f"did not {doing} within {limit:g} s"
            raise UserError(f"a training {why} ({said}); see to that, or give it more time with --limit.")

    def look() -> None:
        names = os.listdir(folder) if folder.exists() else []
        for key, there in (("begun", names), ("whole", [name for name in names if name.isdigit()])):
            if there and seen[key] is None:
                seen[key] = time.monotonic()

    try:
        doing = f"make {LOGGED} steps"
        while not log.exists() or log.read_bytes().count(b"\n") < LOGGED:
            check()
            time.sleep(0.05)
        for index in told:
            time.sleep(BETWEEN if seen["sent"] else 0)
            seen["sent"].append(time.monotonic())
            running[index].told(signal.SIGTERM)
        doing, until = "end", time.monotonic() + limit
        while not all(process.ended for process in running):
            look()
            check()
            time.sleep(0.005)
        look()
    finally:
        for process in running:
            process.end()
    seen |= {"said": [process.said for process in running], "ended": [process.ended for process in running]}
    return seen | {"codes": [process.code() for process in running], "steps": steps_in(folder)}


def row(seen: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds since the first signal, exit codes and saved steps of one run; None for what did not happen."""
    first = seen["sent"][0]

    def since(moment: float | None) -> float | None:
        return None if moment is None else round(moment - first, 3)

    agreed = [moment for moment, line in seen["said"][0] if line.startswith("stopping after")]
    found = {"agreed": since(agreed[0] if agreed else None), "begun": since(seen["begun"])}
    found |= {"whole": since(seen["whole"]), "ended": [since(moment) for moment in seen["ended"]]}
    found |= {"codes": list(seen["codes"]), "saved": {name: list(steps) for name, steps in seen["steps"].items()}}
    steps = {tuple(seen["steps"].get(str(index), ())) for index in range(len(seen["codes"]))}
    return found | {"good": set(seen["codes"]) == {0} and len(steps) == 1 and len(next(iter(steps))) == 1}


def table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A line per case: seconds of the slowest of its runs, exit codes and steps of all."""
    header = ["SIGTERM at", "runs", "agreed", "save begun", "step whole", "process 0 ended", "process 1 ended"]
    cells = []
    for name, runs in rows.items():
        times = [_slowest(run[key] for run in runs) for key in ("agreed", "begun", "whole")]
        for index in (0, 1):
            times.append(_slowest(run["ended"][index] if index < len(run["ended"]) else None for run in runs))
        codes = sorted({"/".join(map(str, run["codes"])) for run in runs})
        saved = ["/".join(str(step) for steps in run["saved"].values() for step in steps) or "none" for run in runs]
        cells.append([name, len(runs), *times, ", ".join(codes), ", ".join(saved)])
    return record.table([*header, "exit codes", "saved, by process"], cells)


def _slowest(values: Any) -> float | None:
    return max((value for value in values if value is not None), default=None)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=cli.number(Count), default=3, help="runs of every case (default: 3)")
    parser.add_argument("--limit", type=cli.number(Positive), default=300.0, help="seconds of a wait (default: 300)")
    parser.add_argument("--output", type=Path, help="also write the table to this name with .md, figures with .json")
    args = parser.parse_args(argv)
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, (processes, told) in CASES.items():
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory() as folder:
                found = row(stopped(processes, told, Path(folder) / "run", args.limit))
            rows.setdefault(name, []).append(found)
            print(f"{name}: {found}", flush=True)
    print(table(rows))
    if args.output:
        result = {"cases": rows, **environment.environment(), "clock": "wall time"}
        record.write_json(args.output.with_suffix(".json"), result)
        told = f"{result['device']}, {result['cpu']}; seconds from the first signal, slowest of the runs."
        text = f"{told}\n\n{table(rows)}\n"
        args.output.with_suffix(".md").write_text(text, encoding="utf-8")
    return int(not all(run["good"] for runs in rows.values() for run in runs))


if __name__ == "__main__":
    cli.run(main)
