"""LoRA weights of other programs, merged into a model while it is read: W + scale alpha / rank B A.

A module of a model has a name of Wan's or of diffusers'; adapters write it with dots or, as kohya's programs do, with
underscores, behind a prefix of their own, and call A `lora_A` or `lora_down`. Beside the factors there may be `alpha`
and whole differences: `diff` of a weight, `diff_b` or `lora_B.bias` of a bias, `diff_m` of a modulation (lightx2v).
"""

import collections
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights import names
from greedy_distill_jax.weights.adapter import DIFFUSERS_FILE, PEFT_FILES
from greedy_distill_jax.weights.architecture import describe, wan_of
from greedy_distill_jax.weights.files import TensorFiles, listed
from greedy_distill_jax.weights.names import Index
from greedy_distill_jax.weights.source import Source
from greedy_distill_jax.weights.tensor_files import read_config, tensor_files

# (what the end of a tensor's name says, its role): PEFT's may hold the name of the adapter, as in "lora_A.default".
_ROLES = (
    (r"\.(?:lora_A|lora_down|lora\.down)(?:\.(?!weight$)[^.]+)?\.weight", "a"),
    (r"\.(?:lora_B|lora_up|lora\.up)(?:\.(?!weight$)[^.]+)?\.weight", "b"),
    (r"\.(?:lora_B|lora_up)(?:\.(?!bias$)[^.]+)?\.bias", "scaled_bias"),
    (r"\.alpha", "alpha"),
    (r"\.diff", "weight"),
    (r"\.diff_b", "bias"),
    (r"\.diff_m", "modulation"),
)
_OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with a middle factor",
}
_KOHYA = re.compile(r"^(?:lora_unet_|lora_transformer_|lycoris_)_?")
_PREFIX = re.compile(r"^(?:base_model\.model|transformer)\.")  # what PEFT's and diffusers' patterns do not have
_METADATA = "lora_adapter_metadata"  # key of diffusers in the metadata of a file


def is_adapter(files: TensorFiles) -> bool:
    """Whether tensors are those of an adapter, of LoRA or its kin, rather than of a model."""
    return not names.wrappers(files.entries) and any(
        _role(name) or any(other in name for other in _OTHERS) for name in files.entries
    )


def _role(name: str) -> tuple[str, str] | None:
    """(module, role) of a tensor's name."""
    for pattern, role in _ROLES:
        if found := re.fullmatch(f"(.+?){pattern}", name):
            return found[1], role
    return None


@dataclasses.dataclass(frozen=True)
class Module:
    """What an adapter has for one module.

    Attributes:
      tensors: role -> name of the tensor in the file.
      rank: of the factors; 0 without factors.
      alpha: None where neither the file nor its configuration says one.
      factor: on B A, alpha / rank.
    """

    tensors: Mapping[str, str]
    rank: int
    alpha: float | None
    factor: float


class Adapter:
    """The LoRA weights of a file, or of a folder by PEFT or diffusers.

    Args:
      path: file or folder.
      part: dictionary of a `.pt`; "" for `generator_lora` or the only one.

    Attributes:
      files: the tensors.
      modules: name as it is stored -> what there is for it.

    Raises:
      UserError: no adapter, one of another method, or factors that are not complete.
    """

    def __init__(self, path: str | Path, part: str = ""):
        self.path = path = Path(path).expanduser()
        if not path.exists():
            raise UserError(f"{path} does not exist; name a file or a folder with LoRA weights.", "lora")
        path = _file(path)
        self.files = tensor_files(path, part)
        config, grouped = self._config(path), collections.defaultdict(dict)
        for name in self.files.entries:
            if other := next((other for key, other in _OTHERS.items() if key in name), ""):
                raise UserError(
                    f"{path}: tensor {name} is one of {other}; merge LoRA weights, or this in its own program.", "lora"
                )
            found = _role(name)
            if found is None:
                raise UserError(
                    f"{path}: tensor {name} is neither a factor of LoRA nor a difference; name a file of LoRA weights.",
                    "lora",
                )
            if found[1] in (group := grouped[found[0]]):
                raise UserError(
                    f"{path}: tensors {group[found[1]]} and {name} are the same; remove one of them.", "lora"
                )
            group[found[1]] = name
        self.modules = {module: self._module(path, module, tensors, config) for module, tensors in grouped.items()}

    def _config(self, path: Path) -> Mapping[str, Any]:
        """What PEFT's adapter_config.json or diffusers' metadata says, {} without either."""
        folder = path if path.is_dir() else path.parent
        config = read_config(folder / PEFT_FILES[1]) if path.is_dir() or path.name.startswith("adapter_model") else {}
        try:
            for key, value in json.loads(self.files.metadata.get(_METADATA, "{}")).items():
                config.setdefault(key.rpartition(".")[2], value)
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: its metadata {_METADATA!r} says nothing ({error}); remove it.", "lora") from error
        if config.get("use_dora"):
            raise UserError(f"{path} holds an adapter of DoRA; merge LoRA weights, or this in PEFT.", "lora")
        return config

    def _module(self, path: Path, module: str, tensors: dict[str, str], config: Mapping[str, Any]) -> Module:
        if ("a" in tensors) != ("b" in tensors):
            has, lacks = ("A", "B") if "a" in tensors else ("B", "A")
            raise UserError(f"{path}: module {module} has {has} and no {lacks}; the file is not complete.", "lora")
        if tensors.keys() == {"alpha"}:
            raise UserError(f"{path}: module {module} has an alpha and nothing else; the file is not complete.", "lora")
        if "a" not in tensors:
            return Module(tensors, 0, None, 1.0)
        rank, alpha = self.files.entries[tensors["a"]].shape[0], config.get("lora_alpha")
        if "alpha" in tensors:
            alpha = float(np.asarray(self._read(tensors["alpha"]), np.float64).reshape(-1)[0])
        elif pattern := config.get("alpha_pattern"):
            alpha = self._of_pattern(path, pattern, tensors["a"], alpha)
        if alpha is not None and not isinstance(alpha, float | int):
            raise UserError(f"{path}: the alpha of module {module} is {alpha!r}, which is no number.", "lora")
        alpha = None if alpha is None else float(alpha)
        over = rank**0.5 if config.get("use_rslora") else rank
        return Module(tensors, rank, alpha, 1.0 if alpha is None else alpha / over)

    def _of_pattern(self, path: Path, pattern: Any, name: str, alpha: Any) -> Any:
        """The alpha that PEFT's `alpha_pattern` has for the module of a tensor, by the name as it is stored."""
        module = _PREFIX.sub("", _role(self.files.entries[name].stored_name)[0])
        try:  # as `peft.utils.other.get_pattern_key`
            return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), alpha)
        except (AttributeError, re.error) as error:
            raise UserError(f"{path}: its alpha_pattern {pattern!r} is none ({error}); correct it.", "lora") from error

    def _read(self, name: str) -> np.ndarray:
        return self.files.read(name, (slice(None),) * len(self.files.entries[name].shape))

    def named(self, path: object) -> str:
        """The path with the part of it that was taken, as `parse_lora` reads it."""
        return f"{path}#{self.files.part}" if self.files.part else str(path)

    def report(self) -> Iterator[str]:
        """Yields the lines of `convert inspect`."""
        ranks, alphas, targets = collections.Counter(), collections.Counter(), collections.Counter()
        for name, module in self.modules.items():
            ranks[module.rank or "whole differences"] += 1
            alphas["not said (taken as the rank)" if module.alpha is None else f"{module.alpha:g}"] += bool(module.rank)
            targets[re.sub(r"(^|[._])(?:\S*[._])?blocks[._]\d+([._]|$)", "", name) or "modulation"] += 1
        yield f"format        LoRA weights{f', part {self.files.part}' if self.files.part else ''}"
        yield f"modules       {len(self.modules)} ({len(self.files.entries)} tensors)"
        for title, found in (("rank", ranks), ("alpha", alphas)):
            yield f"{title:<13} {listed(f'{key} ({count} modules)' for key, count in found.items() if count)}"
        yield f"targets       {listed((f'{key} ({count})' for key, count in targets.items()), 40)}"
        yield f"dtypes        {listed(sorted({str(entry.dtype) for entry in self.files.entries.values()}))}"


@dataclasses.dataclass(frozen=True)
class _Change:
    """What is added to one layer of a leaf: ``factor`` times B A, or times a difference."""

    files: TensorFiles
    factor: float
    tensors: tuple[str, ...]  # A and B, or the difference

    def foreign(self, index: Index) -> np.ndarray:
        """A slice of it as the other programs have it, float32."""

        def read(name: str, which: Index) -> np.ndarray:
            return np.asarray(self.files.read(name, which), np.float32)

        if len(self.tensors) == 1:
            return self.factor * read(self.tensors[0], index)
        a, b = self.tensors
        more = len(self.files.entries[a].shape) - 2
        one, two = (slice(None), *index[1:]), (index[0], *(slice(None),) * (1 + more))
        a, b = read(a, one), read(b, two)
        product = b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)
        return self.factor * product.reshape(b.shape[0], *a.shape[1:])


@dataclasses.dataclass(frozen=True)
class Merged:
    """What became of an adapter.

    Attributes:
      adapter, scale: as given.
      found: modules that are in the model with all there is for them.
      missing: names of what is not.
    """

    adapter: Adapter
    scale: float
    found: int
    missing: tuple[str, ...]

    def __str__(self):
        modules = self.adapter.modules.values()
        how = f", scale {self.scale:g}" if self.scale != 1 else ""
        how += ", alpha taken as the rank" if any(one.rank and one.alpha is None for one in modules) else ""
        how += f"; not in this model: {listed(self.missing, 4)}" if self.missing else ""
        return f"{self.adapter.named(self.adapter.path)}: {self.found} of {len(modules)} modules merged{how}"


class MergedSource(Source):
    """A model with adapters merged in.

    A parameter is summed in float32 (float64 where it is) and rounded once, to the dtype it is stored in.

    Args:
      source: the base.
      adapters: each with the scale that is asked for, 1 for its own.

    Attributes:
      merged: what became of every adapter.

    Raises:
      UserError: an adapter of which nothing is found, of another size, or that changes one parameter twice.
    """

    def __init__(self, source: Source, adapters: Iterable[tuple[Adapter, float]]):
        self.path, self.format, self.cfg, self.dtypes = source.path, source.format, source.cfg, source.dtypes
        self.meta = source.meta | {"loras": [*source.meta.get("source", {}).get("loras", [])]}
        self._source, self.merged = source, []
        self._changes: dict[tuple[str, int], list[_Change]] = collections.defaultdict(list)
        places = _places(source)
        for adapter, scale in adapters:
            missing, found, taken = [], 0, {}
            for name, module in adapter.modules.items():
                lost = len(missing)
                for kind, factor, tensors in _parts(module):
                    place = _find(places, name, kind)
                    if place is None:
                        missing.append(name if kind == "weight" else f"{name}, its {kind}")
                    elif taken.get(place, name) != name:
                        raise UserError(
                            f"{adapter.path}: modules {taken[place]} and {name} change one parameter of this model; it "
                            "is of a model of several parts (Wan2.2's two experts), save those of one of them alone.",
                            "lora",
                        )
                    else:
                        taken[place] = name
                        self._check(adapter, name, tensors, place)
                        self._changes[place].append(_Change(adapter.files, scale * factor, tensors))
                found += len(missing) == lost
            if not taken:
                raise UserError(
                    f"{adapter.path} has {len(missing)} modules ({listed(missing, 2)}), none of which is in "
                    f"{describe(source.cfg)}; name the adapter of such a model.",
                    "lora",
                )
            self.merged.append(Merged(adapter, scale, found, tuple(missing)))
            self.meta["loras"].append({"name": adapter.named(adapter.path.name), "scale": scale})

    @property
    def places(self) -> tuple[Path, ...]:
        """See `Source`."""
        return *self._source.places, *(merged.adapter.path for merged in self.merged)

    def _check(self, adapter: Adapter, name: str, tensors: tuple[str, ...], place: tuple[str, int]) -> None:
        """Raises UserError where what an adapter has for a module is not of the size of the parameter."""
        shape = names.foreign_shape(place[0], self.shapes[place[0]], patch=wan_of(self.cfg).patch)
        held = [adapter.files.entries[tensor].shape for tensor in tensors]
        if len(held) == 2:
            a, b = held
            fits = len(a) == len(b) == len(shape) and (b[0], *a[1:]) == shape and b[1:] == (a[0], *[1] * (len(b) - 2))
        else:
            fits = held[0] == shape
        if not fits:
            raise UserError(
                f"{adapter.path}: module {name} has {' and '.join(str(list(one)) for one in held)}, which do not "
                f"change a parameter of {list(shape)} in {describe(self.cfg)}; it is of another model.",
                "lora",
            )

    def read_layer(self, path: str, layer: int, index: Index) -> np.ndarray:
        """See `Source`."""
        value = self._source.read_layer(path, layer, index)
        if changes := self._changes.get((path, layer)):
            total = value.astype(np.promote_types(value.dtype, np.float32))
            where = names.foreign_index(path, index)
            for change in changes:
                total = total + names.from_foreign(path, change.foreign(where), index)
            value = total.astype(value.dtype)
        return value


def _parts(module: Module) -> Iterator[tuple[str, float, tuple[str, ...]]]:
    """(kind of the parameter, factor, tensors) of everything that there is for a module."""
    roles = module.tensors
    if module.rank:
        yield "weight", module.factor, (roles["a"], roles["b"])
    if "scaled_bias" in roles:
        yield "bias", module.factor, (roles["scaled_bias"],)
    for kind in ("weight", "bias", "modulation"):
        if kind in roles:
            yield kind, 1.0, (roles[kind],)


def _places(source: Source) -> dict[str, tuple[str, int]]:
    """Name of a parameter in Wan's or in diffusers' way, with dots or with underscores -> (leaf, layer)."""
    found: dict[str, tuple[str, int]] = {}
    for leaf, shape in source.shapes.items():
        prefix, row = names.split_path(leaf)
        for naming in ("original",) if prefix or row.diffusers is None else ("original", "diffusers"):
            for layer, name in enumerate(names.foreign_names(leaf, shape, naming)):
                # A parameter that has no module of its own may be written as one: "blocks.0.modulation.diff".
                for key in (name,) if name.endswith((".weight", ".bias")) else (name, f"{name}.weight"):
                    found[key] = found[key.replace(".", "_")] = (leaf, layer)
    return found


def _find(places: Mapping[str, tuple[str, int]], module: str, kind: str) -> tuple[str, int] | None:
    """The place of a module's parameter, whatever stands in front of its name that is no block."""
    if "text_encoder" in module or module.startswith("lora_te"):
        return None
    pieces = module.split(".")
    for start in range(len(pieces)):
        if start and (pieces[start - 1].endswith("blocks") or pieces[start - 1].isdecimal()):
            return None  # within a block of another kind, such as vace_blocks.0.proj_out
        name = ".".join(pieces[start:])
        for key in (f"{name}.{kind}", f"{_KOHYA.sub('', name)}_{kind}"):
            if key in places:
                return places[key]
    return None


def _file(path: Path) -> Path:
    """The file of an adapter in a folder of PEFT's or diffusers', else the path itself."""
    inside = [path / name for name in (PEFT_FILES[0], DIFFUSERS_FILE) if (path / name).is_file()]
    return inside[0] if inside else path


def open_adapter(path: str | Path, part: str = "") -> Adapter | None:
    """Opens a path if what it holds are LoRA weights; None for anything else, readable or not."""
    try:
        files = tensor_files(_file(Path(path).expanduser()), part)
    except (UserError, OSError):
        return None  # whoever opens it as a model says why
    return Adapter(path, part) if is_adapter(files) else None


def parse_lora(value: str) -> tuple[str, str, float]:
    """Reads "FILE", "FILE:0.8", "FILE#PART" or "FILE#PART:0.8" as (file, part, scale)."""
    file, colon, scale = value.rpartition(":")
    try:
        number = float(scale)
    except ValueError:
        colon = ""
    if not colon or not file or not np.isfinite(number):
        file, number = value, 1.0
    path, _, part = file.rpartition("#")
    if not path or not part or "/" in part or Path(file).expanduser().exists():  # a name may have a #
        path, part = file, ""
    return path, part, number
