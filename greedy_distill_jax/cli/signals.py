"""SIGTERM and Ctrl-C end a command, also while Python waits for one long computation."""

import atexit
import contextlib
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from greedy_distill_jax.storage.partial import abort_all

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
GRACE = 5.0  # seconds in which the stack must have unwound
_LAST = 1.0  # seconds for the last line: a pipe that nobody reads takes none
_listeners: list[Callable[[int], None]] = []
_lines: list[str] = []
_ended = threading.Event()  # the block of `ending` is left: whoever called says how it ended


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Inside the block SIGTERM raises SystemExit(143) and Ctrl-C KeyboardInterrupt, so that the stack unwinds.

    Python handles signals between two of its own instructions, and a compilation, a jitted loop or the wait for another
    process is one instruction, however long it takes; what is raised in a callback may be lost. Where the stack does
    not unwind, a thread removes the partial files of this process and ends it. Handlers that are set inside the block,
    as those of training, keep their signals for themselves.
    """
    _ended.clear()

    def handle(number: int, _: object) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(CODES[signal.Signals(number)])

    def watch() -> None:
        while told := reader.recv(1):
            number = told[0]
            for listen in tuple(_listeners):
                listen(number)
            if signal.getsignal(number) is handle and not _ended.wait(GRACE):
                _end(CODES[signal.Signals(number)])

    _keep_from_children()
    process = os.getpid()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # A command in the background of a shell ignores Ctrl-C, which is for the one in front.
    numbers = [number for number in CODES if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in numbers}
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        _ended.set()
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        if os.getpid() == process:  # a forked child that unwinds has the same socket
            writer.shutdown(socket.SHUT_WR)  # its copies in children that live stay open
        writer.close()
        thread.join()
        reader.close()


@contextlib.contextmanager
def listening(listen: Callable[[int], None]) -> Iterator[None]:
    """Inside the block ``listen`` hears of every signal within ``ending``, in a thread, whatever Python waits for."""
    _listeners.append(listen)
    try:
        yield
    finally:
        _listeners.remove(listen)


@contextlib.contextmanager
def saying(line: str) -> Iterator[None]:
    """A process that a signal ends inside the block says this line, whether its stack unwinds or not."""
    _lines.append(line)
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        print(line, file=sys.stderr, flush=True)
        raise
    finally:
        _lines.remove(line)


def end_soon(code: int, seconds: float = 0.0) -> None:
    """Ends the process with this code if it has not ended itself ``GRACE`` and these seconds from now."""

    def wait() -> None:
        time.sleep(GRACE + seconds)
        _end(code)

    threading.Thread(target=wait, daemon=True).start()


def leave(code: int) -> None:
    """Ends a process that has unwound after a signal, its exit functions run, with this code.

    Taking the interpreter down would be one act too many: where the signal met a compilation, the process crashes in it
    and ends with the code of that.
    """
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _end(code: int) -> None:
    """Ends the process without unwinding, whatever its last acts do."""
    try:
        abort_all()
        last = threading.Thread(target=_say_last, args=(code,), daemon=True)
        last.start()
        last.join(_LAST)
    finally:
        os._exit(code)


def _say_last(code: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        interrupted = code == CODES[signal.SIGINT] and not _ended.is_set()
        for line in [*_lines, *["interrupted"] * interrupted]:
            print(line, file=sys.stderr, flush=True)


@functools.cache
def _keep_from_children() -> None:
    """Signals to a forked child are not for the watcher of its parent, whose socket the child has too."""
    os.register_at_fork(after_in_child=functools.partial(signal.set_wakeup_fd, -1))
