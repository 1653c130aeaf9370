"""What a file of named tensors offers, whatever its format; names are handed out without what wraps the model."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights import names
from greedy_distill_jax.weights.names import Index

PARTS = ("generator_ema", "generator", "model", "critic", "generator_lora")  # in the order in which one is chosen
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
      entries: name within the model -> what is stored.
      metadata: strings saved along with the tensors.
      part: the chosen dictionary of a `.pt`, or the chosen model of several in one file; "" where there is no choice.
      wrapper: what stands in front of the names, such as "model.diffusion_model.".
      besides: what else is stored, outside of the wrapper: first part of the names -> tensors.
      parts: what there is to choose from, in words; empty where there is no choice.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]
    part: str
    wrapper: str
    besides: dict[str, int]
    parts: tuple[str, ...]

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a tensor; ``index`` has one slice per axis."""
        ...


@dataclasses.dataclass(frozen=True)
class Named:
    """The tensors of one model among those stored; attributes as of `TensorFiles`."""

    entries: dict[str, Entry]
    part: str
    wrapper: str
    besides: dict[str, int]
    parts: tuple[str, ...]


def named(path: Path, stored: Iterable[Entry], part: str = "") -> Named:
    """Finds the model among stored tensors, whatever wraps it.

    Args:
      path: what the user named.
      stored: the tensors.
      part: of several models in one file the one to take: what stands in front of its names, or a part of that.

    Raises:
      UserError: several models and no choice, no such part, or two tensors that are the same parameter.
    """
    tensors = [(names.plain(entry.stored_name), entry) for entry in stored]
    found = names.wrappers(name for name, _ in tensors)
    wrapper, part = _choose(path, found, part)
    entries: dict[str, Entry] = {}
    besides: collections.Counter[str] = collections.Counter()
    for name, entry in tensors:
        if wrapper is None:  # of something else, whose wrapper's attribute is called "model" if it has one
            name = ".".join(piece for piece in name.split(".") if piece != "model")
        elif not name.startswith(wrapper):
            besides[name.partition(".")[0]] += 1
            continue
        _add(entries, name.removeprefix(wrapper or ""), entry)
    parts = tuple(one.rstrip(".") for one in found) if len(found) > 1 and "" not in found else ()
    return Named(entries, part, wrapper or "", dict(besides), parts)


def _choose(path: Path, found: list[str], part: str) -> tuple[str | None, str]:
    """(the wrapper of the wanted model, None where there is none; the part that it is, "" where it is the only one)."""
    if part:
        fitting = [wrapper for wrapper in found if fits(part, wrapper)]
        if len(fitting) != 1:
            has = (
                f"it has {listed(w.rstrip('.') for w in found)}" if len(found) > 1 else "it has no parts; leave it out"
            )
            raise UserError(f"{part!r} is not in {path}: {has}.", "part")
        return fitting[0], part
    if len(found) < 2 or "" in found:  # a bare model, with tensors that do not belong to it where there are others
        return ("" if "" in found else found[0] if found else None), ""
    for known in PARTS:
        fitting = [wrapper for wrapper in found if known in wrapper.split(".")]
        if len(fitting) == 1:
            return fitting[0], fitting[0].rstrip(".")
    raise UserError(f"{path} holds several models: {listed(w.rstrip('.') for w in found)}; choose one.", "part")


def fits(part: str, wrapper: str) -> bool:
    """Whether a part names what stands in front of the names of a model, or a part of that."""
    return part in (wrapper.rstrip("."), *wrapper.split("."))


def listed(values: Iterable[object], most: int = 8) -> str:
    """The values with commas between them, not more than some."""
    values = [str(value) for value in values]
    return ", ".join(values[:most]) + (f" and {len(values) - most} more" if len(values) > most else "")


def _add(entries: dict[str, Entry], name: str, entry: Entry) -> None:
    if name in entries:
        raise UserError(
            f"{entry.file}: tensors {entries[name].stored_name} and {entry.stored_name} are the same parameter {name}; "
            "remove one of them.",
            "path",
        )
    entries[name] = entry


def find_entry(path: Path, entries: Mapping[str, Entry], name: str) -> Entry:
    """The tensor of a name within a model.

    Raises:
      UserError: it is missing from ``path``, which the user named, or not of floating point.
    """
    if name in entries and not jnp.issubdtype(entries[name].dtype, jnp.floating):
        raise UserError(
            f"{entries[name].file}: tensor {entries[name].stored_name} has dtype {entries[name].dtype}; use weights of "
            "floating point (not quantised).",
            "path",
        )
    if name not in entries:
        raise UserError(
            f"{path}: tensor {name} is missing ({len(entries)} tensors found); the file is incomplete or of another "
            "model, download or export it again.",
            "path",
        )
    return entries[name]
