"""Hashed words: an encoder that needs no files, for models that learn their own words."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from greedy_distill_jax.errors import UserError


def words_of(prompt: str) -> list[str]:
    """The words of a prompt: lower-case runs of letters and digits."""
    return re.findall(r"[^\W_]+", prompt.lower())


class HashWordEncoder:
    """One row per word, drawn from N(0, 1) by the SHA-256 of the word: no files, open vocabulary, equal everywhere.

    Words are lower-case runs of letters and digits. The empty prompt is all zeros (the unconditional embedding).
    """

    def __init__(self, text_len: int = 16, text_dim: int = 32) -> None:
        """Args: `text_len` rows per prompt, `text_dim` their width, both at least 1."""
        if text_len < 1 or text_dim < 1:
            field = "text_len" if text_len < 1 else "text_dim"
            raise UserError(f"HashWordEncoder: text_len={text_len}, text_dim={text_dim}; use at least 1 each", field)
        self.text_len, self.text_dim = text_len, text_dim
        self._rows: dict[str, np.ndarray] = {}

    def __call__(self, prompts: Sequence[str]) -> Float32[np.ndarray, "B M D"]:
        """Rows of every prompt; a prompt of more than `text_len` words is cut with a warning that says where."""
        if isinstance(prompts, str):
            raise TypeError("HashWordEncoder: expected a list of prompts, got one string; wrap it in a list")
        out = np.zeros((len(prompts), self.text_len, self.text_dim), np.float32)
        for rows, prompt in zip(out, prompts, strict=True):
            words = words_of(prompt)
            if len(words) > self.text_len:
                warnings.warn(
                    f"prompt {prompt[:60]!r} has {len(words)} words, text_len is {self.text_len}: cut after "
                    f"{words[self.text_len - 1]!r} (word {self.text_len})",
                    stacklevel=2,
                )
            for row, word in zip(rows, words, strict=False):
                row[:] = self._row(word)
        return out

    def _row(self, word: str) -> np.ndarray:
        if word not in self._rows:
            # RandomState is numpy's frozen generator: the same numbers in every version.
            seed = np.frombuffer(hashlib.sha256(word.encode()).digest(), "<u4")
            self._rows[word] = np.random.RandomState(seed).standard_normal(self.text_dim).astype(np.float32)
        return self._rows[word]
