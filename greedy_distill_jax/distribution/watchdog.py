"""Finds a process of a job that is dead or hangs, while the others wait for it inside a computation.

Every process says in a thread, through the store of ``agreement``, that it lives, which step it has begun and where its
Python is. Process 0 looks at all, all look at process 0, with whom the store goes. Who is silent is dead, stopped or
without a network; a job whose steps stand still has a process that hangs.
"""

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from greedy_distill_jax.cli.variables import number
from greedy_distill_jax.distribution.agreement import Store

SILENCE, STALL = "SILENCE_TIMEOUT", "STALL_TIMEOUT"  # variables: seconds
_SECONDS = {SILENCE: 60, STALL: 3600}  # without one; the first step compiles, a save of a large state takes minutes
_LEFT = "left"
_PACKAGE = Path(__file__).parents[1]


class Sign(NamedTuple):
    """Of life. step: the last that the process has begun. place: of its main thread, in the package's code.

    own: the last step that the process which hears it had surely begun before it was said.
    """

    step: int
    place: str
    own: int = 0


class Watchdog:
    """Two threads of a process: one talks to the store, one looks at the clock, for the store may not answer.

    Args:
      store: that all processes share.
      process, processes: number of this one, and how many there are.
      step: returns the last step that this process has begun.
      lost: called once, in a thread, with a line that begins with the process that it names.
      silence: seconds without a sign after which a process counts as gone.
      stall: seconds without a new step of the slowest process after which it counts as hanging.
      period: seconds between two signs.
    """

    def __init__(
        self,
        store: Store,
        process: int,
        processes: int,
        step: Callable[[], int],
        lost: Callable[[str], None],
        *,
        silence: float,
        stall: float,
        period: float,
    ):
        self._store, self._process, self._processes = store, process, processes
        self._step, self._lost = step, lost
        self._silence, self._stall, self._period = silence, stall, period
        self._main = threading.main_thread().ident
        self._ends, self._saying, self._left = threading.Event(), threading.Lock(), False
        now = time.monotonic()
        watched = range(1, processes) if process == 0 else [0]
        self._signs = {other: Sign(0, "") for other in watched}
        self._seen, self._texts = dict.fromkeys(watched, now), dict.fromkeys(watched, "")
        self._heard_at = dict.fromkeys(watched, 0)  # the step of this process when it last heard each
        self._slowest, self._moved = 0, now
        for work in (self._talk, self._look):
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        """Says that this process leaves, so that nobody waits for a sign of it."""
        self._ends.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service ended before
            self._say(_LEFT)

    def slowest(self) -> tuple[int, int, int]:
        """(process, the last step it had begun, the last that this one had) at the last sign of who is most behind.

        A sign is heard up to a period after it was said, in which this process goes on. So it is held against the step
        at which the sign before it was heard: who is behind that one was behind when it spoke.
        """
        behind = ((sign.step - sign.own, other, sign) for other, sign in tuple(self._signs.items()))
        _, process, sign = min(behind, default=(0, self._process, Sign(0, "")))
        return process, sign.step, sign.own

    def missing(self) -> str:
        """Waits for a new sign of every other process; the line of the first that gives none, "" where all do."""
        others = [other for other in range(self._processes) if other != self._process]
        old = {other: self._store.get(f"alive/{other}", self._period) for other in others}
        until = time.monotonic() + self._silence
        for other in others:
            while self._store.get(f"alive/{other}", self._period) == old[other] != _LEFT:
                if time.monotonic() > until:
                    return f"process {other} gives no sign of life for {self._silence:.0f} s"
                time.sleep(self._period / 10)
        return ""

    def _say(self, text: str) -> None:
        with self._saying:
            if not self._left:
                self._left = text == _LEFT
                self._store.set(f"alive/{self._process}", text)

    def _talk(self) -> None:
        number = 0
        # The agreement, which has a wait open all the time, says that the service is gone.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while not self._ends.wait(self._period if number else 0.0):
                number += 1
                self._say(f"{number} {self._step()} {place_of(self._main)}")
                for other in tuple(self._seen):
                    self._hear(other)

    def _hear(self, other: int) -> None:
        begun = self._step()
        text = self._store.get(f"alive/{other}", self._period)
        if text == _LEFT:
            for of_other in (self._signs, self._texts, self._seen, self._heard_at):
                of_other.pop(other, None)
        elif text and text != self._texts[other]:
            _, step, place = text.split(" ", 2)
            self._signs[other] = Sign(int(step), place, self._heard_at[other])
            self._heard_at[other] = begun
            self._texts[other], self._seen[other] = text, time.monotonic()

    def _look(self) -> None:
        while not self._ends.wait(self._period):
            now = time.monotonic()
            silent = [other for other, seen in tuple(self._seen.items()) if now - seen > self._silence]
            if silent:
                sign = self._signs.get(silent[0], Sign(0, ""))
                line = f"process {silent[0]} gives no sign of life for {self._silence:.0f} s, since step {sign.step}"
                return self._lost(line)
            signs = {self._process: Sign(self._step(), place_of(self._main)), **self._signs}
            slowest = min(sign.step for sign in signs.values())
            if slowest != self._slowest:
                self._slowest, self._moved = slowest, now
            elif self._process == 0 and now - self._moved > self._stall:
                return self._lost(stalled(signs, self._stall))
        return None


def stalled(signs: Mapping[int, Sign], seconds: float) -> str:
    """The line of a job whose steps stand still, which names one process.

    That is the slowest, or, of processes at the same step, the first that is at another place than most.
    """
    slowest = min(sign.step for sign in signs.values())
    usual = Counter(sign.place for sign in signs.values()).most_common(1)[0][0]
    behind = [process for process, sign in signs.items() if sign.step == slowest]
    named = min(behind, key=lambda process: (signs[process].place == usual, process))
    line = f"process {named} has begun no step for {seconds:.0f} s since step {slowest}, it is at {signs[named].place}"
    return f"{line}; most are at {usual}"


def place_of(thread: int) -> str:
    """FILE:LINE in the package that a thread is at, with what it calls there; "its end" where there is none."""
    frame = sys._current_frames().get(thread)
    while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(_PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "its end"
    return f"{Path(frame.f_code.co_filename).relative_to(_PACKAGE)}:{frame.f_lineno} ({frame.f_code.co_name})"


def seconds(name: str) -> float:
    """The seconds of a variable; UserError for one that is no number."""
    return float(number(os.environ, name, _SECONDS[name], least=1, of=" of seconds,"))
