"""How SIGTERM and Ctrl-C stop a run: of one process after its update, of several after one step that all agree on."""

import contextlib
import os
import signal
import sys
from typing import Any

from greedy_distill_jax import cli
from greedy_distill_jax.cli import signals
from greedy_distill_jax.distribution.agreement import Agreement, Decision, ServiceStore
from greedy_distill_jax.errors import Diverged, UserError

_LEADER = 1.0  # seconds that process 0, with the service of all, ends after the others: jax aborts who misses it


class Stop:
    """Set by SIGTERM and Ctrl-C; the loop saves and leaves. A second Ctrl-C interrupts at once."""

    def __init__(self):
        self.signal, self._interrupts = 0, 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[number] = signal.signal(number, self._set)
            except ValueError:  # not the main thread (a notebook server): no handlers there
                break
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def begins(self, step: int) -> bool:
        """Whether this step may begin; asked before each."""
        return not self.signal

    def _set(self, number: int, _: Any) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if not self.signal:
            print("\nstopping after this update ...", file=sys.stderr, flush=True)
        self.signal = self.signal or number


class AgreedStop(Stop):
    """A stop of several processes, whichever of them is told to.

    While no process has begun a step there is nothing to save: all end, without unwinding where a computation or the
    wait for another process takes longer than ``signals.GRACE``. The same holds when one of them fails.
    """

    def __init__(self, stage: str, process: int, processes: int):
        super().__init__()
        self._stage, self._process, self._processes = stage, process, processes
        self._code, self._unwinds, self._heard_interrupts = 0, False, 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "AgreedStop":
        store, place = ServiceStore(), (self._process, self._processes)
        self._agreement = Agreement(store, *place, self._decided, self._failed)
        super().__enter__()
        self._stack.enter_context(signals.listening(self._heard))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._stack.close()
        failed = error is not None and not self._unwinds
        self._agreement.close(_told(error) if failed else "")
        if failed:
            cli.end_without_others()
        super().__exit__(kind, error, trace)

    def begins(self, step: int) -> bool:
        """Whether this step may begin, which waits for the others when one of them was told to stop."""
        if self._agreement.begins(step):
            return True
        if decision := self._agreement.decision:
            self.signal = decision.signal
            if not decision.step:
                self._unwind(signals.CODES[signal.Signals(decision.signal)])
        return False

    def _heard(self, number: int) -> None:
        """In a thread, also while the main one is inside a computation."""
        self._heard_interrupts += number == signal.SIGINT
        if self._heard_interrupts == 2:
            signals.end_soon(signals.CODES[signal.SIGINT])
        if not self._code:
            self._agreement.ask(number)

    def _set(self, number: int, _: Any) -> None:
        if self._code:
            self._unwind(self._code)
            return
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self._agreement.ask(number)

    def _unwind(self, code: int) -> None:
        """Raises, once, what ends the process with this code."""
        if not self._unwinds:
            self._unwinds = True
            raise KeyboardInterrupt if code == signals.CODES[signal.SIGINT] else SystemExit(code)

    def _decided(self, decision: Decision) -> None:
        if decision.step:
            self._say(f"\nstopping after step {decision.step} ...")
        else:
            self._say(f"{self._stage}: stopped before a step, nothing to save; the same command starts again.")
            self._leave(signals.CODES[signal.Signals(decision.signal)])

    def _failed(self, line: str) -> None:
        print(f"error: {line}", file=sys.stderr, flush=True)
        self._leave(2)

    def _leave(self, code: int) -> None:
        """Ends this process, from a thread: a signal wakes the main one, if Python still gets to see it there."""
        self._code = code
        signals.end_soon(code, seconds=_LEADER if self._process == 0 else 0.0)
        if self._old:
            os.kill(os.getpid(), signal.SIGTERM)

    def _say(self, line: str) -> None:
        if self._process == 0:  # the others would say the same
            print(line, file=sys.stderr, flush=True)


def _told(error: BaseException) -> str:
    if isinstance(error, UserError | Diverged):
        return " ".join(str(error).split())
    return type(error).__name__
