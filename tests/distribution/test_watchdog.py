"""Who is silent, or at a step that does not end, is found and named."""

import itertools
import queue
import threading
import time

import pytest

from greedy_distill_jax.distribution import watchdog
from greedy_distill_jax.distribution.watchdog import Sign, Watchdog, place_of, stalled
from greedy_distill_jax.errors import UserError
from tests.distribution.test_agreement import LONG, FakeStore


class Job:
    """Watchdogs of some processes in this one, each with a step of its own."""

    def __init__(self, processes, *, silence=LONG, stall=LONG, store=None, period=0.01):
        self.steps, self.lines = [0] * processes, queue.SimpleQueue()
        self.store = store or FakeStore()

        def watch(process):
            def found(line):
                self.lines.put((process, line))

            limits = {"silence": silence, "stall": stall, "period": period}
            return Watchdog(self.store, process, processes, lambda: self.steps[process], found, **limits)

        self.watch = watch
        self.dogs = {}

    def start(self, *processes):
        self.dogs |= {process: self.watch(process) for process in processes}

    def close(self, *processes):
        for process in processes or self.dogs:
            self.dogs[process].close()


def test_a_process_that_is_silent_is_named_by_the_first():
    job = Job(3, silence=0.3)
    job.start(0, 2)  # 1 died before it could say anything
    assert job.lines.get(timeout=LONG) == (0, "process 1 gives no sign of life for 0 s, since step 0")
    job.close()


def test_who_is_most_behind_by_the_last_sign(monkeypatch):
    """A sign is as old as a period when it is heard: steps that this process made meanwhile put nobody behind."""
    monkeypatch.setattr(Watchdog, "_talk", lambda _: None)  # a thread: here it is said when a sign is heard
    job = Job(3)
    assert Job(1).watch(0).slowest()[0] == 0
    job.start(0)
    dog, signs = job.dogs[0], itertools.count()

    def hear(own, *steps):
        job.steps[0] = own
        for process, step in enumerate(steps, 1):
            job.store.set(f"alive/{process}", f"{next(signs)} {step} training/loop.py:1 (run_loop)")
            dog._hear(process)
        return dog.slowest()

    assert hear(43, 41, 41)[1:] == (41, 0), "no sign before it"
    for own in (46, 49, 52):  # three steps in a period, one of which the others make after their sign
        _, step, begun = hear(own, own - 1, own - 1)
        assert step == own - 1 >= begun == own - 3
    assert hear(53, 53, 50) == (2, 50, 52)
    job.steps[0] = 60
    dog._hear(2)
    assert dog.slowest() == (2, 50, 52), "no new sign"
    assert hear(60, 60, 60)[1:] == (60, 53)
    job.close()


def test_the_step_since_when_a_process_is_silent():
    job = Job(2, silence=0.5)
    job.start(0)
    job.store.set("alive/1", "7 41 training/loop.py:1 (run_loop)")
    assert job.lines.get(timeout=LONG) == (0, "process 1 gives no sign of life for 0 s, since step 41")
    job.close()


def test_a_store_that_does_not_answer_is_the_first_process():
    """Which keeps it: stopped, it lets every call wait."""

    class Stopped(FakeStore):
        def get(self, key, seconds):
            time.sleep(LONG)

    job = Job(2, silence=0.2, store=Stopped())
    job.start(1)
    assert job.lines.get(timeout=LONG) == (1, "process 0 gives no sign of life for 0 s, since step 0")


def test_who_leaves_is_not_waited_for():
    job = Job(3, silence=1.0)  # on a busy machine a thread may rest for a good part of it
    job.start(0, 1, 2)
    job.close(1)
    time.sleep(0.1)
    job.close(0)  # then 2 has nobody to look at
    with pytest.raises(queue.Empty):
        job.lines.get(timeout=1.5)
    assert job.store.texts["alive/0"] == job.store.texts["alive/1"] == "left"
    job.close()


def test_who_gives_no_new_sign_when_a_computation_breaks():
    job = Job(3, silence=0.4)
    job.start(0, 1)
    job.store.set("alive/2", "9 41 training/loop.py:1 (run_loop)")  # its last one
    assert job.dogs[1].missing() == "process 2 gives no sign of life for 0 s"
    job.start(2)
    assert [job.dogs[process].missing() for process in (0, 1, 2)] == ["", "", ""]
    job.close()


def test_steps_that_go_on_are_no_stall():
    job = Job(2, stall=1.0)
    job.start(0, 1)
    for step in range(1, 12):
        job.steps = [step, step]
        time.sleep(0.12)
    assert job.lines.empty()
    job.steps = [13, 12]  # 1 has not begun it
    process, line = job.lines.get(timeout=LONG)
    assert process == 0 and line.startswith("process 1 has begun no step for 1 s since step 12, it is at ")
    job.close()


def test_the_slowest_is_named_or_who_is_elsewhere():
    waits, loads = Sign(5, "training/loop.py:167 (run_loop)"), Sign(5, "data/loader.py:88 (load)")
    line = "process {} has begun no step for 90 s since step {}, it is at {}; most are at " + waits.place
    assert stalled({0: waits, 1: waits, 2: loads}, 90.0) == line.format(2, 5, loads.place)
    assert stalled({0: waits, 1: Sign(4, waits.place), 2: loads}, 90.0) == line.format(1, 4, waits.place)
    assert stalled({0: waits, 1: waits}, 90.0) == line.format(0, 5, waits.place)


def test_the_place_of_a_thread_is_in_the_package():
    entered, leave = threading.Event(), threading.Event()

    def hold(_):
        entered.set()
        assert leave.wait(LONG)
        return 0.0

    class Held(FakeStore):
        def get(self, key, seconds):
            hold(key)

    thread = threading.Thread(target=lambda: watchdog.Watchdog._hear(dog, 1), daemon=True)
    dog = type("Dog", (), {"_store": Held(), "_period": 0.0, "_step": lambda _: 0})()
    thread.start()
    assert entered.wait(LONG)
    place = place_of(thread.ident)
    leave.set()
    assert place.startswith("distribution/watchdog.py:") and place.endswith("(_hear)")
    thread.join()
    assert place_of(thread.ident) == "its end"


def test_limits_are_variables(monkeypatch):
    assert (watchdog.seconds("SILENCE_TIMEOUT"), watchdog.seconds("STALL_TIMEOUT")) == (60, 3600)
    monkeypatch.setenv("STALL_TIMEOUT", "0")
    with pytest.raises(UserError, match="STALL_TIMEOUT is '0'; it must be a number of seconds, from 1 on"):
        watchdog.seconds("STALL_TIMEOUT")
