"""SIGTERM and Ctrl-C end a command, also while Python waits for one long computation."""

import contextlib
import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

from greedy_distill_jax.storage.partial import abort_all

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
GRACE = 5.0  # seconds in which the stack must have unwound
_LAST = 1.0  # seconds for the last line: a pipe that nobody reads takes none


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Inside the block SIGTERM raises SystemExit(143) and Ctrl-C KeyboardInterrupt, so that the stack unwinds.

    Python handles signals between two of its own instructions, and a compilation, a jitted loop or the wait for another
    process is one instruction, however long it takes; what is raised in a callback may be lost. Where the stack does
    not unwind, a thread removes the partial files of this process and ends it. Handlers that are set inside the block,
    as those of training, keep their signals for themselves.
    """
    ended = threading.Event()

    def handle(number: int, _: object) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(CODES[signal.Signals(number)])

    def watch() -> None:
        while told := reader.recv(1):
            number = told[0]
            if signal.getsignal(number) is handle and not ended.wait(GRACE):
                try:
                    abort_all()
                    last = threading.Thread(target=_say_last, args=(number,), daemon=True)
                    last.start()
                    last.join(_LAST)
                finally:
                    os._exit(CODES[signal.Signals(number)])

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
        ended.set()
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        if os.getpid() == process:  # a forked child that unwinds has the same socket
            writer.shutdown(socket.SHUT_WR)  # its copies in children that live stay open
        writer.close()
        thread.join()
        reader.close()


def _say_last(number: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        if number == signal.SIGINT:
            print("interrupted", file=sys.stderr, flush=True)


@functools.cache
def _keep_from_children() -> None:
    """Signals to a forked child are not for the watcher of its parent, whose socket the child has too."""
    os.register_at_fork(after_in_child=functools.partial(signal.set_wakeup_fd, -1))
