"""metrics.json and the cells of tables: what a report's numbers are called, checked and shown as."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from greedy_distill_jax.errors import UserError

NOT_MEASURED = "not yet measured"
NOT_THERE = "\N{EN DASH}"  # the value of what a row does not have, such as the steps of real videos
TOP_KEYS = (
    "rows",
    "tables",
    "columns",
    "gates",
    "training_frames",
    "device",
    "cpu",
    "clock",
    "versions",
    "commit",
    "config",
)
GATE_KEYS = ("name", "value", "threshold", "passed")
MODELS = "rows"  # name of the table of models


def _check_keys(where: str, mapping: Any, required: Sequence[str], optional: Sequence[str] = ()) -> None:
    if not isinstance(mapping, dict):
        raise UserError(f"{where} must be a mapping with keys {', '.join(required)}, not {type(mapping).__name__}")
    for key in required:
        if key not in mapping:
            raise UserError(f"{where}: missing key {key!r}; add it (None where it was not measured)")
    for key in mapping:
        if key not in required and key not in optional:
            hint = ", put further values under 'extra'" if "extra" in optional else ""
            raise UserError(f"{where}: unknown key {key!r}; known keys are {', '.join((*required, *optional))}{hint}")


def validate_metrics(metrics: dict) -> None:
    """Checks that ``metrics`` has exactly the keys of metrics.json; values that were not measured are None.

    rows: the table of models. tables: rows of every other table by its name. columns: by table, with "rows" for that of
    models, mappings with the fields of ``suites.Column``; every row has exactly these, and their errors. gates: see
    ``GATE_KEYS``; ``passed`` is True, False or None. device, cpu, clock, versions, commit: the record of the
    environment. extra: optional, anything; ``extra["commands"]``, a list of strings, is shown with the environment.

    Raises:
      UserError: naming the key that is missing, unknown or of the wrong type.
    """
    _check_keys("metrics", metrics, TOP_KEYS, ("extra",))
    for key in ("tables", "columns", "versions", "config", "extra"):
        if key in metrics and not isinstance(metrics[key], dict):
            raise UserError(f"metrics[{key!r}] must be a mapping, not {type(metrics[key]).__name__}")
    named = {MODELS: metrics["rows"], **metrics["tables"]}
    _check_keys("metrics['columns']", metrics["columns"], tuple(named))
    for name, rows in named.items():
        where = f"metrics[{name!r}]" if name == MODELS else f"metrics['tables'][{name!r}]"
        columns = metrics["columns"][name]
        _check_rows(where, rows, [column[key] for column in columns for key in ("name", "error") if column[key]])
    _check_rows("metrics['gates']", metrics["gates"], GATE_KEYS)
    frames = metrics["training_frames"]
    if isinstance(frames, bool) or not isinstance(frames, int | np.integer) or frames < 1:
        raise UserError(f"metrics['training_frames'] must be a positive whole number, not {frames!r}")
    for gate in metrics["gates"]:
        if gate["passed"] is not None and not isinstance(gate["passed"], bool | np.bool_):
            raise UserError(f"metrics['gates']: 'passed' must be True, False or None in {gate!r}")


def _check_rows(where: str, rows: Any, keys: Sequence[str]) -> None:
    if not isinstance(rows, list | tuple):
        raise UserError(f"{where} must be a list, not {type(rows).__name__}")
    for index, row in enumerate(rows):
        _check_keys(f"{where}[{index}]", row, keys)


def plain(value: Any) -> Any:
    """Returns a value in plain JSON types; numbers that JSON cannot hold (NaN, infinity) become None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # NumPy and JAX arrays
        return plain(value.tolist())
    return value if value is None or isinstance(value, str) else str(value)


def is_missing(value: Any) -> bool:
    """Returns whether there is nothing to show: None, "", an empty list, NaN or infinity."""
    return value is None or value in ("", []) or (isinstance(value, float) and not math.isfinite(value))


def shown(value: Any, kind: str = "number") -> str:
    """Returns a cell as text; ``kind`` is one of ``suites.FORMATS``."""
    if is_missing(value):
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(item) if kind == "text" else shown(item) for item in value)
    if not isinstance(value, int | float):
        return str(value)
    if kind == "share":
        return f"{100 * value:.1f}%"
    if kind == "distance":
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
    if kind == "seconds":
        return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"
    if kind == "bytes":
        power = 0 if abs(value) < 1024 else min(4, int(math.log2(abs(value)) // 10))
        return f"{value / 1024**power:,.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4g}"


def shown_in(row: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    """Returns a row's cell as text, without unit; its standard error beside it where there is one."""
    text, kind = shown(row[column["name"]], column["format"]), column["format"]
    error = row[column["error"]] if column["error"] else None
    return text if is_missing(error) else f"{text} ±\N{NO-BREAK SPACE}{shown(error, kind)}"


def verdict(gates: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Returns (state, headline) of all gates; state is pass, fail or open."""
    failed = sum(gate["passed"] is False for gate in gates)
    unknown = sum(gate["passed"] is None for gate in gates)
    if failed:
        return "fail", f"{failed} of {len(gates)} gates failed" + (f", {unknown} not yet measured" if unknown else "")
    if unknown or not gates:
        return "open", f"{unknown} of {len(gates)} gates not yet measured" if gates else "No gate measured yet"
    return "pass", f"All {len(gates)} gates passed" if len(gates) > 1 else "The gate passed"
