"""A model in any format as a tree of ours, read leaf by leaf, layer by layer; `open.open_source` recognises the format.

Formats: "original" (Wan's names in safetensors), "diffusers", "causal-pt" (`.pt` students and bare state dicts),
"torch-student" (a folder we exported) and "ours" (a converted folder or a training run).
"""

import abc
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from greedy_distill_jax.distribution.sharding import leaf_paths
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.checkpoint import Checkpointer
from greedy_distill_jax.weights import names
from greedy_distill_jax.weights.architecture import Config, as_config, describe, parameter_shapes, precision_of, wan_of
from greedy_distill_jax.weights.files import TensorFiles, find_entry
from greedy_distill_jax.weights.names import Index

FORMATS = ("original", "diffusers", "causal-pt", "torch-student", "ours")
STUDENT_FORMAT = "greedy_distill_jax/torch-student"  # "format" in the config.json of an exported student
METADATA = "greedy_distill_jax"  # key of our architecture in the metadata of a file
TEXT = "greedy_distill_jax.text"  # key of what encodes the prompts of a model, one of:
HASHED, ENCODER = "hashed_words", "encoder"  # the words that this package embeds itself; a text encoder


class Source(abc.ABC):
    """A model in any format.

    Attributes:
      path: what was opened.
      format: one of `FORMATS`.
      cfg: architecture.
      dtypes: leaf path -> dtype in which it is stored.
      meta: what came along: the "part", "parts", "wrapper" and "besides" of `TensorFiles`, the JSON of a checkpoint or
        of an exported student; "text" is `HASHED` or `ENCODER`, "" where nothing says it; "told" says what a Wan DiT's
        kind was chosen by, "precision" how FP8 weights are read.
      files: that the tensors are in; none for a run, whose checkpoints keep sums of their own.
    """

    path: Path
    format: str
    cfg: Config
    dtypes: dict[str, np.dtype]
    meta: dict[str, Any]
    files: tuple[Path, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path -> shape of every leaf of our tree."""
        return parameter_shapes(self.cfg)

    @property
    def places(self) -> tuple[Path, ...]:
        """Files and folders that it is made of, as they were named."""
        return (self.path,)

    @abc.abstractmethod
    def read_layer(self, path: str, layer: int, index: Index) -> np.ndarray:
        """A slice of one layer of a leaf (layer 0 is the leaf itself where it is not stacked)."""

    def read(self, path: str, index: Index, dtype: Any) -> np.ndarray:
        """A slice of a leaf of ours in the given dtype, assembled layer by layer."""
        shape = self.shapes[path]
        if not names.split_path(path)[1].stacked:
            return np.ascontiguousarray(self.read_layer(path, 0, index), dtype)
        layers = range(*index[0].indices(shape[0]))
        sizes = [len(range(*s.indices(n))) for s, n in zip(index[1:], shape[1:])]
        out = np.empty((len(layers), *sizes), dtype)
        for position, layer in enumerate(layers):
            out[position] = self.read_layer(path, layer, index[1:])
        return out


class ForeignSource(Source):
    """Tensors under other names.

    Args:
      path: what the user named.
      form: the format.
      files: where the tensors are.
      cfg: expected architecture; every tensor is checked against it.
      naming: "original" or "diffusers"; the exported student uses the original names.

    Raises:
      UserError: a missing, unexpected or differently shaped tensor.
    """

    def __init__(self, path: Path, form: str, files: TensorFiles, cfg: Config, naming: str, meta: dict[str, Any]):
        self.path, self.format, self.cfg, self.meta, self._files = path, form, cfg, meta, files
        self.files = tuple(dict.fromkeys(entry.file for entry in files.entries.values()))
        self._names = {leaf: names.foreign_names(leaf, shape, naming) for leaf, shape in self.shapes.items()}
        self.dtypes, expected = {}, set()
        for leaf, shape in self.shapes.items():
            wanted = names.foreign_shape(leaf, shape, patch=wan_of(cfg).patch)
            found = []
            for name in self._names[leaf]:
                entry = find_entry(path, files.entries, name)
                if entry.shape != wanted:
                    raise UserError(
                        f"{entry.file}: tensor {name} has shape {list(entry.shape)}, expected {list(wanted)} for "
                        f"{describe(cfg)}; use the config.json that belongs to these weights.",
                        "path",
                    )
                found.append(entry.dtype)
            self.dtypes[leaf] = functools.reduce(np.promote_types, found)
            expected.update(self._names[leaf])
        unexpected = sorted(set(files.entries) - expected)
        if unexpected:
            entry = files.entries[unexpected[0]]
            more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
            raise UserError(f"{entry.file}: unexpected tensor {entry.stored_name}{more}; use another file.", "path")

    def read_layer(self, path: str, layer: int, index: Index) -> np.ndarray:
        """See `Source`."""
        name = self._names[path][layer]
        try:
            value = self._files.read(name, names.foreign_index(path, index))
        except Exception as error:
            raise UserError(
                f"{self._files.entries[name].file}: tensor {name} cannot be read ({error}).", "path"
            ) from error
        return names.from_foreign(path, value, index)


class TreeSource(Source):
    """Parameters in memory, such as those of a notebook or of a step that is being trained.

    Args:
      cfg: architecture.
      params: our tree, as the model's ``init`` makes it.
      meta: "plan" and "latent_shape" for an exported student, "part" for a `.pt`.
    """

    path, format = Path("parameters"), "ours"

    def __init__(self, cfg: Config, params: Any, meta: Mapping[str, Any] = MappingProxyType({})):
        self.cfg, self.meta, self._leaves = cfg, dict(meta), dict(leaf_paths(params))
        if {leaf: tuple(x.shape) for leaf, x in self._leaves.items()} != self.shapes:
            raise UserError(
                f"these parameters are not those of {describe(cfg)}; give the config they were made with.", "path"
            )
        self.dtypes = {leaf: np.dtype(x.dtype) for leaf, x in self._leaves.items()}

    def read_layer(self, path: str, layer: int, index: Index) -> np.ndarray:
        """See `Source`."""
        value = np.asarray(self._leaves[path])
        return (value[layer] if names.split_path(path)[1].stacked else value)[index]


class OurSource(Source):
    """A converted folder or a training run: its averaged weights, unless the step keeps others only.

    Args:
      path: the folder that holds ``checkpoints``.
      part: "ema" or "params"; "" for "ema".
      step: None for the newest.
    """

    format = "ours"

    def __init__(self, path: Path, part: str = "", step: int | None = None):
        self.path, self._part, self._step = path, part or "ema", step
        if self._part not in ("ema", "params"):
            raise UserError(f"{part!r} is no part of {path}, a run; choose ema or params.", "part")
        self._checkpoints = Checkpointer(path / "checkpoints", read_only=True)
        self.meta = self._checkpoints.meta(step)
        self.meta.setdefault("text", _text_of(self.meta))
        if "network" not in self.meta:
            raise UserError(f"{path} does not say which network it holds; the step is damaged.", "path")
        self._tree = f"nets/{self.meta['network']}/{self._part}"
        try:
            self.cfg = as_config(self.meta["architecture"], precision_of(self.meta))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} names no architecture that can be converted ({error}).", "path") from error
        stored = self._checkpoints.shapes(step, self._tree)
        if {leaf: tuple(s.shape) for leaf, s in stored.items()} != self.shapes:
            differing = sorted(set(stored.items()) ^ set(self.shapes.items()), key=str)
            raise UserError(
                f"{path} does not hold the parameters of {describe(self.cfg)}; first: {differing[0][0]}.", "path"
            )
        self.dtypes = {leaf: np.dtype(s.dtype) for leaf, s in stored.items()}
        self._stored, self._rest = stored, iter(())
        self._group: dict[str, np.ndarray] = {}

    def read_layer(self, path: str, layer: int, index: Index) -> np.ndarray:
        """See `Source`; fast in the order of the tree: a group of leaves stays in memory until the next is needed."""
        if path not in self._group:
            self._group = {}
            self._group = next(self._rest, {})
        if path not in self._group:  # not the next one: start there
            self._group, order = {}, list(self.shapes)
            wanted = {leaf: self._stored[leaf] for leaf in order[order.index(path) :]}
            self._rest = self._checkpoints.read_groups(self._step, self._tree, wanted)
            self._group = next(self._rest)
        value = self._group[path]
        return (value[layer] if names.split_path(path)[1].stacked else value)[index]

    def factors(self) -> dict[str, np.ndarray]:
        """Path -> factor of every linear that LoRA trained (".../lora_A" [layers, in, rank], ".../lora_B" [layers,
        rank, out]), of the last update whatever the part; UserError for a run without."""
        tree = f"nets/{self.meta['network']}/opt_state/factors"
        read = self._checkpoints.restore_subtree(self._step, tree)
        return {path: np.asarray(leaf) for path, leaf in leaf_paths(read)}


def _text_of(meta: Mapping[str, Any]) -> str:
    """What encodes the prompts of a run or of converted weights."""
    try:
        if "source" in meta:  # converted; by a version that did not say it, perhaps
            return meta["source"].get("text", "")
        return ENCODER if json.loads(meta["config"])["data"]["text"] else HASHED
    except (KeyError, TypeError, ValueError):
        return ""
