"""What a benchmark leaves: a JSON file for programs and a Markdown table for people."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Writes a record to ``path``, whose folder is made; None writes nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


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
