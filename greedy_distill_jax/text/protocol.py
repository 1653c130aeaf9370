"""What a text encoder is: prompts to a fixed number of rows, padded with zeros (attended without a mask, as in Wan)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32


@runtime_checkable
class TextEncoder(Protocol):
    """It turns prompts into rows; rows past the true length are zero after encoding.

    Attributes:
      text_len: rows M per prompt (512 for Wan).
      text_dim: width of a row (4096 for Wan).
    """

    text_len: int
    text_dim: int

    def __call__(self, prompts: Sequence[str]) -> Float32[np.ndarray, "B M D"]:
        """Rows of every prompt, float32 [B, text_len, text_dim]."""
        ...
