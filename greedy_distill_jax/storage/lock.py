"""One writer at a time: a lock that the kernel frees when its process dies, and that says whose it is.

The lock is ``flock`` on a file which holds host, process and time for the message. Where another host's locks are not
seen (or a file system has none), the file's modification time is the sign of life: its holder renews it, and a holder
that is silent for a minute is gone. A file server may keep the lock of such a host for longer: it cannot be taken over
then, but the same command may be started again. A holder that was silent and lives on finds another token in its file:
its block ends with an error. Without ``flock``, of two that start at the same moment the last to write its token keeps
the lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from greedy_distill_jax.errors import Lost, UserError
from greedy_distill_jax.storage.host import kernel, process_numbers

BEAT, SILENT = 10.0, 60.0  # seconds: between two signs of life, and after how many without one a holder is gone
SETTLED = 1.0  # seconds after which, without flock, a file holds the token of one alone
FILE = "writer.lock"


@contextlib.contextmanager
def sole_writer(folder: Path, *, field: str = "workdir") -> Iterator[None]:
    """Holds a folder for this process inside the block; makes it, and removes it again if nothing came into it.

    Raises:
      UserError: with this field: another process holds it, or it cannot be written.
      Lost: as for `held`.
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
      UserError: another process holds it, or has taken it over inside the block, or the place cannot be written.
      Lost: its holder, on another host, is gone, and the file server has not freed its lock yet.
    """
    try:
        descriptor, token = _acquire(path, what, field)
    except OSError as error:
        raise _unwritable(path.parent, error, field) from error
    released = threading.Event()
    overtaken = type("Overtaken", (BaseException,), {})  # one of its own: blocks may lie inside each other
    arguments = (path, descriptor, token, released, threading.get_ident(), overtaken)
    life = threading.Thread(target=_show_life, args=arguments, daemon=True)
    try:
        try:
            life.start()
            yield
        finally:
            released.set()
            if life.ident is not None:
                life.join()
            _release(path, descriptor, token)
    except overtaken:
        raise UserError(
            f"{what}: another process has taken over, as this one gave no sign of life for {SILENT:.0f} s; it ends "
            "here, and the other one goes on",
            field,
        ) from None


def check_free(path: Path, what: str, *, field: str = "") -> None:
    """Raises UserError if another process holds the lock at ``path``; the lock of one that is gone is removed.

    Args:
      path, what, field: as for `held`.

    Raises:
      Lost: as for `held`.
      OSError: the place cannot be written.
    """
    descriptor, token = _acquire(path, what, field)
    _release(path, descriptor, token)


def join(path: Path, what: str, *, alone: bool = False, field: str = "") -> int | None:
    """Marks an existing file as in use by this process, beside others that join it, until the descriptor is closed.

    Unlike `held` it knows no sign of life: users on hosts whose locks are not seen here do not count.

    Args:
      path: of the file.
      what: it stands for, in messages.
      alone: nobody else may use it meanwhile.
      field: of the errors.

    Returns:
      The descriptor; None where there are no locks.

    Raises:
      UserError: it is used alone by another process or, with ``alone``, used by any.
      OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        if _is_file_at(path, descriptor):
            return descriptor
        refused = True  # another process has removed it just now
    except OSError as error:
        refused = isinstance(error, BlockingIOError)
    os.close(descriptor)
    if refused:
        raise _held_by(what, {}, field)
    return None


def _acquire(path: Path, what: str, field: str) -> tuple[int, str]:
    """(descriptor of the file, the token in it by which this holder is known)."""
    while True:
        descriptor, locks = _try(path)
        try:
            holder = _holder(descriptor)
            if (holder or locks is False) and not _is_gone(path, holder, locks):
                raise _held_by(what, holder, field)
            if locks is False and _is_file_at(path, descriptor) and (locks := _lock(descriptor)) is False:
                raise _not_freed(what, holder)
            if _is_file_at(path, descriptor):
                return descriptor, _take(path, descriptor, holder, what, field, settle=locks is None)
        except BaseException:  # Ctrl-C while it waits: in a notebook the process lives on
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed the file just now


def _take(path: Path, descriptor: int, gone: Mapping[str, Any], what: str, field: str, *, settle: bool) -> str:
    """Writes this process into the file and returns its token."""
    if gone:
        _say(f"warning: {what}: taking over from a process that is gone ({_told(gone)})")
    token, since = uuid.uuid4().hex, time.strftime("%Y-%m-%d %H:%M:%S")
    own = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "token": token}
    text = json.dumps({**own, "kernel": kernel(), "processes": process_numbers()}) + "\n"
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
        if settle:
            time.sleep(SETTLED)
    except BaseException:
        with contextlib.suppress(OSError):
            if _holder(descriptor).get("token", token) == token:
                path.unlink()
        raise
    if settle and (holder := _holder(descriptor)).get("token") != token:
        raise _held_by(what, holder, field)
    return token


def _release(path: Path, descriptor: int, token: str) -> None:
    try:
        if _holder(descriptor).get("token") == token and _is_file_at(path, descriptor):
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _is_file_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _try(path: Path) -> tuple[int, bool | None]:
    """(descriptor of the file, whether it is locked now by us: False = by another one, None = there are no locks)."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    return descriptor, _lock(descriptor)


def _lock(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        return dict(json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return {}  # nobody, or one that has not written it yet


def _is_gone(path: Path, holder: Mapping[str, Any], locks: bool | None) -> bool:
    """Whether the process that a lock file names has ended, as far as this host can know; ``locks`` as of `_try`."""
    if locks is False and not holder:
        return False  # it has just locked the file
    if locks is not None and holder.get("kernel") == kernel():
        return locks
    if holder.get("processes") == process_numbers() and not _is_alive(holder.get("pid")):
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


def _show_life(
    path: Path, descriptor: int, token: str, released: threading.Event, thread: int, overtaken: type
) -> None:
    """Renews the file until it is released; raises in ``thread`` when another holder's token is in it."""
    while not released.wait(BEAT):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads(path.read_bytes()).get("token", token) != token:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(overtaken))
                return
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _is_alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        return True  # another user's
    return True


def _held_by(what: str, holder: Mapping[str, Any], field: str) -> UserError:
    who = f" ({_told(holder)})" if holder else ""
    return UserError(
        f"{what} is being written by another process{who}; wait for it or end it, or choose another folder",
        field,
    )


def _not_freed(what: str, holder: Mapping[str, Any]) -> Lost:
    return Lost(
        f"{what} is locked by a process that gave no sign of life for {SILENT:.0f} s ({_told(holder)}); run the same "
        "command again once the file server has freed the lock, or choose another folder"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _unwritable(folder: Path, error: OSError, field: str) -> UserError:
    return UserError(f"{folder} cannot be written ({error.strerror or error}); choose another folder.", field)
