"""Files of PyTorch, `.pt` and `.pth`, read and written; nothing here unpickles anything but tensors."""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights import names
from greedy_distill_jax.weights.files import AGAIN, PARTS, Entry, fits, listed, named
from greedy_distill_jax.weights.names import Index

_DEPTH = 4  # of dictionaries in dictionaries that are searched


def import_torch(why: str):
    """The torch module; UserError with the command that installs it."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{why} needs PyTorch; install it with: pip install 'greedy_distill_jax[torch]'.") from error
    return torch


def save_torch(value: Any, file: Path) -> None:
    """Writes tensors with `torch.save`, through a file of Python's: torch's own does not say why a disk refuses."""
    torch = import_torch(f"writing {file.suffix}")
    with open(file, "wb") as opened:
        torch.save(value, opened)


class TorchFiles:
    """One state dict of a `.pt` / `.pth` file, or of shards of one, mapped into memory.

    Args:
      path: what the user named.
      files: the file, or the shards.
      part: which dictionary, "outer.inner" of one in another, or which model in one, see `files.named`; "" chooses the
        first of `PARTS` there is, or else the only one with a model, which may be the file itself.

    Raises:
      UserError: no torch, a damaged file, anything but tensors inside, no such part, or several and no choice.
    """

    def __init__(self, path: Path, files: list[Path], part: str = ""):
        self.metadata, self._tensors, stored, chosen = {}, {}, [], None
        for file in files:
            top = self._load(file)
            self.metadata |= {k: v for k, v in top.items() if isinstance(k, str) and isinstance(v, str)}
            found = dict(self._dictionaries(top))
            if not found:
                raise UserError(f"{file} holds no tensors under names; it holds {listed(top) or 'nothing'}.", "path")
            if chosen is None:  # the first shard chooses for the others
                chosen, inner = self._choose(file, found, part)
                self.parts = _told(found) if len(found) > 1 else ()
            for entry, tensor in self._state(file, found.get(chosen, {}), chosen):
                if entry.stored_name in self._tensors:
                    raise UserError(f"{file} holds {entry.stored_name}, as another shard does; {AGAIN}.", "path")
                stored.append(entry)
                self._tensors[entry.stored_name] = tensor
        model = named(path, stored, inner)
        self.entries, self.wrapper, self.besides = model.entries, model.wrapper, model.besides
        self.part, self.parts = ".".join(filter(None, (chosen, model.part))), (*self.parts, *model.parts)

    def _state(self, file: Path, state: dict[str, Any], part: str) -> Iterator[tuple[Entry, Any]]:
        """(what is stored, tensor) of the chosen dictionary of a file."""
        for key, tensor in state.items():
            name = str(key)
            if not self._is_tensor(tensor):
                if not part:
                    continue  # beside the tensors of a bare dictionary: a step, settings
                raise UserError(
                    f"{file}: {name} is a {type(tensor).__name__}, not a tensor; save a plain state dict of tensors.",
                    "path",
                )
            if str(tensor.dtype).removeprefix("torch.") not in _TORCH_DTYPES:
                raise UserError(
                    f"{file}: tensor {name} has dtype {tensor.dtype}; use weights that are not quantised.", "path"
                )
            dtype = np.dtype(_TORCH_DTYPES[str(tensor.dtype).removeprefix("torch.")])
            yield Entry(name, tuple(tensor.shape), dtype, file), tensor.detach()

    def _dictionaries(self, value: dict, name: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, dictionary) of all that hold tensors under names, those of dictionaries inside joined by dots."""
        if any(isinstance(key, str) and self._is_tensor(inner) for key, inner in value.items()):
            yield name, value
        for key, inner in value.items():
            if isinstance(key, str) and isinstance(inner, dict) and depth < _DEPTH:
                yield from self._dictionaries(inner, f"{name}.{key}" if name else key, depth + 1)

    def _choose(self, file: Path, found: dict[str, dict], part: str) -> tuple[str, str]:
        """(the dictionary to take, what is left of the part: which of several models in it)."""
        if part in found and part:
            return part, ""
        has = listed(_told(found))
        wrappers = {name: names.wrappers(names.plain(str(key)) for key in state) for name, state in found.items()}
        models = [name for name in found if wrappers[name]] or list(found)
        if part:
            for name in sorted(filter(None, found), key=len, reverse=True):
                if part.startswith(f"{name}."):
                    return name, part.removeprefix(f"{name}.")
            inside = [name for name in models if any(fits(part, wrapper) for wrapper in wrappers[name])]
            if len(inside) == 1:
                return inside[0], part
            if len(models) == 1 and (not models[0] or len(wrappers[models[0]]) > 1):
                return models[0], part  # `named` says what there is
            raise UserError(f"{file} has no part {part!r}; it has {has}.", "part")
        known = [name for wanted in PARTS for name in models if name.rpartition(".")[2] == wanted]
        if known or len(models) == 1 or "" in models:
            return (known[0] if known else "" if "" in models else models[0]), ""
        raise UserError(f"{file} holds several dictionaries of tensors: {has}; choose one.", "part")

    def _is_tensor(self, value: Any) -> bool:
        return isinstance(value, self._torch.Tensor)

    def _load(self, file: Path) -> dict:
        self._torch = torch = import_torch(f"reading {file}")
        options = dict(map_location="cpu", weights_only=True)
        try:
            try:
                top = torch.load(file, mmap=True, **options)
            except RuntimeError as error:
                if "_use_new_zipfile_serialization" not in str(error):
                    raise
                top = torch.load(file, **options)  # the format before torch 1.6 cannot be mapped
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"class ['\"]?([\w.]+)", str(error))
            if not found:
                raise UserError(f"{file} is damaged or no PyTorch file ({_first(error)}); {AGAIN}.", "path") from error
            raise UserError(
                f"{file} holds a {found[1]} object besides tensors; loading it could run code and is refused. "
                "Where you trust the file, save its tensors alone: torch.save({'generator': state_dict}, 'clean.pt').",
                "path",
            ) from error
        except Exception as error:  # torch's reader of pickles takes bytes as they come and trips anywhere
            raise UserError(f"{file} is truncated or no PyTorch file ({_first(error)}); {AGAIN}.", "path") from error
        if not isinstance(top, dict):
            raise UserError(f"{file} holds a {type(top).__name__}, not a dictionary of tensors.", "path")
        return top

    def read(self, name: str, index: Index) -> np.ndarray:
        """See `TensorFiles`."""
        return to_numpy(self._tensors[self.entries[name].stored_name][index])


_TORCH_DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}
_TORCH_DTYPES |= {"float8_e4m3fn": jnp.float8_e4m3fn, "float8_e5m2": jnp.float8_e5m2}
_TORCH_DTYPES |= {name: getattr(np, name) for name in ("int64", "int32", "int16", "int8", "uint8")} | {"bool": np.bool_}


def to_numpy(tensor) -> np.ndarray:
    """A torch tensor as numpy, bit by bit (numpy has no bfloat16 and no FP8 of its own)."""
    torch, name = import_torch("reading a .pt file"), str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8"):
        bits = torch.uint8 if name.startswith("float8") else torch.uint16
        return tensor.contiguous().view(bits).numpy().view(_TORCH_DTYPES[name])
    return tensor.numpy()


def to_torch(array: np.ndarray):
    """The same bits as a torch tensor with memory of its own."""
    torch = import_torch("writing a .pt file")
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _told(found: dict[str, dict]) -> tuple[str, ...]:
    """The dictionaries of a file in words."""
    return tuple(f"{name or 'tensors without a part'} ({len(state)})" for name, state in found.items())


def _first(error: Exception) -> str:
    """The reason in one line; never torch's advice to load a file without ``weights_only``."""
    lines = str(error).replace("WeightsUnpickler error:", "\n").splitlines()
    useful = [line.strip() for line in lines if not re.search(r"weights_only|[Ww]eights only|trust", line)]
    return next((line for line in useful if line), type(error).__name__)[:200]
