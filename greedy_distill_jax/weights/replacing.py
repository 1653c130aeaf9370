"""Files and folders that appear whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from greedy_distill_jax.errors import UserError


@contextlib.contextmanager
def replacing(target: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path beside ``target`` for a file or folder; renamed to it at the end, removed on any error.

    Raises:
      UserError: ``target`` exists (and ``overwrite`` is off), or its place cannot be written.
    """
    target = Path(target).expanduser()
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; choose another name, or overwrite it.", "overwrite")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror or error}); choose another place.", "target"
        ) from error
    try:
        partial = temporary / target.name
        try:
            yield partial
        except OSError as error:
            raise UserError(f"{target} cannot be written ({error.strerror or error}).", "target") from error
        if target.exists():
            os.replace(target, temporary / "replaced")
        os.replace(partial, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
