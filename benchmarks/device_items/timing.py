"""Synchronised medians within a given time, and errors relative to a reference."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from greedy_distill_jax.measure import clock

UNTUNED = {"xla_gpu_autotune_level": 0}  # for references, which are run once: float32 products take long to tune
SHORT = 5e-3  # seconds: runs that are shorter are timed several at once


def median_ms(run: Callable[[], Any], *, seconds: float, most: int = 100, least: int = 3) -> tuple[float, int]:
    """(median milliseconds of a run until its result is there, timed runs) after two that count for nothing.

    On a CPU, where this is a test of the command, ``least`` runs are enough.

    Args:
      run: returns device arrays, or has waited for its work itself.
      seconds: stop when so much time is spent, once there are ``least`` runs.
      most, least: timed runs.
    """
    most = least if jax.default_backend() == "cpu" else most
    jax.block_until_ready(run())
    first, times, begin = clock.seconds(run), [], time.perf_counter()
    together = 1 if first > SHORT else max(1, min(20, round(SHORT / max(first, 1e-5))))
    while len(times) < least or (len(times) < most and time.perf_counter() - begin < seconds):
        start, out = clock.now(), None
        for _ in range(together):
            out = run()
        jax.block_until_ready(out)
        times.append((clock.now() - start) / together)
    return 1e3 * statistics.median(times), len(times) * together


@jax.jit
def _error(found, expected):
    found, expected = (x.astype(jnp.float32) for x in (found, expected))
    return jnp.linalg.norm((found - expected).ravel()) / jnp.linalg.norm(expected.ravel())


def error(found, expected) -> float:
    """||found - expected|| / ||expected|| in float32."""
    return float(_error(jnp.asarray(found), jnp.asarray(expected)))
