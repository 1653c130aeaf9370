"""What a user wrote outside the package, by the name that a configuration or an option gives it."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from greedy_distill_jax import ranges
from greedy_distill_jax.errors import UserError

FORMS = "'package.module:NAME' or 'file.py:NAME'"


def execute(file: Path) -> ModuleType:
    """Runs a Python file anew and returns it as a module, whose dataclasses find it under its name."""
    spec = importlib.util.spec_from_file_location(f"_user_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load(name: str, *, kind: str = "", field: str = "") -> Any:
    """Returns what ``name`` stands for, see ``FORMS``.

    Args:
      name: with a colon between the module or file and the attribute.
      kind: what it should be, in front of it in the errors: "loss ".
      field: of the errors.

    Raises:
      UserError: no such module or file, or nothing of that name in it. Errors of the file's own code pass as they are.
    """
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise UserError(f"{kind}{name!r} cannot be loaded: give {FORMS}.", field)
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise UserError(f"{kind}{name!r} cannot be loaded: there is no file {where}. Check the path.", field)
        try:
            module = execute(Path(where))
        except SyntaxError as error:
            if error.filename not in (None, where, str(Path(where).resolve())):
                raise  # of a file that this one imports
            line = f" line {error.lineno}" if error.lineno else ""
            told = f"{where}{line} is not Python ({error.msg}). Correct it there."
            raise UserError(f"{kind}{name!r} cannot be loaded: {told}", field) from error
    else:
        try:
            module = importlib.import_module(where)
        except ImportError as error:
            raise UserError(f"{kind}{name!r} cannot be loaded: {error}. Check the module's name.", field) from error
    if not hasattr(module, attribute):
        raise UserError(f"{kind}{name!r} cannot be loaded: {where} has no {attribute!r}. Check its name.", field)
    return getattr(module, attribute)


def taken_instead(function: Callable, count: int) -> str:
    """Returns what a function takes by position, such as "(net, batch)", where ``count`` arguments do not fit; else
    ""."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    needed = [p.name for p in parameters if p.kind in by_position and p.default is p.empty]
    taken = [p for p in parameters if p.kind in by_position]
    few = len(taken) < count and not any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return f"({', '.join(needed)})" if few or len(needed) > count else ""


def defaults(function: Callable) -> dict[str, Any]:
    """Returns the options of a function with their values: its keyword-only arguments that have a default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def needed(function: Callable) -> list[str]:
    """Returns the names of its keyword-only arguments without a default."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def check_options(described: str, function: Callable, options: Mapping[str, object]) -> None:
    """Raises UserError (field "options") for an option that a function does not take, naming those it does, or not with
    this value. ``described``: the function, in front of the error: "loss 'dmd'"."""
    ranges.check_arguments(function, options, f"{described}: option", "options")
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
        return
    known = defaults(function)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(
            f"{described} has no option {unknown[0]!r}; keyword-only options it takes: {', '.join(known) or 'none'}.",
            "options",
        )
