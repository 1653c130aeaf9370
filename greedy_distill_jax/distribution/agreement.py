"""The step after which all processes of a run stop, when a signal comes to one of them or one of them fails.

A process that goes on while another has left waits for ever: a step is one computation of all. So nobody leaves alone.
Whoever is asked to stop wakes a thread in every process; it freezes and publishes the last step that its process has
begun, reads what the others publish, and all stop after the largest of these. These are threads, because a process that
is inside a step waits for those that have not begun it: they have to learn that they must, not be waited for.

Processes talk through the store of the coordination service that ``jax.distributed`` keeps at process 0, for which jax
has no public name.
"""

import contextlib
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from greedy_distill_jax.cli import RETRY
from greedy_distill_jax.distribution.mesh import feeding
from greedy_distill_jax.storage.records import first_line

ANSWER = 20.0  # seconds in which every process must say which step it has begun
_SLICE = 1.0  # seconds between two looks at whether an answer is still wanted
_QUIET = 600.0  # seconds of one wait for a question: the service keeps something of every wait that nobody ended
READ_ALIKE = 300.0  # seconds in which processes that feed the same rows come to the same record
_runs = itertools.count()


@runtime_checkable
class Store(Protocol):
    """Texts by name, which all processes share."""

    def set(self, key: str, value: str) -> None:
        """Sets a text, or replaces it."""

    def get(self, key: str, seconds: float) -> str | None:
        """Waits for a text; None where nobody set it in that time."""


class Decision(NamedTuple):
    """step: the last of all processes, 0 where none has begun one. signal: that they stop for."""

    step: int
    signal: int


class Agreement:
    """What one process knows and says; made by all of them, with the same names in the store.

    Args:
      store: that all processes share.
      process, processes: number of this one, and how many there are.
      decided: called, in a thread, when all have agreed to stop.
      failed: called, in a thread, with an exit code and one line: the others do not answer, or one of them has failed.
    """

    def __init__(
        self,
        store: Store,
        process: int,
        processes: int,
        decided: Callable[[Decision], None],
        failed: Callable[[int, str], None],
    ):
        self._store, self._process, self._processes = store, process, processes
        self._others = [other for other in range(processes) if other != process]
        self._decided, self._failed = decided, failed
        self._changed = threading.Condition()
        self._begun, self._signal, self._frozen, self._closed = 0, 0, False, False
        self.decision: Decision | None = None
        self._asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._ask, self._answer)]
        for thread in self._threads:
            thread.start()

    def ask(self, signal: int) -> None:
        """Asks all processes to stop, for this signal. Returns at once; signal handlers may call it."""
        self._asked.put(signal)

    def begins(self, step: int) -> bool:
        """Whether a step, from 1 on, may begin; waits while that is not known."""
        with self._changed:
            if not self._frozen:
                self._begun = step
                return True
            self._changed.wait_for(lambda: self.decision)
            return step <= self.decision.step

    def fail(self, code: int, line: str) -> None:
        """Ends this process's part, and tells the others to end with this exit code, too."""
        self.end_all(code, f"process {self._process} has ended ({line}); the others end, too")

    def end_all(self, code: int, line: str) -> None:
        """Ends this process's part, and tells the others to end with this exit code and line."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service ended before
            self._publish()
            self._wake(self._others, f"{code} {line}")

    def close(self) -> None:
        """Ends this process's part: it begins no further step."""
        with self._changed:
            self._closed = True
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service ended before
            self._publish()
            self._wake([self._process], "leave")
        self._asked.put(None)
        for thread in self._threads:
            thread.join(timeout=2 * _SLICE)

    def _ask(self) -> None:
        while signal := self._asked.get():
            with self._changed:
                if (
                    self._signal or self._frozen or self._closed
                ):  # they stop, or this process has published that it left
                    continue
                self._signal = signal
            try:
                for process in (*self._others, self._process):
                    self._store.set(f"stop/{process}", "stop")
            except jax.errors.JaxRuntimeError as error:
                self._failed(RETRY, f"the other processes cannot be asked to stop ({_line(error)})")

    def _wake(self, processes: Iterable[int], text: str) -> None:
        """Ends the waits of processes with a text other than "stop"."""
        for process in processes:
            self._store.set(f"end/{process}", text)
            self._store.set(f"stop/{process}", text)

    def _answer(self) -> None:
        try:
            told = self._wait(f"stop/{self._process}", wait=_QUIET)
            if told == "stop":
                self._decide()
                told = self._wait(f"end/{self._process}", wait=_QUIET)
            if told and not self._closed:
                code, _, line = told.partition(" ")
                self._failed(int(code), line)
        except jax.errors.JaxRuntimeError as error:
            if not self._closed:
                self._failed(RETRY, f"the service that joins the processes does not answer ({_line(error)})")

    def _decide(self) -> None:
        self._publish()
        until, answers = time.monotonic() + ANSWER, []
        for process in range(self._processes):
            answer = self._wait(f"begun/{process}", until=until)
            if answer is None:
                if not self._closed:
                    line = f"process {process} does not say within {ANSWER:.0f} s which step it has begun"
                    self._failed(RETRY, line)
                return
            answers.append([int(number) for number in answer.split()])
        with self._changed:
            self.decision = Decision(*map(max, zip(*answers, strict=True)))
            self._changed.notify_all()
        self._decided(self.decision)

    def _publish(self) -> None:
        with self._changed:
            first, self._frozen = not self._frozen, True
            text = f"{self._begun} {self._signal}"
        if first:
            self._store.set(f"begun/{self._process}", text)

    def _wait(self, key: str, *, until: float = math.inf, wait: float = _SLICE) -> str | None:
        """A text of the store; None when this process has left, or it is late."""
        while not self._closed and (left := min(wait, until - time.monotonic())) > 0:
            if (found := self._store.get(key, left)) is not None:
                return found
        return None


def place() -> tuple[int, int]:
    """(number of this process, how many have joined), as the service has them; (0, 1) without one.

    Unlike ``jax.process_index`` it starts no devices, which would wait for those of the other processes.
    """
    from jax._src import distributed

    state = distributed.global_state
    return (0, 1) if state.client is None else (state.process_id, state.num_processes)


def coordinator() -> str:
    """HOST:PORT of the service, "" before somebody has looked for it."""
    from jax._src import distributed

    return distributed.global_state.coordinator_address or ""


def leave() -> None:
    """Makes this process one alone again, when all that have joined do so; to be called before it starts devices."""
    from jax._src import distributed

    jax.distributed.shutdown()
    distributed.global_state.process_id, distributed.global_state.num_processes = 0, 1  # jax keeps them


class ServiceStore:
    """The store of the coordination service, with names of its own for every run of a process."""

    def __init__(self):
        from jax._src import distributed

        self._client, self._prefix = distributed.global_state.client, f"greedy_distill_jax/{next(_runs)}"

    def set(self, key: str, value: str) -> None:
        """Sets a text, or replaces it."""
        self._client.key_value_set(f"{self._prefix}/{key}", value, allow_overwrite=True)

    def get(self, key: str, seconds: float) -> str | None:
        """Waits for a text; None where nobody set it in that time."""
        try:
            return self._client.blocking_key_value_get(f"{self._prefix}/{key}", max(1, round(1000 * seconds)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise


def readers(mesh: Mesh) -> Callable[[int], list[int]] | None:
    """Of a bad record, the processes that feed this one's rows and do not say that they cannot read it.

    None where every process feeds rows of its own. All processes have to call this.
    """
    fed, own = feeding(mesh), jax.process_index()
    if len(set(fed.values())) == len(fed):
        return None
    store, others = ServiceStore(), [other for other, parts in fed.items() if parts == fed[own] and other != own]

    def not_told(index: int) -> list[int]:
        store.set(f"bad/{index}/{own}", "")
        return [other for other in others if store.get(f"bad/{index}/{other}", READ_ALIKE) is None]

    return not_told


def _line(error: Exception) -> str:
    return first_line(error)[:200]
