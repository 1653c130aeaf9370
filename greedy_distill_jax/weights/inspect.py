"""What a model in any format is, in words."""

import collections
import hashlib
from collections.abc import Iterator

import numpy as np

from greedy_distill_jax.models.students.config import CausalConfig, StudentConfig
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.weights import names
from greedy_distill_jax.weights.architecture import architecture_json, describe
from greedy_distill_jax.weights.files import listed
from greedy_distill_jax.weights.health import findings
from greedy_distill_jax.weights.source import Source


def tensor_count(source: Source) -> int:
    """Returns the number of tensors under Wan's names, where ours are stacked over layers."""
    return sum(shape[0] if names.split_path(leaf)[1].stacked else 1 for leaf, shape in source.shapes.items())


def title(source: Source) -> str:
    """Returns the format, the part and what wraps its names, in a few words."""
    part, wrapper = source.meta.get("part"), source.meta.get("wrapper")
    return source.format + (f", part {part}" if part else "") + (f", names behind {wrapper}" if wrapper else "")


def besides(source: Source) -> str:
    """Returns what the file holds that is no part of the model, "" for nothing."""
    found = source.meta.get("besides") or {}
    return listed(f"{name} ({count} tensors)" for name, count in found.items())


def kind_of(source: Source) -> str:
    """Returns what a model was trained to be, in a word or two."""
    kinds = {WanConfig: "teacher", StudentConfig: "student", CausalConfig: "causal student"}
    return kinds[type(source.cfg)]


def report(source: Source, *, tensors: bool = False) -> Iterator[str]:
    """Yields the lines of `convert inspect`: format, files, architecture, parameters, dtypes, odd values.

    Args:
      source: from `open_source`.
      tensors: also a line for every leaf.
    """
    yield f"format        {title(source)}"
    if parts := source.meta.get("parts"):
        yield f"parts         {listed(parts)}"
    for file in source.files:
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        yield f"file          {file.name}, {file.stat().st_size:,} bytes, sha256 {digest}"
    if precision := source.meta.get("precision"):
        yield f"precision     {precision}"
    if more := besides(source):
        yield f"besides       {more}, not read"
    yield f"architecture  {describe(source.cfg)}"
    if told := source.meta.get("told"):
        yield f"kind          {kind_of(source)} ({told})"
    for name, value in architecture_json(source.cfg).items():
        yield f"  {name} = {value}"
    parameters = sum(int(np.prod(shape)) for shape in source.shapes.values())
    yield f"parameters    {parameters:,} in {tensor_count(source):,} tensors ({len(source.shapes)} stacked)"
    counts = collections.Counter(str(dtype) for dtype in source.dtypes.values())
    yield f"dtypes        {', '.join(f'{name} ({count} stacked)' for name, count in counts.items())}"
    yield from findings(source)
    if tensors:
        for path, shape in source.shapes.items():
            first = names.foreign_names(path, shape, "original")[0]
            yield f"  {path} {list(shape)} {source.dtypes[path]}  <- {first}"
