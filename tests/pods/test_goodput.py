"""How often to save: the formula against a simulated job, and its optimum."""

import numpy as np
import pytest

from greedy_distill_jax.pods.goodput import goodput, interval


def _simulated(every, save, between, restart, days=2000.0, seed=0):
    """Part of a job's time that is training which stays, with faults at random, some in a save or a restart."""
    rng, end = np.random.default_rng(seed), days * 86400.0
    time = kept = 0.0
    while time < end:
        lives = rng.exponential(between)
        rounds = int(max(0.0, lives - restart) // (every + save))
        kept += rounds * every
        time += lives
    return kept / time


def test_goodput_is_that_of_a_simulated_job():
    save, between, restart = 20.0, 8 * 3600.0, 300.0
    best = interval(save, between)
    assert best == pytest.approx(np.sqrt(2 * 20 * 8 * 3600))
    values = {every: goodput(every, save, between, restart) for every in (best / 4, best / 2, best, 2 * best, 4 * best)}
    assert max(values, key=values.get) == best
    for every, value in values.items():
        assert value == pytest.approx(_simulated(every, save, between, restart), abs=0.01)


def test_a_job_that_only_restarts_gets_nothing_done():
    assert goodput(600.0, 20.0, 300.0, 300.0) == 0.0
