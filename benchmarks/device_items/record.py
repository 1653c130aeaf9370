"""The figures of one item: rows that are written as soon as they are done, and kept when the command runs again."""

import json
import math
import os
import platform
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

OK, WRONG, FAILED, NO_TIME, NOT_HERE = "ok", "wrong", "failed", "no time", "not here"
KEPT = (OK, NOT_HERE)  # rows that another run of the command leaves as they are


class NotHere(Exception):
    """What a row measures cannot run on this machine, or is not built yet; the message says why."""


class Record:
    """Rows of one item and their file.

    Args:
      path: of the file; what it holds is taken up again.
      seconds: until the item should be done.
      about: fields of the file that say what is measured and where.
    """

    def __init__(self, path: Path, seconds: float, about: Mapping[str, Any]):
        self.path, self._start, self._seconds = path, time.perf_counter(), seconds
        self.data: dict[str, Any] = {**about, "state": "running", "limit_s": round(seconds, 1), "rows": {}}
        before = read(path)
        if before is not None:
            self.data["rows"] = {name: row for name, row in before["rows"].items() if row["status"] in KEPT}
        self.write()

    def left(self) -> float:
        """Seconds until the item should be done."""
        return self._seconds - (time.perf_counter() - self._start)

    def row(self, name: str, work: Callable[[], Mapping[str, Any]], needs: float = 0.0) -> dict[str, Any]:
        """Does and writes one row, unless an earlier run has it.

        Args:
          name: of the row.
          work: returns ``figures`` {label with its unit: number}, ``checks`` {label: (found, limit)} and whatever else
            belongs in the file. Figures count if every check found less than its limit.
          needs: seconds without which it is not begun, at full size.

        Returns:
          The row; ``status`` says what became of it.
        """
        if name in self.data["rows"]:
            return self.data["rows"][name]
        start = time.perf_counter()
        needs *= 0.1 if self.data["size"] == "tiny" else 1.0  # little to compile, nothing to compute
        if self.left() < needs:
            row = {"status": NO_TIME, "why": f"{max(self.left(), 0):.0f} s were left and it takes about {needs:.0f}"}
        else:
            row = _judged(work)
        self.data["rows"][name] = {**row, "seconds": round(time.perf_counter() - start, 2)}
        self.write()
        print(f"{self.data['item']}: {name}: {summary(row)}", flush=True)
        return self.data["rows"][name]

    def leave_out(self, name: str, why: str) -> None:
        """A row that says why there is no figure."""
        self.row(name, lambda: _raise(NotHere(why)))

    def finish(self) -> None:
        """Every row was tried."""
        self.data["state"] = "done" if all(r["status"] in KEPT for r in self.data["rows"].values()) else "incomplete"
        self.data["wall_s"] = round(time.perf_counter() - self._start, 1)
        self.write()

    def write(self) -> None:
        """The file, at once or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)


def read(path: Path) -> dict[str, Any] | None:
    """A record; None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _raise(error: Exception):
    raise error


def _judged(work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    try:
        found = dict(work())
    except NotHere as error:
        return {"status": NOT_HERE, "why": str(error)}
    except Exception as error:  # whatever it is, the other rows do not depend on it
        frames = traceback.extract_tb(error.__traceback__)[-8:]
        trace = [f"{Path(f.filename).name}:{f.lineno} {f.name}: {f.line}" for f in frames]
        return {"status": FAILED, "why": f"{type(error).__name__}: {first_line(error)}", "traceback": trace}
    figures, checks = found.get("figures", {}), found.get("checks", {})
    bad = [f"{what} {value:.2g}, not below {limit:g}" for what, (value, limit) in checks.items() if not value < limit]
    bad += [f"{what} is {value}" for what, value in figures.items() if not math.isfinite(value)]
    if not bad:
        return {"status": OK, **found}
    found["does not count"] = found.pop("figures", {})
    return {"status": WRONG, "why": "; ".join(bad), **found}


def first_line(error: Exception, length: int = 200) -> str:
    """What an error says, in short."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:length]


def summary(row: Mapping[str, Any]) -> str:
    """A row in one line: its figures, or why there are none."""
    if row["status"] != OK:
        return f"{row['status']}: {row['why']}"
    return ", ".join(f"{label} {number(value)}" for label, value in row.get("figures", {}).items())


def number(value: float) -> str:
    """Three digits; whole numbers from 100."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def driver() -> dict[str, str]:
    """What nvidia-smi says of the first card that this process may use; {} where it says nothing."""
    if shutil.which("nvidia-smi") is None:
        return {}
    fields = ("name", "driver_version", "memory.total", "memory.free")
    fields += ("clocks.sm", "clocks.max.sm", "power.limit", "temperature.gpu")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    query += [f"--id={card}" for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[:1] if card]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = done.stdout.splitlines()
    return dict(zip(fields, (x.strip() for x in lines[0].split(",")))) if done.returncode == 0 and lines else {}


def machine() -> dict[str, Any]:
    """The host."""
    return {"python": platform.python_version(), "processors": os.cpu_count()}
