"""Thousands of bad inputs over all commands: what each is answered with, and whether that is what it should be.

    python benchmarks/bad_inputs.py --cases 10000 --output benchmarks/results/bad-inputs
    python benchmarks/bad_inputs.py --cases 500 --only videos weights    # some kinds alone

A case is drawn from a seed and its number: a command line, files beside it, and the outcome that it must have. Most are
bad in one known way and must be refused with exit code 2 and one line that names the value and its place, with nothing
left behind or changed; about a tenth is good and must be accepted, so that refusing everything would not pass; where
bytes were changed at random, both are right. Every worker is a process that runs many cases, one after the other; one
that hangs is killed and replaced. Results are appended to a file of lines (--resume-from; beside --output by default),
and the same command goes on where it stopped. Exits with 1 if any case was a fault.
"""

import argparse
import collections
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from bad_items import case, judge, kinds, made

from greedy_distill_jax import cli
from greedy_distill_jax.measure import environment, record
from greedy_distill_jax.ranges import Count, Natural, Positive

# Cases compile much and compute little.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
START = 120.0  # seconds that a worker has to start
GOOD = tuple(judge.GOOD.values())
del kinds  # importing them fills the table


class Worker:
    """A process that runs cases; it is started anew after a hang, a crash, or ``most`` cases."""

    def __init__(self, seed: int, folder: Path, scratch: Path, limit: float, most: int = 400):
        self._said, self._limit, self._most, self._process = folder.parent / "workers.log", limit, most, None
        command = [sys.executable, __file__, "--worker", "--seed", str(seed), "--made", str(folder)]
        self._command, self.number = [*command, "--scratch", str(scratch)], None

    def give(self, number: int) -> None:
        """Starts a case."""
        if self._process is None:
            self._start()
        self.number, self._deadline = number, time.monotonic() + self._limit + (0 if self._run else START)
        self._run += 1
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()

    def take(self, line: bool) -> dict[str, Any] | None:
        """What became of the case, if that is known; ``line``: the process wrote something, or ended."""
        found, number = None, self.number
        if line:
            text = self._process.stdout.readline()
            found = json.loads(text) if text else self._ended(judge.CRASH)
        elif time.monotonic() > self._deadline:
            found = self._ended(judge.HANG)
        if found is None:
            return None
        self.number = None
        if self._process is not None and self._run >= self._most:
            self.end()
        return {"case": number, "kind": case.kind_of(number), **found}

    def output(self) -> Any:
        """What is waited for."""
        return self._process.stdout

    def end(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _ended(self, verdict: str) -> dict[str, Any]:
        code = self._process.poll()
        self.end()
        return {"verdict": verdict, "code": code, "s": self._limit if verdict == judge.HANG else 0.0}

    def _start(self) -> None:
        self._run = 0
        with open(self._said, "a") as words:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, text=True, bufsize=1)
            self._process = subprocess.Popen(self._command, **pipes)


def work(seed: int, folder: Path, scratch: Path) -> None:
    """A worker: a number a line in, a result a line out."""
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        drawn = case.draw(seed, int(line), folder)
        found = judge.judged(drawn, folder, scratch)
        results.write(json.dumps({**found, "key": drawn.key()}) + "\n")


def results_of(numbers: list[int], workers: list[Worker]) -> Iterator[dict[str, Any]]:
    """Runs the cases; results as they come."""
    waiting = collections.deque(numbers)
    while waiting or any(worker.number is not None for worker in workers):
        for worker in workers:
            if worker.number is None and waiting:
                worker.give(waiting.popleft())
        busy = [worker for worker in workers if worker.number is not None]
        ready, _, _ = select.select([worker.output() for worker in busy], [], [], 1.0)
        for worker in busy:
            if (found := worker.take(worker.output() in ready)) is not None:
                yield found


def read(path: Path, seed: int) -> dict[int, dict[str, Any]]:
    """Results by case that are there already; see ``record.read_lines``."""
    return {result["case"]: result for result in record.read_lines(path, seed) if "case" in result}


def table(results: Mapping[int, Mapping[str, Any]]) -> tuple[str, dict[str, dict[str, int]]]:
    """Counts of verdicts by kind: as Markdown and as figures."""
    counts: dict[str, dict[str, int]] = {}
    for name in [*case.KINDS, "all"]:
        of = [r for r in results.values() if name in (r["kind"], "all")]
        verdicts = collections.Counter(r["verdict"] for r in of)
        if of:
            keys = {r.get("key", r["case"]) for r in of}
            counts[name] = {"cases": len(of), "distinct": len(keys)}
            counts[name] |= {verdict: verdicts[verdict] for verdict in (*GOOD, *judge.FAULTS)}
    header = ["kind", "cases", "distinct", *GOOD, *judge.FAULTS]
    return record.table(header, [[name, *row.values()] for name, row in counts.items()]), counts


def run(args: argparse.Namespace, lines: Path) -> dict[int, dict[str, Any]]:
    """Runs what is missing and returns all results."""
    folder = (args.workdir or Path(tempfile.gettempdir()) / "greedy_distill_jax_bad_inputs").resolve() / "made"
    scratch = Path(tempfile.mkdtemp(prefix="bad_inputs_"))
    scratch.chmod(0o755)
    numbers = [n for n in range(args.cases) if args.only is None or case.kind_of(n) in args.only]
    found = {n: r for n, r in read(lines, args.seed).items() if n in set(numbers)}
    if args.again:
        found = {n: r for n, r in found.items() if r["verdict"] in GOOD}
    environ = {"XLA_FLAGS": FLAGS, "TQDM_DISABLE": "", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    environ["JAX_COMPILATION_CACHE_DIR"] = str(folder.parent / "programs")
    os.environ.update({name: value for name, value in environ.items() if name not in os.environ})
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, __file__, "--make", "--made", str(folder)], check=True, stdout=subprocess.DEVNULL)
    workers = [Worker(args.seed, folder, scratch, args.limit) for _ in range(args.workers)]
    start, missing = time.monotonic(), [n for n in numbers if n not in found]
    lines.parent.mkdir(parents=True, exist_ok=True)
    try:
        for done, result in enumerate(results_of(missing, workers), 1):
            record.append_line(lines, {"seed": args.seed, **result})
            found[result["case"]] = result
            if result["verdict"] in judge.FAULTS:
                said = result.get("why", result["code"])
                print(f"case {result['case']} ({result['kind']}): {result['verdict']}: {said}", flush=True)
            if done % 500 == 0 or done == len(missing):
                rate = (time.monotonic() - start) / done
                print(f"{done} of {len(missing)} cases, {1e3 * rate:.0f} ms each", flush=True)
    finally:
        for worker in workers:
            worker.end()
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def main() -> int:
    """Command line."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=cli.number(Count), default=1000, help="numbers 0 to this (default: 1000)")
    parser.add_argument("--seed", type=cli.number(Natural), default=0)
    parser.add_argument("--only", nargs="+", choices=case.KINDS, metavar="KIND", help=", ".join(case.KINDS))
    parser.add_argument("--resume-from", type=Path, metavar="FILE", help="results so far, one a line")
    parser.add_argument("--again", action="store_true", help="run the faults of that file again")
    parser.add_argument("--workers", type=cli.number(Count), default=1, help="processes (default: 1)")
    parser.add_argument("--limit", type=cli.number(Positive), default=120.0, help="seconds of a case (default: 120)")
    parser.add_argument("--workdir", type=Path, help="where runs, clips and weights are made once")
    parser.add_argument("--output", type=Path, help="also write the table to this name with .md, figures with .json")
    for name, more in (("worker", "store_true"), ("make", "store_true")):
        parser.add_argument(f"--{name}", action=more, help=argparse.SUPPRESS)
    for name in ("made", "scratch"):
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.seed, args.made, args.scratch)
    if args.make:
        return made.make(args.made)
    named = args.output.with_suffix(".jsonl") if args.output else Path(tempfile.gettempdir()) / "bad_inputs.jsonl"
    found = run(args, args.resume_from or named)
    text, counts = table(found)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        seconds = sum(r["s"] for r in found.values())
        result = dict(seed=args.seed, seconds=round(seconds, 1), kinds=counts, **environment.environment())
        shown = ("case", "kind", "verdict", "code", "command", "argv")  # what was said names this machine's folders
        faults = [r for _, r in sorted(found.items()) if r["verdict"] in judge.FAULTS]
        result["faults"] = [{key: r[key] for key in shown if key in r} for r in faults]
        record.write_json(args.output.with_suffix(".json"), result)
        args.output.with_suffix(".md").write_text(f"Seed {args.seed}, {len(found)} cases.\n\n{text}\n")
    return int(any(r["verdict"] in judge.FAULTS for r in found.values()))


if __name__ == "__main__":
    cli.run(main)
