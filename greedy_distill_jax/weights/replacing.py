"""Files and folders that appear whole or not at all."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.disk import disk_reason
from greedy_distill_jax.storage.partial import Partial, remove_leftovers


def check_apart(sources: Iterable[str | os.PathLike], target: str | os.PathLike) -> None:
    """Raises UserError (field "target") where replacing the target would remove one of those that it is made of."""
    written = Path(os.path.realpath(Path(target).expanduser()))
    for source in sources:
        read = Path(os.path.realpath(Path(source).expanduser()))
        if written == read or written in read.parents:
            raise UserError(f"{target} holds {source}, which it is made of; choose another place.", "target")


@contextlib.contextmanager
def replacing(target: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path beside ``target`` for a file or folder; renamed to it at the end, removed on any error.

    Raises:
      UserError: ``target`` exists (and ``overwrite`` is off), its place cannot be written, or what was there cannot be
        put back after an error.
    """
    target = Path(target).expanduser()
    remove_leftovers(target)  # of a process that was killed while it replaced the target, which is put back
    if os.path.lexists(target) and not overwrite:
        raise UserError(f"{target} exists; choose another name, or overwrite it.", "overwrite")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        place = Partial(target, folder=True)
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror or error}); choose another place.", "target"
        ) from error
    try:
        yield place.path
        place.commit()
    except UserError:
        raise
    except Exception as error:  # safetensors and torch have errors of their own
        reason = disk_reason(error)
        if not reason:
            raise
        raise UserError(
            f"{target} cannot be written ({reason}); free space, or choose another place.", "target"
        ) from error
    finally:
        try:
            place.abort()
        except OSError as error:
            raise UserError(
                f"{error.filename} is what {target} was and cannot be put back ({error.strerror}); rename it.", "target"
            ) from error
