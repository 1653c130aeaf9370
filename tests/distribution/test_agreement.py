"""Processes that agree on their last step, as threads with a store of their own."""

import contextlib
import queue
import signal
import threading
import time

import jax
import pytest
from hypothesis import given, strategies as st

from greedy_distill_jax.distribution import agreement
from greedy_distill_jax.distribution.agreement import Agreement, Decision
from greedy_distill_jax.errors import Diverged, Lost, UserError
from greedy_distill_jax.training import stop
from greedy_distill_jax.training.stop import AgreedStop

LONG = 60.0  # seconds after which a test counts as hanging
PAUSES = st.lists(st.sampled_from([0.0, 0.0, 0.001, 0.004]), min_size=1, max_size=20)


class FakeStore:
    """A store in this process, whose calls take as long as ``pauses`` say, one after the other."""

    def __init__(self, pauses=(0.0,)):
        self.texts, self._changed = {}, threading.Condition()
        self._pauses, self._calls = pauses, 0

    def _pause(self):
        self._calls += 1
        time.sleep(self._pauses[self._calls % len(self._pauses)])

    def set(self, key, value):
        self._pause()
        with self._changed:
            self.texts[key] = value
            self._changed.notify_all()

    def get(self, key, seconds):
        with self._changed:
            self._changed.wait_for(lambda: key in self.texts, seconds)
            found = self.texts.get(key)
        self._pause()
        return found


class Steps:
    """Steps that all processes compute together: none ends before all have begun it."""

    def __init__(self, processes, ahead):
        self._begun, self._ahead, self._changed = [0] * processes, ahead, threading.Condition()

    def make(self, process, step):
        with self._changed:
            self._begun[process] = step
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: min(self._begun) >= step - self._ahead, LONG), "a step never ends"

    def end(self, process):
        """It waits for what it has begun."""
        with self._changed:
            step = self._begun[process]
            assert self._changed.wait_for(lambda: min(self._begun) >= step, LONG), "a step never ends"


@given(
    processes=st.integers(2, 4),
    total=st.integers(1, 6),
    ahead=st.integers(0, 2),
    signals=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.sampled_from([2, 15])), max_size=3),
    own=st.lists(PAUSES, min_size=4, max_size=4),
    pauses=PAUSES,
)
def test_all_processes_make_the_same_steps(processes, total, ahead, signals, own, pauses):
    store, steps = FakeStore(pauses), Steps(processes, ahead)
    made, decisions, failures = [None] * processes, queue.SimpleQueue(), []

    def run(process):
        agreed = Agreement(store, process, processes, decisions.put, lambda *told: failures.append(told))
        step = 0

        def signalled():
            for number in (number for at, when, number in signals if (at, when) == (process, step)):
                agreed.ask(number)

        signalled()
        while step < total and agreed.begins(step + 1):
            step += 1
            signalled()
            time.sleep(own[process][step % len(own[process])])
            steps.make(process, step)
        steps.end(process)
        made[process] = step
        agreed.close()

    threads = [threading.Thread(target=run, args=(process,), daemon=True) for process in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert None not in made, "a process waits for ever"
    assert len(set(made)) == 1 and not failures
    asked = [(when, number) for at, when, number in signals if at < processes and when <= total]
    if not asked:
        assert made[0] == total
    while not decisions.empty():
        found = decisions.get()
        assert found.step == made[0] and found.signal in {number for _, number in asked}
    if made[0] < total:
        assert made[0] >= min(when for when, _ in asked)


def _failure(process=0, processes=2, *, store=None, act=lambda agreed: agreed.ask(15)):
    """The exit code and line with which a process learns that it cannot go on."""
    failures = queue.SimpleQueue()
    agreed = Agreement(store or FakeStore(), process, processes, lambda _: None, lambda *told: failures.put(told))
    act(agreed)
    try:
        return failures.get(timeout=LONG)
    finally:
        agreed.close()


def test_a_process_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(agreement, "ANSWER", 0.05)
    assert _failure() == (75, "process 1 does not say within 0 s which step it has begun")


@pytest.mark.parametrize("stopping", [False, True])
def test_a_process_that_fails_ends_the_others(stopping):
    """Also after they agreed to stop, as when it cannot save."""
    store, decided = FakeStore(), threading.Semaphore(0)
    other = Agreement(store, 1, 2, lambda _: decided.release(), lambda *_: None)

    def act(agreed):
        if stopping:
            agreed.ask(15)
            assert decided.acquire(timeout=LONG) and not agreed.begins(1)
        other.fail(4, "the disk is full")
        other.fail(2, "once more")
        other.close()

    assert _failure(store=store, act=act) == (4, "process 1 has ended (the disk is full); the others end, too")


def test_a_service_that_is_gone_is_a_line():
    class Gone(FakeStore):
        def get(self, key, seconds):
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: no connection\nmore")

    line = "the service that joins the processes does not answer (UNAVAILABLE: no connection)"
    assert _failure(store=Gone(), act=lambda _: None) == (75, line)


def test_a_stop_at_the_end_of_a_run_needs_nobody_who_has_left():
    store, decisions = FakeStore(), queue.SimpleQueue()
    first, last = (Agreement(store, process, 2, decisions.put, lambda *_: None) for process in (0, 1))
    assert first.begins(1) and last.begins(1)
    first.close()
    last.ask(15)
    assert decisions.get(timeout=LONG) == Decision(1, 15)
    assert not last.begins(2)
    last.close()


def test_whoever_has_left_asks_for_no_stop():
    """What it published has no signal in it, and nobody could decide for one."""
    store = FakeStore()
    first, last = (Agreement(store, process, 2, lambda _: None, lambda *_: None) for process in (0, 1))
    first.close()
    first.ask(15)
    assert last.begins(1) and store.texts["begun/0"] == "0 0" and "stop/1" not in store.texts
    last.close()


@pytest.fixture
def stopping(monkeypatch):
    """(make a stop of two processes, the store, what happened in its order): nothing ends this process."""
    store, happened = FakeStore(), []
    monkeypatch.setattr(stop, "ServiceStore", lambda: store)
    monkeypatch.setattr(stop, "_SAME", 0.0)
    monkeypatch.setattr(stop.signals, "end_soon", lambda code, seconds=0.0: happened.append(("armed", code, seconds)))
    monkeypatch.setattr(stop.os, "kill", lambda *_: happened.append("woken"))
    return lambda process=0: AgreedStop("teacher", process, 2), store, happened


@pytest.mark.parametrize("process, later", [(0, 2.0), (1, 0.0)])
@pytest.mark.parametrize(
    "error, code, line",
    [
        (Diverged("not\nfinite"), 4, "not finite"),
        (OSError(28, "Full", "x"), 2, "x cannot be written (Full); free space."),
        (Lost("nobody answers"), 75, "nobody answers"),
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(143), 143, "stopped"),
    ],
)
def test_the_others_hear_of_an_error_before_anything_unwinds(stopping, process, later, error, code, line):
    make, store, happened = stopping
    told = f"end/{1 - process}"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(type(error)), make(process) as stopped, contextlib.ExitStack() as stack, stopped.telling():
        stack.callback(lambda: happened.append(store.texts.get(told)))
        raise error
    assert happened == [("armed", code, later), f"{code} process {process} has ended ({line}); the others end, too"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_interrupt_is_told_while_python_waits(stopping):
    make, store, happened = stopping
    with make() as stopped:
        stopped._heard(signal.SIGINT)
        stopped._heard(signal.SIGINT)
        assert happened == [("armed", 130, 2.0)] and store.texts["end/1"].startswith("130 process 0 has ended")


def test_a_process_is_told_with_its_end_armed_first(stopping, monkeypatch):
    """A pipe that nobody reads would keep it otherwise."""
    make, _, happened = stopping
    monkeypatch.setattr("builtins.print", lambda *args, **_: happened.append(args[0]))
    with make(1) as stopped:
        stopped._failed(4, "process 0 has ended")
    assert happened == [("armed", 4, 0.0), "error: process 0 has ended", "woken"]


GONE = "process 1 gives no sign of life for 1 s"
LIVE = "a computation of all processes failed, and all of them live"
GLOO = "UNKNOWN: Gloo AllGather failed: Connection reset by peer"


@pytest.mark.parametrize("kind", [ValueError, jax.errors.JaxRuntimeError])
@pytest.mark.parametrize(
    "text, missing, line", [(GLOO, GONE, GONE), (GLOO, "", LIVE), ("INTERNAL: x", GONE, GONE), ("INTERNAL: x", "", "")]
)
def test_a_collective_that_breaks_is_a_reason_to_start_again(stopping, monkeypatch, kind, text, missing, line):
    """Where a process is gone, or it breaks between such as live; other errors that look like it are our own."""
    make, store, _ = stopping
    monkeypatch.setenv("SILENCE_TIMEOUT", "1")
    error = kind(text)
    told = f"{line} ({error})" if line else f"{kind.__name__}: {error}"
    monkeypatch.setattr(stop.Watchdog, "missing", lambda _: missing)
    with pytest.raises(Lost if line else kind), make() as stopped, stopped.telling():
        raise error
    code = 75 if line else 1
    assert store.texts["end/1"] == f"{code} process 0 has ended ({told}); the others end, too"


@pytest.mark.parametrize("kind", [ValueError("too many"), UserError("UNKNOWN: x"), MemoryError("UNKNOWN: x")])
def test_other_errors_ask_nobody(stopping, monkeypatch, kind):
    make, *_ = stopping
    monkeypatch.delattr(stop.Watchdog, "missing")
    with pytest.raises(type(kind)), make() as stopped, stopped.telling():
        raise kind


@pytest.mark.parametrize("process, named", [(0, 1), (0, 0), (1, 0)])
def test_a_process_that_is_lost_ends_all(stopping, monkeypatch, capfd, process, named):
    make, store, happened = stopping
    line = f"process {named} gives no sign of life"
    with make(process) as stopped:
        stopped._lost(line)
    assert happened == [("armed", 75, 2.0 if process == 0 else 0.0), "woken"]
    assert store.texts.get(f"end/{1 - process}") == (
        f"75 {line}" if process == 0 else None
    )  # else each finds out by itself
    told = capfd.readouterr().err
    assert f"error: {line}\n" in told and ("Current thread" in told) == (named == process)


def test_an_error_at_the_end_leaves_no_handlers(stopping, monkeypatch):
    make, _, _ = stopping
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(RuntimeError, match="gone"), make() as stopped:
        end = stopped._agreement.close
        monkeypatch.setattr(stopped._agreement, "close", lambda: (end(), (_ for _ in ()).throw(RuntimeError("gone"))))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
