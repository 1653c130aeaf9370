"""Files of named tensors, read slice by slice: safetensors (one file or shards with an index) and `.pt`.

Names are handed out clean (see `names.clean`). Nothing here unpickles anything but tensors.
"""

import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights.names import Index, clean

PARTS = ("generator_ema", "generator", "model", "critic")  # of a `.pt`, in the order in which one is chosen
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
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


def _add(entries: dict[str, Entry], entry: Entry) -> None:
    name = clean(entry.stored_name)
    if name in entries:
        raise UserError(
            f"{entry.file}: tensors {entries[name].stored_name} and {entry.stored_name} are the same parameter {name}; "
            "remove one of them."
        )
    entries[name] = entry


class SafetensorsFiles:
    """Tensors of one or several safetensors files. Reads with pread: what was read does not stay resident.

    Raises:
      UserError: a file that is missing, truncated or no safetensors file, or a tensor that is not of floating point.
    """

    part = ""

    def __init__(self, files: list[Path]):
        from safetensors import SafetensorError, safe_open

        self.entries, self.metadata, self._open = {}, {}, {}
        for file in files:
            try:
                handle = safe_open(file, framework="np", backend="pread")
            except FileNotFoundError as error:
                raise UserError(f"{file} is missing; the index names it, so {AGAIN}.") from error
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is truncated or no safetensors file ({error}); {AGAIN}.") from error
            self._open[file] = handle
            self.metadata.update(handle.metadata() or {})
            for name in handle.keys():  # noqa: SIM118 (the handle itself is not iterable)
                view = handle.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{file}: tensor {name} has dtype {view.get_dtype()}; use weights in one of "
                        f"{', '.join(DTYPES)} (not quantised)."
                    )
                _add(self.entries, Entry(name, tuple(view.get_shape()), np.dtype(DTYPES[view.get_dtype()]), file))

    def read(self, name: str, index: Index) -> np.ndarray:
        """See `TensorFiles`."""
        entry = self.entries[name]
        handle = self._open[entry.file]
        if all(s == slice(None) for s in index):
            return handle.get_tensor(entry.stored_name)
        return handle.get_slice(entry.stored_name)[tuple(slice(*s.indices(n)) for s, n in zip(index, entry.shape))]


def safetensors_in(folder: Path) -> list[Path]:
    """The safetensors files of one model in a folder, checked against its index.json; [] if there are none."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) > 1:
        raise _several(folder, indices)
    if indices:
        return files_of_index(indices[0])
    parts = [re.fullmatch(r"(.+)-(\d+)-of-(\d+)\.safetensors", file.name) for file in files]
    if files and all(parts) and len({(p[1], p[3]) for p in parts}) == 1:
        if len(files) != int(parts[0][3]):
            raise UserError(f"{folder} holds {len(files)} of {int(parts[0][3])} shards; {AGAIN}.")
        return files
    if len(files) > 1:
        raise _several(folder, files)
    return files


def _several(folder: Path, files: list[Path]) -> UserError:
    return UserError(f"{folder} holds several models ({', '.join(f.name for f in files)}); name one of these files.")


def files_of_index(index: Path) -> list[Path]:
    """The files an index.json names; UserError when one is missing."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of safetensors shards ({error!r}); {AGAIN}.") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"{index} names {missing[0]}, which is missing; {AGAIN}.")
    return [index.parent / name for name in names]


def import_torch(why: str):
    """The torch module; UserError with the command that installs it."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{why} needs PyTorch; install it with: pip install 'greedy_distill_jax[torch]'.") from error
    return torch


class TorchFile:
    """One state dict of a `.pt` / `.pth` file, mapped into memory.

    Args:
      file: path.
      part: which dictionary of the top level; "" chooses the first of `PARTS` there is, or the file itself.

    Raises:
      UserError: no torch, a damaged file, anything but tensors inside, no such part.
    """

    def __init__(self, file: Path, part: str = ""):
        self.file = file
        top = self._load()
        self.metadata = {k: v for k, v in top.items() if isinstance(k, str) and isinstance(v, str)}
        present = [name for name in PARTS if isinstance(top.get(name), dict)]
        if any(str(name).endswith("_lora") for name in top):
            raise UserError(f"{file} holds LoRA weights ({', '.join(top)}); merge them into their base model first.")
        bare = not present and any(self._is_tensor(value) for value in top.values())
        if part and part not in present:
            raise UserError(f"{file} has no part {part!r}; it has {', '.join(map(str, present or list(top)[:5]))}.")
        if not bare and not present:
            raise UserError(f"{file} holds none of {', '.join(PARTS)}; it holds {', '.join(map(str, list(top)[:5]))}.")
        self.part = part or ("" if bare else present[0])
        state = top[self.part] if self.part else {k: v for k, v in top.items() if not isinstance(v, str)}
        self.entries, self._tensors = {}, {}
        for name, tensor in state.items():
            if not self._is_tensor(tensor):
                raise UserError(
                    f"{file}: {name} is a {type(tensor).__name__}, not a tensor; save a plain state dict of tensors."
                )
            if not tensor.is_floating_point() or str(tensor.dtype).removeprefix("torch.") not in _TORCH_DTYPES:
                raise UserError(f"{file}: tensor {name} has dtype {tensor.dtype}; use weights that are not quantised.")
            dtype = np.dtype(_TORCH_DTYPES[str(tensor.dtype).removeprefix("torch.")])
            _add(self.entries, Entry(name, tuple(tensor.shape), dtype, file))
            self._tensors[name] = tensor.detach()

    def _is_tensor(self, value: Any) -> bool:
        return isinstance(value, self._torch.Tensor)

    def _load(self) -> dict:
        self._torch = torch = import_torch(f"reading {self.file}")
        options = dict(map_location="cpu", weights_only=True)
        try:
            try:
                top = torch.load(self.file, mmap=True, **options)
            except RuntimeError as error:
                if "_use_new_zipfile_serialization" not in str(error):
                    raise
                top = torch.load(self.file, **options)  # the format before torch 1.6 cannot be mapped
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            if not found:
                raise UserError(f"{self.file} is damaged or no PyTorch file ({_first(error)}); {AGAIN}.") from error
            raise UserError(
                f"{self.file} holds a {found[1]} object besides tensors; loading it could run code and is refused. "
                "Where you trust the file, save its tensors alone: torch.save({'generator': state_dict}, 'clean.pt')."
            ) from error
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.file} is truncated or no PyTorch file ({_first(error)}); {AGAIN}.") from error
        if not isinstance(top, dict):
            raise UserError(f"{self.file} holds a {type(top).__name__}, not a dictionary of tensors.")
        return top

    def read(self, name: str, index: Index) -> np.ndarray:
        """See `TensorFiles`."""
        return to_numpy(self._tensors[self.entries[name].stored_name][index])


_TORCH_DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}


def to_numpy(tensor) -> np.ndarray:
    """A torch tensor as numpy, bit by bit (numpy has no bfloat16 of its own)."""
    if str(tensor.dtype) == "torch.bfloat16":
        return tensor.contiguous().view(import_torch("bfloat16").uint16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray):
    """The same bits as a torch tensor with memory of its own."""
    torch = import_torch("writing a .pt file")
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
