"""Files of PyTorch, `.pt` and `.pth`, read and written; nothing here unpickles anything but tensors."""

import pickle
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights.files import AGAIN, Entry, add_entry
from greedy_distill_jax.weights.names import Index

PARTS = ("generator_ema", "generator", "model", "critic")  # of a `.pt`, in the order in which one is chosen


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
            raise UserError(
                f"{file} holds LoRA weights ({', '.join(top)}); merge them into their base model first.", "path"
            )
        bare = not present and any(self._is_tensor(value) for value in top.values())
        if part and part not in present:
            raise UserError(
                f"{file} has no part {part!r}; it has {', '.join(map(str, present or list(top)[:5]))}.", "part"
            )
        if not bare and not present:
            raise UserError(
                f"{file} holds none of {', '.join(PARTS)}; it holds {', '.join(map(str, list(top)[:5]))}.", "path"
            )
        self.part = part or ("" if bare else present[0])
        state = top[self.part] if self.part else {k: v for k, v in top.items() if not isinstance(v, str)}
        self.entries, self._tensors = {}, {}
        for name, tensor in state.items():
            if not self._is_tensor(tensor):
                raise UserError(
                    f"{file}: {name} is a {type(tensor).__name__}, not a tensor; save a plain state dict of tensors.",
                    "path",
                )
            if not tensor.is_floating_point() or str(tensor.dtype).removeprefix("torch.") not in _TORCH_DTYPES:
                raise UserError(
                    f"{file}: tensor {name} has dtype {tensor.dtype}; use weights that are not quantised.", "path"
                )
            dtype = np.dtype(_TORCH_DTYPES[str(tensor.dtype).removeprefix("torch.")])
            add_entry(self.entries, Entry(name, tuple(tensor.shape), dtype, file))
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
                raise UserError(
                    f"{self.file} is damaged or no PyTorch file ({_first(error)}); {AGAIN}.", "path"
                ) from error
            raise UserError(
                f"{self.file} holds a {found[1]} object besides tensors; loading it could run code and is refused. "
                "Where you trust the file, save its tensors alone: torch.save({'generator': state_dict}, 'clean.pt').",
                "path",
            ) from error
        except Exception as error:  # torch's reader of pickles takes bytes as they come and trips anywhere
            raise UserError(
                f"{self.file} is truncated or no PyTorch file ({_first(error)}); {AGAIN}.", "path"
            ) from error
        if not isinstance(top, dict):
            raise UserError(f"{self.file} holds a {type(top).__name__}, not a dictionary of tensors.", "path")
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
