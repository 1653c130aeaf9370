"""Everything there is to measure on an accelerator, in one command that needs no thought on the day.

    python benchmarks/device.py --minutes 8 --output runs/device         # a GPU: 1.3B
    JAX_PLATFORMS=cpu python benchmarks/device.py --size tiny --output /tmp/device

Seven items in this order: ceilings of the card, correctness, streaming, the same stream in PyTorch, the attention op,
training steps, a profile. Each is a process of its own with a share of the time; what it leaves goes to the next ones.
A row of an item is written to OUTPUT/N-ITEM.json when it is done; the command goes on where it stopped, row by row, and
prints one table last (OUTPUT/table.md). First it says what it needs and what is there, and refuses (exit code 2) where
a package, a device or its memory is missing. A figure counts if it was checked in the same run, on random data; rows
that could not be measured say why. Exits with 1 if a row failed, was wrong, or found no time left.

Where the package is not installed, PYTHONPATH has to name the checkout; beyond what images for jax and PyTorch usually
have it imports ml-collections, grain (which needs portpicker), array_record and av. Expect a quarter of an hour on an
H100, in one run or in several into the same folder; PyTorch under torch.compile is measured only where --only
torch_peer has several minutes for itself.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from device_items import needs, record as records

from greedy_distill_jax import cli
from greedy_distill_jax.errors import UserError

ITEMS = ("ceilings", "correctness", "streaming", "torch_peer", "attention", "training", "trace")
SECONDS = dict(zip(ITEMS, (20, 60, 170, 60, 110, 120, 45)))  # shares of the time
SIZES = {"tiny": "tiny", "1_3b": "wan1_3b"}
WITH_TORCH = ("torch_peer", "attention")  # leave PyTorch memory on the card
SPARE = 4.0  # seconds that an item keeps for its end
TOLD = 1500  # characters of a failed process's last words


def path_of(output: Path, item: str) -> Path:
    """The file of an item."""
    return output / f"{ITEMS.index(item) + 1}-{item}.json"


def measure(item: str, args: argparse.Namespace, seconds: float) -> None:
    """Runs one item in its own process and makes sure that its file says how that ended."""
    path = path_of(args.output, item)
    command = [sys.executable, __file__, "--item", item, "--size", args.size, "--output", str(args.output)]
    command += ["--seconds", str(max(seconds - SPARE, 1.0)), "--commit", args.commit]
    # Memory that jax takes at once is one piece: what a row frees is there for a larger array of the next one.
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false" if item in WITH_TORCH else "true"}
    env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6" if item in WITH_TORCH else needs.FRACTION)
    env.setdefault(
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0"
    )  # the drawing of weights: dozens of small programs
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "greedy_distill_jax_device"))
    why = ""
    with tempfile.TemporaryFile("w+") as words:
        child = subprocess.Popen(command, env=env, stderr=words, start_new_session=True)
        try:
            code = child.wait(timeout=seconds)
            why = f"the process ended with {code}" if code else ""
        except subprocess.TimeoutExpired:
            why = f"stopped after {seconds:.0f} s, its limit"
        finally:  # also where this command is interrupted; compilers and the CPU's process are in the group
            _stop(child)
        words.seek(0)
        told = words.read()[-TOLD:]
    if why:
        data = records.read(path) or {"item": item, "size": args.size, "rows": {}}
        path.write_text(json.dumps({**data, "state": "stopped", "why": why, "stderr": told}, indent=1) + "\n")
        print(f"{item}: {why}", flush=True)


def _stop(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def item_process(args: argparse.Namespace) -> None:
    """What runs in an item's own process."""
    from greedy_distill_jax.measure import clock, environment

    clock.one_thread()
    found = environment.environment()
    found["versions"] |= needs.versions()
    about = {"item": args.item, "size": SIZES[args.size], **found, "commit": args.commit or found["commit"]}
    about |= {"card": records.driver(), "host": records.machine()}
    record = records.Record(path_of(args.output, args.item), args.seconds, about)
    importlib.import_module(f"device_items.{args.item}").run(record)
    record.finish()


def same_run(args: argparse.Namespace) -> None:
    """Refuses to go on with figures of another size or commit."""
    for item in ITEMS:
        data = records.read(path_of(args.output, item)) or {}
        for name, mine in (("size", SIZES[args.size]), ("commit", args.commit)):
            if mine and data.get(name, mine) != mine:
                raise UserError(f"--output {args.output} holds figures of {name} {data[name]}; choose another folder.")


def table(output: Path) -> tuple[str, bool]:
    """(the table of what there is, whether all of it is there)."""
    lines, complete = ["| item | row | figures |", "| --- | --- | --- |"], True
    for item in ITEMS:
        data = records.read(path_of(output, item))
        if data is None:
            continue
        if "card" in data and len(lines) == 2:
            versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
            driver = data["card"].get("driver_version", "none")
            head = [f"{data['device']}, driver {driver}; {versions}; commit {data['commit']}; {data['clock']}", ""]
            lines = head + lines
        for name, row in data["rows"].items():
            lines.append(f"| {item} | {name} | {records.summary(row).replace('|', '/')} |")
            complete &= row["status"] in records.KEPT
        if data["state"] != "done":
            complete = False
            lines.append(f"| {item} | | {data['state']}: {data.get('why', 'rows above')} |")
    return "\n".join(lines), complete


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python benchmarks/device.py", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="of all items together (8)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the figures; goes on with what it holds")
    parser.add_argument("--size", choices=SIZES, default="1_3b")
    parser.add_argument("--only", choices=ITEMS, nargs="+", default=ITEMS, metavar="ITEM", help=", ".join(ITEMS))
    parser.add_argument("--commit", default="", help="what the figures are of, where no git checkout says it")
    parser.add_argument("--item", choices=ITEMS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str]) -> int:
    """Command line."""
    args = _parser().parse_args(argv)
    if args.item:
        item_process(args)
        return 0
    if not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes}: must be positive.")
    same_run(args)
    begun = {item: records.read(path_of(args.output, item)) or {} for item in args.only}
    todo = [item for item in ITEMS if item in args.only and begun[item].get("state") != "done"]
    if todo and (missing := needs.missing(args.size, todo)):
        raise UserError(missing)
    end = time.perf_counter() + 60 * args.minutes
    for number, item in enumerate(todo):
        left = end - time.perf_counter()
        share = SECONDS[item] / sum(SECONDS[later] for later in todo[number:])
        measure(item, args, max(left * share, 1.0))
    text, complete = table(args.output)
    (args.output / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if complete else 1


if __name__ == "__main__":
    cli.run(main)
