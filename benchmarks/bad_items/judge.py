"""Runs one case in this process, or in one of its own, and says how it ended."""

import contextlib
import gc
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bad_items.case import ACCEPTED, CODES, DIVERGED, EITHER, REFUSED, THEIRS, Case
from bad_items.made import listing
from greedy_distill_jax import cli

# Verdicts; those from TRACEBACK on are faults.
GOOD = {
    REFUSED: "refused well",
    ACCEPTED: "accepted",
    EITHER: "either",
    THEIRS: "their traceback",
    DIVERGED: "diverged",
}
TRACEBACK, HANG, CRASH, WRONG_ZERO = "traceback", "hang", "crash", "wrong exit 0"
CONTROL_REFUSED, OTHER_CODE, SAID_BADLY, LEFT_OVERS = "control refused", "other code", "said badly", "left-overs"
FAULTS = (TRACEBACK, HANG, CRASH, WRONG_ZERO, CONTROL_REFUSED, OTHER_CODE, SAID_BADLY, LEFT_OVERS)
LONGEST = 700  # characters of a line, besides those of the arguments
NOBODY = 65534


def put(case: Case, here: Path) -> None:
    """Writes the files, folders and links of a case."""
    here.mkdir(parents=True)
    for name, content in case.files.items():
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(exist_ok=True)
        elif isinstance(content, str):
            path.symlink_to(content.removeprefix("@"))
        else:
            path.write_bytes(content)


def contents(here: Path) -> dict[str, Any]:
    """Every path below a folder, with the content of files."""
    found: dict[str, Any] = {}
    for parent, folders, files in os.walk(here):
        for name in folders:
            found[os.path.relpath(os.path.join(parent, name), here)] = None
        for name in files:
            path = os.path.join(parent, name)
            data = os.readlink(path) if os.path.islink(path) else Path(path).read_bytes()
            found[os.path.relpath(path, here)] = data
    return {name: data for name, data in found.items() if "__pycache__" not in name}


@contextlib.contextmanager
def redirected(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Output of this process, of its libraries too, goes to two files."""
    out, err = folder / "out", folder / "err"
    kept = [os.dup(1), os.dup(2)]
    streams = sys.stdout, sys.stderr
    with open(out, "w+", errors="backslashreplace") as first, open(err, "w+", errors="backslashreplace") as second:
        os.dup2(first.fileno(), 1)
        os.dup2(second.fileno(), 2)
        # As the streams of a command are: what cannot be encoded is an error on one and escaped on the other.
        sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="strict")
        sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        try:
            yield out, err
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.close()
            sys.stdout, sys.stderr = streams
            for number, descriptor in enumerate(kept, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)


@contextlib.contextmanager
def as_found(case: Case, here: Path) -> Iterator[None]:
    """The process as a command finds it, and afterwards as it was."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    folder, modules, argv = os.getcwd(), set(sys.modules), sys.argv
    paths = list(sys.path)
    os.chdir(here)
    dropped = case.unprivileged and os.geteuid() == 0
    if dropped:
        os.seteuid(NOBODY)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        if dropped:
            os.seteuid(0)
        os.chdir(folder)
        sys.argv, sys.path[:] = argv, paths
        for name in set(sys.modules) - modules:
            if name.startswith("_user_"):
                del sys.modules[name]
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _called(case: Case, argv: list[str], here: Path) -> tuple[int | str, str]:
    """(exit code or the name of an exception, its traceback)."""
    main = importlib.import_module(f"greedy_distill_jax.{case.command}").main
    try:
        sys.argv = [f"python -m greedy_distill_jax.{case.command}", *argv]
        cli.run(main, argv)
    except SystemExit as end:
        return end.code, ""
    except BaseException as error:
        return type(error).__name__, traceback.format_exc()


def _started(case: Case, argv: list[str], here: Path, folder: Path) -> tuple[int | str, str, str]:
    """The same in a process of its own: (exit code, traceback, what it said)."""
    command = [sys.executable, "-m", f"greedy_distill_jax.{case.command}", *argv]
    done = subprocess.run(command, env={**os.environ, **case.env}, cwd=here, capture_output=True, text=True)
    trace = done.stderr if "Traceback" in done.stderr else ""
    return "traceback" if trace else done.returncode, trace, done.stderr


def judged(case: Case, made: Path, scratch: Path) -> dict[str, Any]:
    """Runs a case; returns its verdict, and what is to be known of one that is a fault."""
    here = Path(tempfile.mkdtemp(dir=scratch))
    here.chmod(0o755)
    folder, here = here, here / "case"
    say = {"{here}": str(here), "{made}": str(made)}

    def real(text: str) -> str:
        return re.sub(r"\{(here|made)\}", lambda found: say[found[0]], text)

    argv = [real(argument) for argument in case.argv]
    files = {
        name: real(content.decode()).encode()
        if isinstance(content, bytes) and name.endswith(".py") and _is_text(content)
        else content
        for name, content in case.files.items()
    }
    put(Case(case.command, case.argv, files=files), here)
    before, stored = contents(here), listing(made)
    start = time.perf_counter()
    if case.env:
        code, trace, said = _started(case, argv, here, folder)
    else:
        with redirected(folder) as (_, err), as_found(case, here):
            code, trace = _called(case, argv, here)
        said = err.read_text(errors="replace")
    seconds = time.perf_counter() - start
    needs = tuple(tuple(real(word) for word in words) for words in case.needs)
    after = contents(here)
    changed = sorted(name for name in {*before, *after} if before.get(name, 0) != after.get(name, 0))
    lost = [name for name, of in listing(made).items() if stored.get(name) != of]
    verdict, why = _verdict(case, code, trace, said, needs, changed, lost, here)
    shutil.rmtree(folder, ignore_errors=True)
    gc.collect(0)
    result = {"verdict": verdict, "expect": case.expect, "code": code, "s": round(seconds, 3)}
    if verdict in FAULTS:
        shown = re.sub(r"\r[^\r\n]*", "", said)[-1500:]
        result |= {"why": why, "command": case.command, "argv": list(case.argv), "said": shown}
        result |= {"trace": trace[-3000:]} if trace else {}
    return result


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _verdict(case, code, trace, said, needs, changed, lost, here) -> tuple[str, str]:
    if (here / "executed").exists():
        return WRONG_ZERO, "code of a data file was run"
    if lost:
        return LEFT_OVERS, f"changed an input: {lost[0]}"
    if trace:
        theirs = case.expect == THEIRS and str(here) in trace
        return (GOOD[THEIRS], "") if theirs else (TRACEBACK, trace.strip().splitlines()[-1][:300])
    if code not in CODES[case.expect]:
        if code == 0:
            return WRONG_ZERO, f"expected: {case.expect}"
        return (CONTROL_REFUSED if case.expect == ACCEPTED else OTHER_CODE), f"{code}, expected: {case.expect}"
    if code == 0:
        return _of_accepted(case, changed, here)
    wrong = _said_badly(case, said, needs)
    if wrong:
        return SAID_BADLY, wrong
    if changed and case.expect != DIVERGED:
        return LEFT_OVERS, f"left or changed: {', '.join(changed[:4])}"
    return GOOD[case.expect], ""


def _of_accepted(case: Case, changed: list[str], here: Path) -> tuple[str, str]:
    partial = [name for name in changed if name.endswith(".partial") or ".replaced" in name]
    if partial:
        return LEFT_OVERS, f"left: {partial[0]}"
    if case.skipped:
        info = json.loads((here / "out" / "dataset.json").read_text())
        if case.skipped not in [clip["clip"] for clip in info["skipped"]]:
            return WRONG_ZERO, f"{case.skipped} was not skipped"
    return GOOD[case.expect], ""


def _said_badly(case: Case, said: str, needs: tuple[tuple[str, ...], ...]) -> str:
    """What is wrong with the words of a refusal; "" if nothing is."""
    lines = [line for line in re.sub(r"[^\n]*\r(?!\n)", "", said).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if len(errors) != 1:
        return f"{len(errors)} lines of error"
    (line,) = errors
    if len(line) > LONGEST + sum(map(len, case.argv)):
        return f"a line of {len(line)} characters"
    for words in needs:
        if not any(" ".join(word.split()) in line for word in words):
            return f"none of {words!r} is in the line"
    return ""
