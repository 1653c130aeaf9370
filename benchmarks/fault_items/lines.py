"""Results of runs of this benchmark, a line of JSON each, with what made it: a later run may be of other code."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.measure import record

MADE_BY = ("device", "cpu", "versions", "commit", "silence")  # in every line; older ones have none of them


def read(path: Path, seed: int) -> dict[tuple[str, Any], dict[str, Any]]:
    """Results that are there already, by kind and name; see ``record.read_lines``."""
    found = {}
    for result in record.read_lines(path, seed, "kills"):
        kind = next((kind for kind in ("undisturbed", "run", "fault", "move", "span") if kind in result), None)
        if kind is None:
            raise UserError(f"{path} holds results of another version; name another file.")
        name = result[kind]
        found[kind, tuple(name) if isinstance(name, list) else name] = result
    return found


def made_by(results: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What made results: of all, "differs" where they differ and "not recorded"; and in lines, with how many each."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(json.dumps([result.get(name) for name in MADE_BY]), []).append(result)
    told = []
    for group in groups.values():
        first, count = group[0], f"{len(group)} {'result' if len(group) == 1 else 'results'}"
        if not any(name in first for name in MADE_BY):
            told.append(f"{count}: commit, versions and SILENCE_TIMEOUT are not recorded.")
            continue
        versions = ", ".join(f"{name} {version}" for name, version in first.get("versions", {}).items())
        place = ", ".join(first[name] for name in ("device", "cpu") if name in first)
        limit = f"SILENCE_TIMEOUT={first['silence']:g}" if "silence" in first else "SILENCE_TIMEOUT is not recorded"
        told.append(
            f"{count}: {place}; {limit}; commit {first.get('commit') or 'unknown'}{versions and f'; {versions}'}."
        )
    values = {name: [result.get(name, "not recorded") for result in results] for name in MADE_BY}
    return {name: of[0] if of and all(x == of[0] for x in of) else "differs" for name, of in values.items()}, told
