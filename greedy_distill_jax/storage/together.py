"""What all processes of a run say, for decisions that none of them may take alone."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def all_said(text: str) -> list[str]:
    """Texts of all processes, in their order; all have to call this, at the same place.

    Args:
      text: of this process.
    """
    if jax.process_count() == 1:
        return [text]
    said = text.encode()
    lengths = multihost_utils.process_allgather(np.int32(len(said)))
    room = 2 ** int(max(lengths)).bit_length()  # few sizes, each of which compiles a program
    letters = np.zeros(room, np.uint8)
    letters[: len(said)] = list(said)
    rows = multihost_utils.process_allgather(letters)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]
