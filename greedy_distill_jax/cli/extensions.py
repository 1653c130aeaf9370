"""What a user wrote outside the package, by the name that a configuration or an option gives it."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

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
