"""What all processes of a run say and see, for decisions that none of them may take alone."""

import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from greedy_distill_jax.errors import Lost

LOOKS, PAUSE = 70, 1.0  # of a folder, and seconds between two: NFS shows a host what is up to a minute old


def all_said(call: str, text: str = "") -> list[str]:
    """Texts of all processes, in their order; all have to call this, at the same place.

    Args:
      call: names the place, one line.
      text: of this process.

    Raises:
      RuntimeError: another process is at another place.
    """
    if jax.process_count() == 1:
        return [text]
    said = f"{call}\n{text}".encode()
    lengths = multihost_utils.process_allgather(np.int32(len(said)))
    room = 2 ** int(max(lengths)).bit_length()  # few sizes, each of which compiles a program
    letters = np.zeros(room, np.uint8)
    letters[: len(said)] = list(said)
    rows = multihost_utils.process_allgather(letters)
    found = [bytes(row[:length]).decode().partition("\n") for row, length in zip(rows, lengths, strict=True)]
    for process, (other, _, _) in enumerate(found):
        if other != call:
            raise RuntimeError(f"process {jax.process_index()} is at {call!r}, process {process} at {other!r}")
    return [text for _, _, text in found]


def all_see(directory: str, what: str, look: Callable[[], str], again: Callable[[], None] = lambda: None) -> str:
    """What every process sees in a folder; all have to call this. While they differ, all look again.

    Args:
      directory: the folder, for the error.
      what: is looked for, as `all_said`'s ``call``.
      look: what this process sees, as text.
      again: called before each further look.

    Raises:
      Lost: they still differ.
    """
    for left in reversed(range(LOOKS)):
        said = all_said(what, look())
        if len(set(said)) == 1:
            return said[0]
        if left:
            time.sleep(PAUSE)
            again()
    other = next(process for process, text in enumerate(said) if text != said[0])
    raise Lost(
        f"{directory}, {what}: process 0 sees {said[0] or 'nothing'}, process {other} {said[other] or 'nothing'}, for "
        f"{LOOKS * PAUSE:.0f} s; look whether both hosts have this folder, then run the same command again"
    )
