"""What a file of named tensors offers, whatever its format; names are handed out clean (see `names.clean`)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights.names import Index, clean

AGAIN = "download or copy it again"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One stored tensor."""

    stored_name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path


@runtime_checkable
class TensorFiles(Protocol):
    """What both readers offer.

    Attributes:
      entries: clean name -> what is stored.
      metadata: strings saved along with the tensors.
      part: the chosen dictionary of a `.pt`; "" for safetensors.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]
    part: str

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a tensor; ``index`` has one slice per axis."""
        ...


def add_entry(entries: dict[str, Entry], entry: Entry) -> None:
    """Adds a stored tensor under its clean name; UserError when two tensors are the same parameter."""
    name = clean(entry.stored_name)
    if name in entries:
        raise UserError(
            f"{entry.file}: tensors {entries[name].stored_name} and {entry.stored_name} are the same parameter {name}; "
            "remove one of them.",
            "path",
        )
    entries[name] = entry


def find_entry(path: Path, entries: Mapping[str, Entry], name: str) -> Entry:
    """The tensor of a clean name; UserError, with the ``path`` that the user named, when it is missing."""
    if name not in entries:
        raise UserError(
            f"{path}: tensor {name} is missing ({len(entries)} tensors found); the file is incomplete or of another "
            "model, download or export it again.",
            "path",
        )
    return entries[name]
