"""Prompts alone, for training that makes its own videos."""

from __future__ import annotations

import operator
import os
from typing import Any, SupportsIndex

from greedy_distill_jax.storage.records import fingerprint
from greedy_distill_jax.text.prompts import read_prompts


class Prompts:
    """Random-access source of captions: index -> {"caption": str}; picklable.

    Attributes:
      captions: all of them.
    """

    def __init__(self, prompts: str | os.PathLike) -> None:
        """Args: `prompts`, a .txt or .csv file, see `read_prompts`."""
        self._path, self._prompts = os.fspath(prompts), read_prompts(prompts)

    @property
    def captions(self) -> set[str]:
        """The prompts without their order."""
        return set(self._prompts)

    @property
    def fingerprint(self) -> str:
        """Tells these prompts, in their order, from any others."""
        return fingerprint(self._prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    def __repr__(self) -> str:
        return f"Prompts({self._path!r})"

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """One prompt; IndexError outside."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"{self!r}: index {index} is outside [0, {len(self)})")
        return {"caption": self._prompts[index]}


def open_prompts(path: str, *, split: str, size: int | None, frames: int | None, seed: int) -> tuple[Prompts, None]:
    """Opens a file of prompts; it has one split, no sizes and no codec. See `registry.load_source`."""
    return Prompts(path), None
