"""One writer at a time: a lock that the kernel frees when its process dies, and that says whose it is.

The lock is ``flock`` on a file which holds host, process and time for the message. Where another host's locks are not
seen (or a file system has none), the file's modification time is the sign of life: its holder renews it, and a holder
that is silent for a minute is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from greedy_distill_jax.errors import UserError

BEAT, SILENT = 10.0, 60.0  # seconds: between two signs of life, and after how many without one a holder is gone
FILE = "writer.lock"


@contextlib.contextmanager
def sole_writer(folder: Path, *, field: str = "workdir") -> Iterator[None]:
    """Holds a folder for this process inside the block; makes it, and removes it again if nothing came into it.

    Raises:
      UserError: with this field: another process holds it, or it cannot be written.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error, field) from error
    try:
        with held(folder / FILE, str(folder), field=field):
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def held(path: Path, what: str, *, field: str = "") -> Iterator[None]:
    """Holds the lock at ``path`` inside the block; the lock of a process that is gone is taken over, with a line.

    Args:
      path: of the file, which is there while the lock is held.
      what: the lock stands for, in messages.
      field: of the errors.

    Raises:
      UserError: another process holds it, or the place cannot be written.
    """
    try:
        descriptor = _acquire(path, what, field)
    except OSError as error:
        raise _unwritable(path.parent, error, field) from error
    released = threading.Event()
    life = threading.Thread(target=_show_life, args=(descriptor, released), daemon=True)
    life.start()
    try:
        yield
    finally:
        released.set()
        life.join()
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, what: str, field: str) -> int:
    while True:
        descriptor, locks = _try(path, os.O_RDWR | os.O_CREAT)
        holder = _holder(descriptor)
        if locks is False or (holder and not _is_gone(path, holder, locks)):
            os.close(descriptor)
            raise UserError(
                f"{what} is being written by another process ({_told(holder)}); wait for it or end it, or choose "
                "another folder",
                field,
            )
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)  # its holder has removed the file just now
    if holder:
        print(
            f"warning: {what}: taking over from a process that is gone ({_told(holder)})", file=sys.stderr, flush=True
        )
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}) + "\n"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
    return descriptor


def _try(path: Path, flags: int) -> tuple[int, bool | None]:
    """(descriptor of the file, whether it is locked now by us: False = by another one, None = there are no locks)."""
    descriptor = os.open(path, flags, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor, True
    except BlockingIOError:
        return descriptor, False
    except OSError:
        return descriptor, None


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        return dict(json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return {}  # nobody, or one that has not written it yet


def _is_gone(path: Path, holder: Mapping[str, Any], locks: bool | None) -> bool:
    """Whether the process that a lock file names has ended, though nobody holds the lock as far as this host knows."""
    if holder.get("host") == socket.gethostname() and (locks or not _is_alive(holder.get("pid"))):
        return True
    _say(f"waiting {SILENT:.0f} s for a sign of life of {_told(holder)} ({path})")
    first, end = _renewed(path), time.monotonic() + SILENT
    while time.monotonic() < end:
        time.sleep(min(1.0, SILENT / 10))
        if (now := _renewed(path)) != first:
            return now is None
    return True


def _told(holder: Mapping[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"


def _renewed(path: Path) -> int | None:
    """When a lock was renewed, in ns; None without one. It is opened anew, so that a network file system asks."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _show_life(descriptor: int, released: threading.Event) -> None:
    while not released.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _is_alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except OSError:
        pass  # of another user
    return True


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _unwritable(folder: Path, error: OSError, field: str) -> UserError:
    return UserError(f"{folder} cannot be written ({error.strerror or error}); choose another folder.", field)
