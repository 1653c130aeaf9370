"""The one clock: CPU time of the process on a CPU, synchronised wall time on an accelerator; medians of what it read.

CPU time in one pinned thread does not count the neighbours on the machine; what an accelerator does shows in wall time
only, once its result is ready.
"""

import os
import statistics
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax

from greedy_distill_jax.distribution.freed_memory import keep_freed_memory

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def one_thread() -> None:
    """Limits work on the CPU to one thread, and to one core where there is no accelerator.

    Freed memory is kept, as the commands do it. It must be called before jax has a backend.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip()
    os.environ["OMP_NUM_THREADS"] = "1"
    keep_freed_memory()
    if jax.default_backend() == "cpu":
        core = {min(os.sched_getaffinity(0))}
        for thread in os.listdir("/proc/self/task"):  # the backend has started some already
            os.sched_setaffinity(int(thread), core)


def now() -> float:
    """Returns seconds: CPU time of the process on a CPU, wall time on an accelerator."""
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def seconds(run: Callable[[], Any]) -> float:
    """Measures from the call of ``run`` to the moment everything it returns is there."""
    start = now()
    jax.block_until_ready(run())
    return now() - start


def median_ms(run: Callable[[], Any], repeats: int) -> float:
    """Measures ``repeats`` runs after a first one, which may compile; returns the median in milliseconds."""
    seconds(run)
    return 1e3 * statistics.median(seconds(run) for _ in range(repeats))


class Laps:
    """Times of several things that are measured in turns, by name, and their medians.

    Turns make a comparison fair: what disturbs the machine for a while disturbs all of them.
    """

    def __init__(self):
        self._seconds: dict[Hashable, list[float]] = {}

    def time(self, name: Hashable, run: Callable[..., Any], *args, per: int = 1, counts: bool = True) -> Any:
        """Runs ``run(*args)`` and returns its result once all of it is there.

        Args:
          name: of the lap.
          run: what is measured.
          *args: of ``run``.
          per: the lap is divided by this number, such as the frames that ``run`` makes.
          counts: False for a run that compiles or warms up.
        """
        start = now()
        result = jax.block_until_ready(run(*args))
        spent = now() - start
        if counts:
            self._seconds.setdefault(name, []).append(spent / per)
        return result

    def median_ms(self, *names: Hashable) -> float:
        """Returns the median of all laps of ``names`` in milliseconds."""
        return 1e3 * statistics.median(lap for name in names for lap in self._seconds[name])

    def medians_ms(self) -> dict[Hashable, float]:
        """Returns the median lap of every name in milliseconds."""
        return {name: self.median_ms(name) for name in self._seconds}
