"""Text files that users write: UTF-8 text, and CSV tables whose every row is checked."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from greedy_distill_jax.errors import UserError

_DELIMITERS = {",": "','", ";": "';'", "\t": "tabs"}


def read_text(path: str | os.PathLike, field: str) -> str:
    """Returns the text of a UTF-8 file, with or without a byte order mark, its line ends as they are.

    Args:
      path: of the file.
      field: name of the argument that `path` came from.

    Raises:
      UserError: a file that cannot be read, bytes that are not UTF-8 or NUL; those are named with their line.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a UTF-8 file", field) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        rest = error.object  # without the mark, which `start` does not count
        line = rest[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path} line {line} cannot be read (byte 0x{rest[error.start]:02x} is not UTF-8); save the file as UTF-8",
            field,
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{path} line {line} holds a NUL byte; save the file as UTF-8 text", field)
    return text


def read_table(
    path: str | os.PathLike, known: Collection[str], field: str
) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Reads a CSV file with a header.

    Fields are separated by commas, semicolons or tabs: by what lets the header name most of the known columns. A note
    on standard error says so unless it is commas. White space around names and fields is not part of them; everything
    else in a quoted field is, line ends too.

    Args:
      path: of the file, in UTF-8.
      known: names of the columns that the caller reads.
      field: name of the argument that `path` came from.

    Returns:
      (the names of the columns, (number of its first line, name -> field) of every row; empty lines are no rows).

    Raises:
      UserError: as `read_text`, a column named twice, a row with another number of fields than the header, quotes that
        do not match, a field that is too long for `csv`.
    """
    text = read_text(path, field)
    mark = max(_DELIMITERS, key=lambda mark: len(set(_header(text, mark)) & set(known)))
    rows = _rows(path, text, mark, field)
    first, header = next(rows, (1, []))
    names, table = [name.strip() for name in header], []
    for name in names:
        if name and names.count(name) > 1:
            raise UserError(f"{path} line {first} names the column {name!r} twice; keep one", field)
    for line, row in rows:
        if len(row) != len(names):
            raise UserError(
                f"{path} line {line}: the header has {len(names)} fields, this row {len(row)}; give as many, in quotes "
                f"those that hold {_DELIMITERS[mark]}",
                field,
            )
        table.append((line, dict(zip(names, (value.strip() for value in row), strict=True))))
    if mark != ",":
        print(f"note: {path}: fields are separated by {_DELIMITERS[mark]}, as in its first line.", file=sys.stderr)
    return names, table


def _header(text: str, mark: str) -> list[str]:
    """Names of the columns if `mark` separates them; whether quotes match is for `_rows` to say."""
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=True)
        return [name.strip() for name in next((row for row in rows if row), [])]
    except csv.Error:
        return []


def _rows(path: str | os.PathLike, text: str, mark: str, field: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, fields) of every row that is not empty."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=True, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path} line {line}: {_told(error)}", field) from error
        if row:
            yield line, row


def _told(error: csv.Error) -> str:
    reason = str(error)
    if "unexpected end" in reason:
        return 'a quote opens and is never closed; close it, or write "" for a quote inside quotes'
    if "field limit" in reason:
        return f"a field has more than {csv.field_size_limit()} characters; shorten it, or close the quote before it"
    return f'{reason}; put quotes around whole fields, and write "" for a quote inside them'
