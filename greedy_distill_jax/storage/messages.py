"""What is said of checkpoints that are not there, damaged, or of something else."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.trees import Path


class Damaged(UserError):
    """A checkpoint that was complete once and cannot be read.

    Attributes:
      told: which one and why, without a remedy.
    """

    def __init__(self, told: str, others: list[int]):
        remedy = f"name another step, of {', '.join(map(str, others))}" if others else "there is no other one"
        super().__init__(f"{told}; {remedy}", "step")
        self.told = told


def none_in(directory: str) -> UserError:
    """Returns the error for a directory without a complete checkpoint."""
    return UserError(
        f"{directory} holds no complete checkpoint; name the directory of a run that has saved one, or train it first."
    )


def check_architecture(
    where: str, stored: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Compares two architectures, of which ``where`` ("DIRECTORY step N") holds the first; UserError names keys.

    A step that lacks a key is older than it, and had what is the key's default since.
    """
    given = json.loads(json.dumps(given))
    stored = {**{key: value for key, value in defaults.items() if key in given}, **stored}
    differing = [key for key in sorted({*stored, *given}) if stored.get(key) != given.get(key)]
    _refuse(where, [f"{key} {stored.get(key)!r}, not {given.get(key)!r}" for key in differing])


def check_leaves(
    where: str, stored: Mapping[Path, jax.ShapeDtypeStruct], wanted: Mapping[Path, jax.ShapeDtypeStruct]
) -> None:
    """Compares paths, shapes and dtypes of two states as `check_architecture` does; UserError names leaves."""
    parts = []
    for path in sorted({*stored, *wanted}):
        has, needs = (_describe(tree.get(path)) for tree in (stored, wanted))
        if has != needs:
            parts.append(f"{'/'.join(path)} is {has}, not {needs}")
    _refuse(where, parts)


def _refuse(where: str, parts: list[str]) -> None:
    if parts:
        more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
        raise UserError(
            f"{where} holds another architecture: {', '.join(parts[:3])}{more}; "
            "use the configuration the run was started with, or another directory."
        )


def _describe(leaf: jax.ShapeDtypeStruct | None) -> str:
    return "absent" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
