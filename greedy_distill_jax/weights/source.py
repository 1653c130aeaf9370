"""Any format as a tree of ours: recognised by what is there, read leaf by leaf, layer by layer.

Formats: "original" (Wan's names in safetensors), "diffusers", "causal-pt" (`.pt` students and bare state dicts),
"torch-student" (a folder we exported) and "ours" (a converted folder or a training run).
"""

import abc
import collections
import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from greedy_distill_jax.distribution.sharding import leaf_paths
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students.config import StudentConfig
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.storage.checkpoint import Checkpointer
from greedy_distill_jax.weights import names
from greedy_distill_jax.weights.files import SafetensorsFiles, TensorFiles, TorchFile, files_of_index, safetensors_in
from greedy_distill_jax.weights.names import Index

Config = WanConfig | StudentConfig
FORMATS = ("original", "diffusers", "causal-pt", "torch-student", "ours")
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
STUDENT_FORMAT = "greedy_distill_jax/torch-student"  # "format" in the config.json of an exported student
METADATA = "greedy_distill_jax"  # key of our architecture in the metadata of a file


def wan_of(cfg: Config) -> WanConfig:
    """The sizes of the blocks."""
    return cfg.base if isinstance(cfg, StudentConfig) else cfg


@functools.lru_cache(maxsize=16)
def parameter_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter, in the order of the tree."""
    model, wan = (Student(cfg) if isinstance(cfg, StudentConfig) else Teacher(cfg)), wan_of(cfg)
    latent = (1, wan.patch, wan.patch, wan.channels)
    tree = jax.eval_shape(lambda key: model.init(key, latent), jax.random.key(0))
    return {path: tuple(leaf.shape) for path, leaf in leaf_paths(tree)}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return root


def as_config(fields: Mapping[str, Any], wan_changes: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """A configuration from the JSON of an architecture, the blocks' fields ``wan_changes`` on top.

    Raises:
      ValueError, TypeError, KeyError: it is none.
    """
    fields = dict(fields)
    kind = fields.pop("kind", "student" if "etm_layers" in fields else "teacher")
    if kind != "student":
        fields = fields.get("base", fields)
        known = {f.name for f in dataclasses.fields(WanConfig)}
        return WanConfig(**{**{k: v for k, v in fields.items() if k in known}, **wan_changes})
    fields["base"] = WanConfig(**{**fields["base"], **wan_changes})
    return StudentConfig(**{k: tuple(v) if k.endswith("_layers") else v for k, v in fields.items()})


def _precision(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's configuration says of its DiT beyond the architecture: dtype, remat, initialisation."""
    model = json.loads(meta.get("config", "{}")).get("model", {})
    chosen = {k: v for k, v in model.items() if v is not None}
    known = {f.name for f in dataclasses.fields(WanConfig)}
    return {k: v for k, v in {**WAN_SIZES.get(chosen.get("size"), {}), **chosen}.items() if k in known}


class Source(abc.ABC):
    """A model in any format.

    Attributes:
      path: what was opened.
      format: one of `FORMATS`.
      cfg: architecture.
      dtypes: leaf path -> dtype in which it is stored.
      meta: what came along: "part" of a `.pt`, the JSON of a checkpoint or of an exported student.
    """

    path: Path
    format: str
    cfg: Config
    dtypes: dict[str, np.dtype]
    meta: dict[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path -> shape of every leaf of our tree."""
        return parameter_shapes(self.cfg)

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
        self._names = {leaf: names.foreign_names(leaf, shape, naming) for leaf, shape in self.shapes.items()}
        self.dtypes, expected = {}, set()
        for leaf, shape in self.shapes.items():
            wanted = names.foreign_shape(leaf, shape, patch=wan_of(cfg).patch)
            found = []
            for name in self._names[leaf]:
                entry = files.entries.get(name)
                if entry is None:
                    raise UserError(
                        f"{path}: tensor {name} is missing ({len(files.entries)} tensors found); the file is "
                        "incomplete or of another model, download or export it again."
                    )
                if entry.shape != wanted:
                    raise UserError(
                        f"{entry.file}: tensor {name} has shape {list(entry.shape)}, expected {list(wanted)} for "
                        f"{describe(cfg)}; use the config.json that belongs to these weights."
                    )
                found.append(entry.dtype)
            self.dtypes[leaf] = functools.reduce(np.promote_types, found)
            expected.update(self._names[leaf])
        unexpected = sorted(set(files.entries) - expected)
        if unexpected:
            entry = files.entries[unexpected[0]]
            image = any(re.search(r"k_img|v_img|img_emb|add_k_proj|image_embedder", name) for name in unexpected)
            remedy = "these are image-to-video weights; use a text-to-video model" if image else "use another file"
            more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
            raise UserError(f"{entry.file}: unexpected tensor {entry.stored_name}{more}; {remedy}.")

    def read_layer(self, path: str, layer: int, index: Index) -> np.ndarray:
        """See `Source`."""
        name = self._names[path][layer]
        try:
            value = self._files.read(name, names.foreign_index(path, index))
        except Exception as error:
            raise UserError(f"{self._files.entries[name].file}: tensor {name} cannot be read ({error}).") from error
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
            raise UserError(f"these parameters are not those of {describe(cfg)}; give the config they were made with.")
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
        self._checkpoints = Checkpointer(path / "checkpoints", read_only=True)
        self.meta = self._checkpoints.meta(step)
        try:
            self.cfg = as_config(self.meta["architecture"], _precision(self.meta))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} names no architecture that can be converted ({error}).") from error
        stored = self._checkpoints.shapes(step, self._part)
        if {leaf: tuple(s.shape) for leaf, s in stored.items()} != self.shapes:
            differing = sorted(set(stored.items()) ^ set(self.shapes.items()), key=str)
            raise UserError(f"{path} does not hold the parameters of {describe(self.cfg)}; first: {differing[0][0]}.")
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
            self._rest = self._checkpoints.read_groups(self._step, self._part, wanted)
            self._group = next(self._rest)
        value = self._group[path]
        return (value[layer] if names.split_path(path)[1].stacked else value)[index]


def describe(cfg: Config) -> str:
    """One line: kind and sizes."""
    wan = wan_of(cfg)
    sizes = f"dim {wan.dim}, ffn {wan.ffn_dim}, {wan.num_heads} heads"
    if isinstance(cfg, StudentConfig):
        return f"a student (ETM {len(cfg.etm_layers)} + SDD {len(cfg.sdd_layers)} layers, {sizes}, {cfg.fusion})"
    return f"a Wan DiT ({wan.num_layers} layers, {sizes})"


def open_source(
    path: str | Path, *, part: str = "", step: int | None = None, heads: int | None = None, text_len: int | None = None
) -> Source:
    """Recognises and opens a model.

    Args:
      path: a safetensors file or its index.json, a `.pt` / `.pth` file, a folder with one of them, the folder of a
        diffusers pipeline, an exported student, a converted folder or a training run.
      part: dictionary of a `.pt` (`files.PARTS`), or "ema" / "params" of a run; "" for the default.
      step: of a training run; None for the newest.
      heads, text_len: where no config.json tells (heads are otherwise assumed to be of 128 channels).

    Raises:
      UserError: nothing that is known, or a model that cannot be used; names file, tensor and remedy.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist; name a file or a folder with weights.")
    if path.is_dir() and (path / "checkpoints").is_dir():
        return OurSource(path, part, step)
    if path.is_dir() and (path / "transformer").is_dir() and not safetensors_in(path):
        path = path / "transformer"  # a diffusers pipeline
    files = tensor_files(path, part)
    folder = path if path.is_dir() else path.parent
    config = read_config(folder / "config.json")
    naming = names.naming_of(files.entries)
    if naming is None:
        some = ", ".join(sorted(files.entries)[:2]) or "none"
        raise UserError(f"{path}: its tensors ({some}, ...) are not those of a Wan text-to-video DiT or of a student.")
    if naming == "student":
        if config.get("format") != STUDENT_FORMAT:
            raise UserError(f"{folder}: config.json is missing or not that of an exported student; copy it there.")
        try:
            cfg = as_config(config["architecture"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / 'config.json'} describes no student ({error!r}); export it again.") from error
        return ForeignSource(path, "torch-student", files, cfg, "original", config)
    form = "causal-pt" if isinstance(files, TorchFile) else naming
    cfg = _wan_config(path, files, naming, config, heads, text_len)
    return ForeignSource(path, form, files, cfg, naming, {"part": files.part, "naming": naming})


def tensor_files(path: Path, part: str = "") -> TensorFiles:
    """The tensors of a file, of an index.json or of the one model in a folder; ``part`` of a `.pt` (`files.PARTS`)."""
    if path.is_dir():
        if found := safetensors_in(path):
            return SafetensorsFiles(found)
        found = sorted(p for p in path.iterdir() if p.suffix in TORCH_SUFFIXES)
        if len(found) == 1:
            return TorchFile(found[0], part)
        several = f"several files ({', '.join(p.name for p in found[:4])}); name one of them" if found else ""
        raise UserError(f"{path} holds {several or 'no safetensors, .pt or checkpoints; name a folder with weights'}.")
    if path.name.endswith(".index.json"):
        return SafetensorsFiles(files_of_index(path))
    if path.suffix == ".safetensors":
        return SafetensorsFiles([path])
    if path.suffix in TORCH_SUFFIXES:
        return TorchFile(path, part)
    raise UserError(f"{path} is neither .safetensors nor one of {', '.join(TORCH_SUFFIXES)}; name a file with weights.")


def read_config(file: Path) -> dict[str, Any]:
    """The dictionary in a config.json, {} if there is none; UserError when it is no JSON."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no JSON ({error}); remove it or copy the right one.") from error
    return config if isinstance(config, dict) else {}


# config.json of Wan's repository and of diffusers -> ours.
_KEYS = {
    "original": {"dim": "dim", "ffn_dim": "ffn_dim", "freq_dim": "freq_dim", "num_heads": "num_heads",
                 "num_layers": "num_layers", "text_len": "text_len", "eps": "eps", "in_dim": "channels"},
    "diffusers": {"ffn_dim": "ffn_dim", "freq_dim": "freq_dim", "num_attention_heads": "num_heads",
                  "num_layers": "num_layers", "eps": "eps", "in_channels": "channels", "text_dim": "text_dim"},
}  # fmt: skip


def _wan_config(path: Path, files: TensorFiles, naming: str, config: Mapping, heads, text_len) -> WanConfig:
    """What the file says of itself, then config.json, then the shapes of the tensors."""
    if METADATA in files.metadata:
        try:
            return as_config(json.loads(files.metadata[METADATA]))
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"{path}: metadata {METADATA!r} describes no model ({error}); export it again.") from error

    def shape(leaf: str) -> tuple[int, ...]:
        name = names.foreign_names(leaf, (1,), naming)[0]
        if name not in files.entries:
            raise UserError(f"{path}: tensor {name} is missing; the file is incomplete, download it again.")
        return files.entries[name].shape

    patch = shape("embed/patch/kernel")
    if len(patch) != 5 or patch[2] != 1 or patch[3] != patch[4]:
        raise UserError(f"{path}: tensor patch_embedding.weight has shape {list(patch)}, expected [dim, C, 1, p, p].")
    layers = [int(found[1]) for name in files.entries if (found := re.match(r"blocks\.(\d+)\.", name))]
    fields = dict(
        dim=patch[0], channels=patch[1], patch=patch[3], num_layers=max(layers, default=0) + 1,
        ffn_dim=shape("blocks/ffn/up/kernel")[0], freq_dim=shape("embed/time_in/kernel")[-1],
        text_dim=shape("embed/text_in/kernel")[-1],
    )  # fmt: skip
    by_width = {size["dim"]: size["num_heads"] for size in WAN_SIZES.values() if size["dim"] > 1000}
    fields["num_heads"] = by_width.get(fields["dim"], fields["dim"] // 128)
    fields.update({ours: config[theirs] for theirs, ours in _KEYS[naming].items() if theirs in config})
    if naming == "diffusers" and {"num_attention_heads", "attention_head_dim"} <= set(config):
        fields["dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    fields.update({k: v for k, v in (("num_heads", heads), ("text_len", text_len)) if v is not None})
    try:
        return WanConfig(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error} Name the number of heads with --heads.") from error


def summary(source: Source) -> dict[str, Any]:
    """What `convert inspect` prints: format, architecture, tensors, dtypes, parameters."""
    counts = collections.Counter(str(dtype) for dtype in source.dtypes.values())
    tensors = sum(shape[0] if names.split_path(leaf)[1].stacked else 1 for leaf, shape in source.shapes.items())
    return dict(
        format=source.format,
        architecture=describe(source.cfg),
        leaves=len(source.shapes),
        tensors=tensors,
        parameters=sum(int(np.prod(shape)) for shape in source.shapes.values()),
        dtypes=dict(counts),
    )
