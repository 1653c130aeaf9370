"""How SIGTERM and Ctrl-C stop a run: of one process after its update, of several after one step that all agree on."""

import contextlib
import faulthandler
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from greedy_distill_jax import cli
from greedy_distill_jax.cli import signals
from greedy_distill_jax.distribution import watchdog
from greedy_distill_jax.distribution.agreement import Agreement, Decision, ServiceStore
from greedy_distill_jax.distribution.watchdog import Watchdog
from greedy_distill_jax.errors import Lost
from greedy_distill_jax.storage.records import first_line

NOTHING = "nothing to save yet"
STOPPED = "{}: stopped, {}; the same command goes on from there."
_LEADER = 2.0  # seconds that process 0, with the service of all, ends after the others: jax aborts who misses it
_PERIOD = 5.0  # seconds between two signs of life, at most
_LIMITS = {"silence": watchdog.SILENCE, "stall": watchdog.STALL}
_BROKEN = re.compile("(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")
_LINK = re.compile("Gloo|NCCL|DEADLINE_EXCEEDED")  # what a computation says of the way to the other processes
_SAME = 1.0  # seconds for an error that all processes meet, so that each says its own


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

    def telling(self) -> contextlib.AbstractContextManager[None]:
        """A block whose errors others have to hear of."""
        return contextlib.nullcontext()

    def begins(self, step: int) -> bool:
        """Whether this step may begin; asked before each."""
        return not self.signal

    def slowest(self) -> str:
        """The process that is behind this one, as it last said, "" where none is."""
        return ""

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
        self._ends = threading.Event()  # by an error of its own, or because all is done
        self._listening = signals.listening(self._heard)
        self._limits = {name: watchdog.seconds(variable) for name, variable in _LIMITS.items()}
        self._begun = 0

    def __enter__(self) -> "AgreedStop":
        self._agreement = Agreement(ServiceStore(), self._process, self._processes, self._decided, self._failed)
        self._watchdog = Watchdog(
            ServiceStore(),
            self._process,
            self._processes,
            lambda: self._begun,
            self._lost,
            period=min(_PERIOD, self._limits["silence"] / 6),  # a sign is heard one period late
            **self._limits,
        )
        super().__enter__()
        self._listening.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(super().__exit__, kind, error, trace)
            stack.callback(self._listening.__exit__, None, None, None)
            stack.callback(self._agreement.close)
            stack.callback(self._watchdog.close)
            if error is not None:
                self._tell(error)
            self._ends.set()

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """What is raised in the block ends the others, too; and this process, if it does not unwind within seconds."""
        try:
            yield
        except BaseException as error:
            told = self._of_another(error)
            self._tell(told or error)
            if told:
                raise told from error
            raise

    def _of_another(self, error: BaseException) -> Lost | None:
        """What a computation failed for, where a process that it needs is gone or came late; None for its own error."""
        # A collective that breaks in a call of a jitted function is a ValueError, behind it one of jax's own.
        is_status = type(error) in (ValueError, jax.errors.JaxRuntimeError) and _BROKEN.match(str(error))
        if not is_status or self._ends.is_set():
            return None
        try:
            line = self._watchdog.missing()
        except jax.errors.JaxRuntimeError:
            line = "process 0 does not answer"
        # Such an error may last; who starts again counts starts (RESTARTS of launch/train.sh, maxRestarts of a JobSet).
        if not line and _LINK.search(str(error)):
            line = "a computation of all processes failed, and all of them live"
        return Lost(f"{line} ({first_line(error)[:200]})") if line else None

    def begins(self, step: int) -> bool:
        """Whether this step may begin, which waits for the others when one of them was told to stop."""
        if self._agreement.begins(step):
            self._begun = step
            return True
        decision = self._agreement.decision
        self.signal = decision.signal
        if not decision.step:
            self._unwind(signals.CODES[signal.Signals(decision.signal)])
        return False

    def slowest(self) -> str:
        """See ``Stop``; of process 0, which hears all others."""
        process, step, own = self._watchdog.slowest()
        return f"process {process} at step {step} of {own}" if step < own else ""

    def _heard(self, number: int) -> None:
        """In a thread, also while the main one is inside a computation."""
        self._heard_interrupts += number == signal.SIGINT
        if self._heard_interrupts == 2:
            self._tell(KeyboardInterrupt())
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

    def _tell(self, error: BaseException) -> None:
        """Ends all processes because this one has failed; nothing where the others know, or are why it ends."""
        if self._unwinds or self._ends.is_set():
            return
        self._ends.set()
        code, line = _told(error)
        self._end_soon(code)
        self._agreement.fail(code, line)

    def _decided(self, decision: Decision) -> None:
        if decision.step:
            self._say(f"\nstopping after step {decision.step} ...")
        else:
            code = signals.CODES[signal.Signals(decision.signal)]
            self._leave(code, lambda: self._say(STOPPED.format(self._stage, NOTHING)))

    def _failed(self, code: int, line: str) -> None:
        def say() -> None:
            if not self._ends.wait(_SAME):  # it has failed, too, and says itself how
                self._say_lost(line)

        self._leave(code, say)

    def _lost(self, line: str) -> None:
        """A process is gone or hangs: all end, whatever they wait for, so that they can be started again."""

        def tell() -> None:
            if self._process == 0:
                self._agreement.end_all(cli.RETRY, line)
            self._say_lost(line)

        if not (self._unwinds or self._ends.is_set()):
            self._leave(cli.RETRY, tell)

    def _say_lost(self, line: str) -> None:
        print(f"error: {line}", file=sys.stderr, flush=True)
        if line.startswith(f"process {self._process} "):  # where it hangs
            faulthandler.dump_traceback(all_threads=True)

    def _leave(self, code: int, say: Callable[[], None]) -> None:
        """Ends this process, from a thread: a signal wakes the main one, if Python still gets to see it there."""
        self._end_soon(code)
        say()
        if not self._ends.is_set():
            self._code = code
            if self._old:
                os.kill(os.getpid(), signal.SIGTERM)

    def _end_soon(self, code: int) -> None:
        signals.end_soon(code, seconds=_LEADER if self._process == 0 else 0.0)

    def _say(self, line: str) -> None:
        if self._process == 0:  # the others would say the same
            print(line, file=sys.stderr, flush=True)


def _told(error: BaseException) -> tuple[int, str]:
    """(exit code, what the others say of it)."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1, "stopped"
    code, line = cli.outcome(error)
    line = line.removeprefix("error: ") or f"{type(error).__name__}: {first_line(error)}"[:200]
    return code, " ".join(line.split())
