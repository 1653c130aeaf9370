"""What an evaluation measures: a suite is one record in one file, and one row of ``_FILES``.

A suite says which columns it fills, measures a ``Comparison`` and says what the figures must reach. The report draws
the columns and plots that it is handed; it knows no suite by name. ``resolve`` finds a suite by name: one of this
package, one given to ``register``, "package.module:NAME" or "path/to/file.py:NAME".
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from greedy_distill_jax.cli.extensions import FORMS, load
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval.comparison import Comparison

FORMATS = ("text", "count", "share", "distance", "seconds", "bytes", "number")
BETTER = ("", "higher", "lower", "data")
Number = float | int


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
      name: key of its values in the rows and in metrics.json.
      label: heading.
      text: what the values are, in sentences.
      unit: such as "px" or "dB"; "" for none.
      format: how a value is shown, one of ``FORMATS``: "share" is a fraction, "distance" has three decimals.
      better: which way is good: "higher", "lower", "data" (close to the row of real videos), "" where none is.
      error: key of the values' standard errors in the rows, which are shown beside them; "" for none.
    """

    name: str
    label: str
    text: str = ""
    unit: str = ""
    format: str = "number"
    better: str = ""
    error: str = ""

    def __post_init__(self):
        if self.format not in FORMATS or self.better not in BETTER:
            raise ValueError(
                f"column {self.name!r}: format {self.format!r} must be one of {FORMATS}, better {self.better!r} one of "
                f"{BETTER}"
            )


def keys_of(column: Column) -> list[str]:
    """Returns the keys that a column has in the rows: of its values, and of their standard errors."""
    return [key for key in (column.name, column.error) if key]


@dataclasses.dataclass(frozen=True)
class Plot:
    """Lines over a common axis, as numbers.

    Attributes:
      title, text: above the drawing; ``text`` says what is shown and which way is good.
      x_label, y_label: of the axes.
      lines: values by label; None or nan where nothing was measured.
      x: positions of the values; None for 0, 1, ...
      x_end: the axis reaches at least to here.
      y_limits: of the axis, used if no value lies outside; None for what the values need.
      marker: (position, words) of a vertical line.
      log: "" for linear axes, "y", "xy", or "wide" for a logarithmic y axis where values spread over a factor of 20.
      points: a dot at every value.
      smooth: long lines are drawn as moving averages over the faint values.

    Raises:
      ValueError: a line that does not have a value for every x.
    """

    title: str
    text: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[Number | None]]
    x: Sequence[Number] | None = None
    x_end: Number | None = None
    y_limits: tuple[Number, Number] | None = None
    marker: tuple[Number, str] | None = None
    log: str = ""
    points: bool = False
    smooth: bool = False

    def __post_init__(self):
        for label, values in self.lines.items():
            if self.x is not None and len(self.x) != len(values):
                raise ValueError(f"plot {self.title!r}: {label!r} has {len(values)} values for {len(self.x)} positions")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a suite found.

    Attributes:
      rows: values by column name; a suite ``of_models`` has one row per entry, with its "name". Columns that no row
        has are not shown.
      plots: of its section of the page.
      note: how it was measured, one line.
      summary: a last line under the table, shown and not stored: text by column name.
    """

    rows: Sequence[Mapping[str, Any]]
    plots: Sequence[Plot] = ()
    note: str = ""
    summary: Mapping[str, str] | None = None


def no_gates(measured: Measured, comparison: Comparison) -> list[dict[str, Any]]:
    """Returns no gate: the figures are for reading."""
    return []


def always(comparison: Comparison) -> bool:
    """Returns True: every comparison has what the suite needs."""
    return True


@dataclasses.dataclass(frozen=True)
class Suite:
    """A measurement of a comparison.

    Attributes:
      name: of its table in metrics.json.
      title, text: of its section of the page.
      columns: of its rows; with ``of_models`` they join the table of models, else the first one heads the rows of a
        table of its own.
      measure: takes the comparison.
      gates: takes what was measured and the comparison; returns claims made by ``gates.gate``.
      applies: whether a comparison has what the suite needs.
      of_models: its rows are the entries of the comparison.
    """

    name: str
    title: str
    text: str
    columns: tuple[Column, ...]
    measure: Callable[[Comparison], Measured]
    gates: Callable[[Measured, Comparison], list[dict[str, Any]]] = no_gates
    applies: Callable[[Comparison], bool] = always
    of_models: bool = False


def measure(suite: Suite, comparison: Comparison) -> Measured:
    """What a suite finds of a comparison.

    Raises:
      UserError: with field "suites": it returned something else, or rows that are not one per entry. What its own code
        raises passes as it is.
    """
    found, place = suite.measure(comparison), f"suite {suite.name!r}: measure() returned"
    if not isinstance(found, Measured):
        raise UserError(f"{place} a {type(found).__name__}; return an eval.suites.Measured.", "suites")
    if not all(isinstance(row, Mapping) for row in found.rows):
        raise UserError(f"{place} rows that are no dictionaries; give values by the names of the columns.", "suites")
    known = {key for column in suite.columns for key in keys_of(column)} | ({"name"} if suite.of_models else set())
    for row in found.rows:
        extra = sorted(set(row) - known)
        if extra:
            raise UserError(f"{place} {extra[0]!r}, which is none of its columns; add a Column of that name.", "suites")
        if suite.of_models and row.get("name") not in comparison.entries:
            raise UserError(
                f"{place} a row named {row.get('name')!r}; of_models has a row per entry: "
                f"{', '.join(comparison.entries)}.",
                "suites",
            )
    return found


def claims_of(suite: Suite, found: Measured, comparison: Comparison) -> list[dict[str, Any]]:
    """The gates of what a suite measured; UserError (field "suites") where they are not ones of ``gates.gate``."""
    out = suite.gates(found, comparison)
    keys = {"name", "value", "threshold", "passed"}
    if not isinstance(out, list | tuple) or not all(isinstance(gate, Mapping) and set(gate) == keys for gate in out):
        raise UserError(f"suite {suite.name!r}: gates() returned {out!r}; return a list of gates.gate(...).", "suites")
    return list(out)


# In the order of the page: file of this package whose SUITE it is.
_FILES = ("moving_shapes", "refreshed_history", "next_frame", "time_per_frame", "cache_bytes")
_REGISTERED: dict[str, Suite] = {}


def register(suite: Suite) -> Suite:
    """Makes a suite of your own part of every evaluation that does not choose its suites."""
    _REGISTERED[suite.name] = suite
    return suite


def suite_names() -> list[str]:
    """Returns the names that need no path, in the order of the page."""
    return list(dict.fromkeys([*_FILES, *_REGISTERED]))


def resolve(name: str) -> Suite:
    """Returns the suite behind a name.

    Raises:
      UserError: with field "suites", for a name that is unknown or a path that leads to no suite.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name in _FILES:
        return importlib.import_module(f"greedy_distill_jax.eval.{name}").SUITE
    if ":" not in name:
        raise UserError(f"{name!r} is no suite; choose from {', '.join(suite_names())}, or give {FORMS}.", "suites")
    suite = load(name, field="suites")
    if not isinstance(suite, Suite):
        raise UserError(f"{name!r} is a {type(suite).__name__}; give an eval.suites.Suite.", "suites")
    return suite
