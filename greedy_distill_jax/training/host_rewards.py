"""Rewards on the host: the part of a step between a rollout and its update."""

import concurrent.futures
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from greedy_distill_jax import rewards
from greedy_distill_jax.distribution.rows import Rows
from greedy_distill_jax.rewards import HostView, RewardTerm
from greedy_distill_jax.training.reinforce import REWARD


class HostRewards:
    """Judges what a rollout hands on, each process its own streams; the ``call`` of a host part.

    With staleness 1 the judgement runs in a thread: what is handed on is the episode before, with what it was worth,
    and the one that was just made waits for the next step. In the first step of a training, also of one that is
    resumed, there is none before: its own episode is handed on as one that nobody judged.
    """

    def __init__(self, terms: Sequence[RewardTerm], group: int, failed: str, fps: float, staleness: int):
        """Args: ``terms`` of kind "host" and "http"; ``group``: streams per prompt; ``failed``: see
        ``rewards.on_host``; ``fps``: of the videos; ``staleness``: 0 or 1."""
        self._terms, self._group, self._failed, self._fps = tuple(terms), group, failed, fps
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "rewards") if staleness else None
        self._waiting: tuple[concurrent.futures.Future, Mapping[str, Any]] | None = None

    def __call__(self, state: None, frozen: None, batch: Rows, carry: Rows):
        """(None, no metrics, the episode with "rewards/NAME", one per stream of this process)."""
        captions = [caption for caption in batch["captions"] for _ in range(self._group)]
        handed_on = {name: x for name, x in carry.arrays.items() if name not in ("video", "first")}
        if self._pool is None:
            return None, {}, handed_on | self._judge(carry, captions)
        before, self._waiting = self._waiting, (self._pool.submit(self._judge, carry, captions), handed_on)
        if before is None:
            unknown = np.full(len(captions), np.nan, np.float32)
            return None, {}, handed_on | {f"{REWARD}{term.name}": unknown for term in self._terms}
        found, episode = before
        return None, {}, episode | found.result()

    def _judge(self, carry: Rows, captions: list[str]) -> dict[str, np.ndarray]:
        view = HostView(carry["video"], carry["first"], captions, self._fps)
        found = rewards.on_host(self._terms, view, failed=self._failed)
        return {f"{REWARD}{name}": x for name, x in found.items()}
