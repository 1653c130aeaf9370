"""What happens to a training of several processes when some of it fails, on this machine.

    python benchmarks/faults.py --kills 100 --output benchmarks/results/faults

A tiny training over 1, 2 and 4 processes is killed (SIGKILL) at random moments, at one process or at all, half of them
aimed into a save, and started again by the same command, which is killed again, four times in all. After each kill all
processes have to be gone within the time after which silence counts (--silence) and that of an end, no checkpoint may
be lost, and each has to be, bit for bit, that of the run that nobody disturbed with as many processes; so has the run
that ends. Then other faults happen to one of two processes: what each says, how it ends, seconds until all are gone.
And a run of two processes goes on with 1, 2 and 4 on other meshes: how far its losses and its average are from those of
an undisturbed one. And every stage makes its first updates, and a student streams, on meshes whose axes span two
processes with two devices each, and on the same meshes in one process: how far loss and update are from those of one
device. Results are appended to a file of lines (--resume-from; beside --output by default) with commit, versions and
--silence, and the same command goes on where it stopped. Exits with 1 if anything was not as it should be.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from fault_items import kills, lines, moves, others, spans

from greedy_distill_jax import cli
from greedy_distill_jax.measure import environment, record
from greedy_distill_jax.ranges import Natural, Positive

PARTS = ("kills", "faults", "moves", "spans")
KEPT = ("half", "whole", "spans")  # in --folder: what a later call goes on from, and compares with


def missing(args: argparse.Namespace, found: Mapping[tuple[str, Any], Any]) -> Iterator[tuple[str, Any]]:
    """What is still to be run, in this order; ``found`` may grow meanwhile."""
    if "kills" in args.only and args.kills:
        yield from (key for key in (("undisturbed", count) for count in kills.PROCESSES) if key not in found)
        for number in range(args.kills):  # a run that ends too early has fewer kills
            if sum(len(x["kills"]) for (kind, _), x in found.items() if kind == "run") >= args.kills:
                break
            if ("run", number) not in found:
                yield "run", number
    wanted = [("fault", name) for name in others.FAULTS if "faults" in args.only]
    wanted += [("move", name) for name in moves.MESHES if "moves" in args.only]
    wanted += [("span", (case, way)) for case in spans.CASES for way in spans.SPREAD if "spans" in args.only]
    yield from (key for key in wanted if key not in found)


def run(root: Path, key: tuple[str, Any], args: argparse.Namespace, results: Mapping[Any, Any]) -> dict[str, Any]:
    """Runs one of ``missing``."""
    kind, name = key
    times = args.silence, args.limit
    if kind == "undisturbed":
        return {"undisturbed": name, **kills.undisturbed(root, name, *times)}
    if kind == "run":
        whole = {count: results["undisturbed", count] for count in kills.PROCESSES}
        return kills.killed(root, args.seed, name, whole, *times)
    if kind == "fault":
        return others.happened(root, name, *times)
    if kind == "span":
        return spans.spanned(root / "spans", *name, args.limit)
    if not (root / "whole" / "checkpoints" / str(moves.STEPS)).exists():
        moves.begun(root, *times)
    return moves.moved(root, name, *times)


def forget(root: Path, commit: str | None) -> None:
    """Removes what another commit, or one that is not known, has left to compare with; writes down this one."""
    made_by = root / "commit"
    if commit and made_by.is_file() and made_by.read_text(encoding="utf-8") == commit:
        return
    for name in KEPT:
        shutil.rmtree(root / name, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    made_by.write_text(commit or "", encoding="utf-8")


def summary(results: Mapping[tuple[str, Any], Mapping[str, Any]], given: float) -> tuple[str, list[str]]:
    """Tables of all results, and what was not as it should be.

    Args:
      results: by kind and name.
      given: SILENCE_TIMEOUT of those that do not record it.
    """
    of = {kind: {name: x for (k, name), x in results.items() if k == kind} for kind, _ in results}
    tables, bad = [], []
    if runs := of.get("run"):
        cells = []
        for count in kills.PROCESSES:
            mine = [found for found in runs.values() if found["processes"] == count]
            verdicts = {x["run"]: kills.verdict(x, of["undisturbed"][count], x.get("silence", given)) for x in mine}
            bad += [f"run {number}: {line}" for number, verdict in verdicts.items() for line in verdict]
            made = [kill for found in mine for kill in found["kills"]]
            inside = sum(kill["inside_save"] for kill in made)
            codes = sorted({code for kill in made for code in kill["codes"] if code not in (None, -9)})
            slowest = max((kill["seconds"] for kill in made), default=None)
            equal = sum(not verdict for verdict in verdicts.values())
            cells.append([count, len(made), inside, len(mine), equal, ", ".join(map(str, codes)), slowest])
        header = ["processes", "kills", "inside a save", "runs", "as undisturbed, bit for bit", "codes of the others"]
        tables.append(record.table([*header, "seconds until all were gone, at most"], cells))
    if faults := of.get("fault"):
        header = ["fault", "process 0 ends with", "and says", "process 1 ends with", "and says"]
        tables.append(record.table([*header, "seconds until all were gone"], others.rows(faults)))
        bad += [f"{name}: {found['codes']}" for name, found in faults.items() if not found["good"]]
    if moved := of.get("move"):
        cells = [[name, f"{x['losses']:.1e}", f"{x['average']:.1e}"] for name, x in moved.items()]
        header = ["begun with 2 processes (data 2, fsdp 2), goes on with", "losses, apart", "average, apart"]
        tables.append(record.table(header, cells))
        bad += [f"{name}: apart by {max(x['losses'], x['average'])}" for name, x in moved.items() if not x["good"]]
    if spanned := of.get("span"):
        cells = [[*name, f"{x['update']:.1e}", f"{x['scalars']:.1e}"] for name, x in spanned.items()]
        header = ["stage, axis", "processes x devices", "update, apart from one device", "losses, apart"]
        tables.append(record.table(header, cells))
        bad += [
            f"{' '.join(name)}: apart by {max(x['update'], x['scalars'])}"
            for name, x in spanned.items()
            if not x["good"]
        ]
    return "\n\n".join(tables), bad


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=cli.number(Natural), default=100, help="at least so many (default: 100)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some parts alone (default: all)")
    parser.add_argument("--tables", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--seed", type=cli.number(Natural), default=0, help="of the moments (default: 0)")
    parser.add_argument("--silence", type=cli.number(Positive), default=15.0, help="SILENCE_TIMEOUT (default: 15)")
    parser.add_argument("--limit", type=cli.number(Positive), default=600.0, help="seconds of a wait (default: 600)")
    parser.add_argument("--resume-from", type=Path, help="file of results (default: beside --output)")
    parser.add_argument("--folder", type=Path, help="keeps runs of this commit and compiled programs, for the next")
    parser.add_argument("--output", type=Path, help="write tables to this name with .md, figures with .json")
    args = parser.parse_args(argv)
    path = args.resume_from or (args.output and args.output.with_suffix(".lines.jsonl"))
    results = lines.read(path, args.seed) if path else {}
    here = {"silence": args.silence, **environment.environment()}
    here = {name: here[name] for name in lines.MADE_BY}
    with tempfile.TemporaryDirectory() as folder:
        root = args.folder or Path(folder)
        if not args.tables:
            forget(root, here["commit"])
        for key in () if args.tables else missing(args, results):
            results[key] = found = {**run(root, key, args, results), **here}
            print(json.dumps(found), flush=True)
            if path:
                record.append_line(path, found)
    tables, bad = summary(results, args.silence)
    print(tables, *bad, sep="\n")
    if args.output:
        made, told = lines.made_by(list(results.values()))
        command = record.command_line("benchmarks/faults.py", sys.argv[1:] if argv is None else argv)
        result = {"command": command, "results": list(results.values()), "bad": bad, **made, "clock": "wall time"}
        record.write_json(args.output.with_suffix(".json"), result)
        text = "\n\n".join([*told, tables]) + "\n"
        args.output.with_suffix(".md").write_text(text, encoding="utf-8")
    return int(bool(bad))


if __name__ == "__main__":
    cli.run(main)
