"""What a benchmark leaves: a JSON file for programs, a Markdown table for people, lines of JSON to go on from."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from greedy_distill_jax.errors import UserError


def read_lines(path: Path, seed: int, what: str = "results") -> list[dict[str, Any]]:
    """Results of earlier runs, a line each, without what a kill cut off; UserError for those of another seed."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            result = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        if result.get("seed", seed) != seed:
            raise UserError(f"{path} holds {what} of seed {result['seed']}, not {seed}; name another file.")
        found.append(result)
    return found


def append_line(path: Path, result: Mapping[str, Any]) -> None:
    """Adds a result, in a line of its own also after one that was cut off."""
    text = json.dumps(result) + "\n"
    with open(path, "a+b") as file:
        if end := file.tell():
            file.seek(end - 1)
            text = text if file.read() == b"\n" else f"\n{text}"
        file.write(text.encode())


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Writes a record to ``path``, whose folder is made; None writes nothing. What is no finite number becomes null."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_finite(result), indent=1, allow_nan=False)  # JSON has no other numbers
        path.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """A value of JSON, with None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def command_line(script: str, arguments: Sequence[str]) -> str:
    """Returns the command that a record names, as a shell takes it: of absolute paths the last piece alone.

    Where the folders of a machine lie does not matter to whoever repeats the command elsewhere.
    """

    def portable(argument: str) -> str:
        option, equals, value = argument.rpartition("=")
        return f"{option}{equals}{Path(value).name}" if value.startswith("/") else argument

    return shlex.join(["python", script, *map(portable, arguments)])


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a Markdown table; floats have three digits or none from 100 on, None is an empty cell."""

    def text(cell) -> str:
        if isinstance(cell, float):
            return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:#.3g}"
        return "" if cell is None else str(cell)

    return "\n".join(f"| {' | '.join(map(text, row))} |" for row in (header, ["---"] * len(header), *rows))
