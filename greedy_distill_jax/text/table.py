"""Rows that were encoded before, in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from greedy_distill_jax.text.protocol import TextEncoder


class TextTable:
    """Rows that were encoded before, in memory: what remains of an encoder that is too large to keep.

    Attributes:
      fingerprint: the encoder's; None where it has none.
    """

    def __init__(self, encoder: TextEncoder, prompts: Sequence[str]) -> None:
        """Args: `encoder` to ask once for each of `prompts`, by itself: rows depend on nothing but their prompt."""
        self.text_len, self.text_dim = encoder.text_len, encoder.text_dim
        self.fingerprint: str | None = getattr(encoder, "fingerprint", None)
        different = list(dict.fromkeys(prompts))
        self._rows = {prompt: encoder([prompt])[0] for prompt in different}

    def __call__(self, prompts: Sequence[str]) -> Float32[np.ndarray, "B M D"]:
        """Rows of every prompt; KeyError for one that was not encoded."""
        return np.stack([self._rows[prompt] for prompt in prompts])
