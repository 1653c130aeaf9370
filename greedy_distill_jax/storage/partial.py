"""Files that get their name when they are whole: until then they are hidden beside it, and nothing is left of them.

A process that is killed cannot tidy up. Whoever writes a partial file holds a lock on it, which the kernel frees with
the process; the next who writes the same target removes those that nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import time
import uuid
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

from greedy_distill_jax.storage.host import kernel

_DAY = 24 * 3600.0
_HOST = f"{zlib.crc32(kernel().encode()):08x}"
_open: weakref.WeakSet[Partial] = weakref.WeakSet()


class Partial:
    """A hidden file or folder beside its target: `commit` gives it the target's name, `abort` removes it.

    Attributes:
      target: path that it gets.
      path: where it is written.
    """

    def __init__(self, target: str | os.PathLike, *, folder: bool = False) -> None:
        """Creates it, and removes what killed processes left of the same target.

        Args:
          target: path of the whole file.
          folder: make a folder instead.

        Raises:
          OSError: the place cannot be written.
        """
        self.target = Path(target)
        remove_leftovers(self.target)
        self.path = self.target.with_name(f".{self.target.name}.{_HOST}{uuid.uuid4().hex[:8]}.partial")
        if folder:
            self.path.mkdir()
        else:
            self.path.touch(exist_ok=False)
        self._lock = _locked(self.path)
        _open.add(self)

    def commit(self) -> None:
        """Gives it the target's name, in place of a file that has it."""
        os.replace(self.path, self.target)
        self._close()

    def abort(self) -> None:
        """Removes it; nothing happens after `commit`."""
        if self in _open:
            _remove(self.path)
            self._close()

    def _close(self) -> None:
        _open.discard(self)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextlib.contextmanager
def whole(target: str | os.PathLike) -> Iterator[Path]:
    """Yields a path to write; it gets the target's name at the end and is removed on any error."""
    partial = Partial(target)
    try:
        yield partial.path
        partial.commit()
    except BaseException:
        partial.abort()
        raise


def abort_all() -> None:
    """Removes every partial file of this process, which is about to end without unwinding."""
    for partial in list(_open):
        with contextlib.suppress(OSError):
            partial.abort()


def remove_leftovers(target: Path) -> None:
    """Removes the partial files of a target that killed processes left.

    A lock may be known to its own host alone: what another one left stays for a day.
    """
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        with contextlib.suppress(FileNotFoundError):
            own = path.name.removesuffix(".partial").rsplit(".", 1)[-1].startswith(_HOST)
            lock = _locked(path)
            if lock is not None:
                if own or time.time() - path.stat().st_mtime > _DAY:
                    _remove(path)
                os.close(lock)


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock of a file or folder; None where another one does, or there are no locks."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError:
        os.close(descriptor)
        return None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
