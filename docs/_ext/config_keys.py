"""The directive ``config-keys``: a table for every group of configuration keys, from the dataclasses that declare them.

A field is a key, its annotation the type and the values it may have, its default the default, the comment on its line
what it does.
"""

import dataclasses
import inspect
import io
import itertools
import tokenize
import typing
from collections.abc import Iterator, Mapping

from docutils import nodes
from docutils.parsers.rst import Directive

from greedy_distill_jax.config import stages
from greedy_distill_jax.config.keys import Keys
from greedy_distill_jax.ranges import allowed


def comments(cls: type) -> dict[str, str]:
    """Field -> the comment on its line, or those directly above it; of the class and of those it extends."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        above, name = [], None
        tokens = list(tokenize.generate_tokens(io.StringIO(inspect.getsource(base)).readline))
        for token, following in itertools.pairwise(tokens):
            alone = not token.line[: token.start[1]].strip()
            if token.type == tokenize.NAME and alone and following.string == ":":
                name, found[token.string], above = token.string, " ".join(above), []
            elif token.type == tokenize.COMMENT and alone:
                above.append(token.string.lstrip("# "))
            elif token.type == tokenize.COMMENT and name:
                found[name] = f"{found[name]} {token.string.lstrip('# ')}".strip()
            elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT) and alone:
                above = []
    return {field.name: found.get(field.name, "") for field in dataclasses.fields(cls)}


def groups() -> Iterator[tuple[str, str, list[tuple[str, str, str, str]]]]:
    """(path of the group, its docstring, [(key, default, values, comment)]), the shared keys first."""

    def walk(path: str, keys):
        cls, rows, below = type(keys), [], []
        hints = typing.get_type_hints(cls, include_extras=True)
        for name, comment in comments(cls).items():
            value, full = getattr(keys, name), f"{path}.{name}"
            if dataclasses.is_dataclass(value):
                below.append((full, value))
                continue
            if isinstance(value, Mapping):
                value = ", ".join(value)
            rows.append((full, "" if value is None else repr(value), allowed(hints[name]), comment))
        yield path, inspect.getdoc(cls) or "", rows
        for child in below:
            yield from walk(*child)

    yield from walk("config", Keys())
    for name, group in stages.groups().items():
        yield from walk(f"config.{name}", group())


def _text(comment: str) -> nodes.paragraph:
    """A paragraph in which `code` and ``code`` are set as such."""
    paragraph = nodes.paragraph()
    for i, part in enumerate(comment.replace("``", "`").split("`")):
        paragraph += nodes.literal(part, part) if i % 2 else nodes.Text(part)
    return paragraph


def _table(rows: list[tuple[str, str, str, str]]) -> nodes.table:
    body, head = nodes.tbody(), nodes.thead()
    columns = [nodes.colspec(colwidth=width) for width in (26, 16, 18, 40)]
    out = nodes.table("", nodes.tgroup("", *columns, head, body, cols=4), classes=["colwidths-given"])
    for place, cells in [(head, ("key", "default", "values", "")), *((body, row) for row in rows)]:
        row = nodes.row()
        for i, cell in enumerate(cells):
            code = place is body and i < 2 and cell
            row += nodes.entry("", nodes.paragraph("", "", nodes.literal(cell, cell)) if code else _text(cell))
        place += row
    return out


class ConfigKeys(Directive):
    """Sections with the tables of all groups."""

    def run(self) -> list[nodes.Node]:
        """The sections, in the order of the source."""
        out = []
        for path, doc, rows in groups():
            section = nodes.section("", nodes.title(path, path), ids=[path.replace(".", "-").replace("_", "-")])
            section += [_text(doc.splitlines()[0]), _table(rows)]
            out.append(section)
        return out


def setup(app):
    """Registers the directive."""
    app.add_directive("config-keys", ConfigKeys)
    return {"parallel_read_safe": True}
