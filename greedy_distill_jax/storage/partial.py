"""Files that get their name when they are whole: until then they are hidden beside it, and nothing is left of them.

A process that is killed cannot tidy up. Whoever writes a partial file holds a lock on it, which the kernel frees with
the process; the next who writes the same target removes those that nobody holds. They stay where a file system has no
locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

from greedy_distill_jax.storage.host import kernel

_DAY = 24 * 3600.0
_HOST = f"{zlib.crc32(kernel().encode()):08x}"
_open: set[Partial] = set()


class Partial:
    """A hidden file or folder beside its target: `commit` gives what is written the target's name, `abort` removes it.

    Attributes:
      target: path that it gets.
      path: what to write; of a folder, a file or folder inside it.
    """

    def __init__(self, target: str | os.PathLike, *, folder: bool = False) -> None:
        """Creates it, and removes what killed processes left of the same target.

        Args:
          target: path of what is written.
          folder: make a folder, in which a file or a folder is written that replaces whatever the target is.

        Raises:
          OSError: the place cannot be written.
        """
        self.target = Path(target)
        remove_leftovers(self.target)
        self._lock: int | None = None
        while True:
            self._place = self.target.with_name(f".{self.target.name}.{_HOST}{uuid.uuid4().hex[:8]}.partial")
            self.path = self._place / self.target.name if folder else self._place
            _open.add(self)
            try:
                if folder:
                    self._place.mkdir()
                else:
                    self._place.touch(exist_ok=False)
                if self._is_held():
                    return
            except BaseException:
                self.abort()
                raise
            self._close()

    def _is_held(self) -> bool:
        """Locks it; False if somebody took it for left behind, and removed it, before it was locked."""
        with contextlib.suppress(FileNotFoundError):
            self._lock = _locked(self._place, wait=True)
            return self._place.exists()
        return False

    def commit(self) -> None:
        """Gives it the target's name, in place of what has it."""
        if self.path != self._place and (self.path.is_dir() or self.target.is_dir()):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.target, _replaced(self._place, self.target))
        os.replace(self.path, self.target)
        if self.path != self._place:
            _remove(self._place, self.target)
        self._close()

    def abort(self) -> None:
        """Removes it, and puts back what `commit` was about to replace; nothing happens after `commit`.

        Raises:
          OSError: it cannot be removed or put back; it stays.
        """
        if self in _open:
            try:
                _remove(self._place, self.target)
            finally:
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
    """Removes the partial files of a target that killed processes left, and puts back what they were replacing.

    A lock may be known to its own host alone: what another one left stays for a day. What may not be removed stays.
    """
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        with contextlib.suppress(OSError):
            own = path.name.removesuffix(".partial").rsplit(".", 1)[-1].startswith(_HOST)
            lock = _locked(path)
            if lock is not None:
                try:
                    if own or time.time() - path.stat().st_mtime > _DAY:
                        _remove(path, target)
                finally:
                    os.close(lock)


def _locked(path: Path, *, wait: bool = False) -> int | None:
    """A descriptor that holds the lock of a file or folder; None where another one does, or there are no locks."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return descriptor
    except OSError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise


def _replaced(place: Path, target: Path) -> Path:
    """Where a target waits inside a partial folder until the new one has its name."""
    return place / f"{target.name}.replaced"


def _remove(path: Path, target: Path) -> None:
    if path.is_dir():
        if not os.path.lexists(target):
            with contextlib.suppress(FileNotFoundError):
                os.replace(_replaced(path, target), target)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
