"""FP8 weights as numbers: with scales beside them (ComfyUI, lightx2v) they are multiplied, without they are cast."""

import collections
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights.files import Entry, TensorFiles, listed
from greedy_distill_jax.weights.names import Index

FP8 = {np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2)}
_SCALES = ("scale_weight", "weight_scale")  # beside "weight", W = scale times what is stored
_UNUSED = (".scale_input", ".input_scale", ".comfy_quant")  # of activations, and what the rest already says
_MARK = "scaled_fp8"  # an empty tensor by which ComfyUI knows such a file


class Dequantised:
    """The tensors of files with FP8 weights, as `TensorFiles`.

    A weight with a scale is float32, its exact product with the scale rounded once; one without is bfloat16, which
    holds every FP8 number.

    Attributes:
      precision: in words, what was done.

    Raises:
      UserError: a scale that is neither one number nor one for each row.
    """

    def __init__(self, path: Path, files: TensorFiles):
        self._files, self.metadata, self.part = files, files.metadata, files.part
        self.wrapper, self.besides, self.parts = files.wrapper, files.besides, files.parts
        self._scales: dict[str, str] = {}
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        for name, entry in files.entries.items():
            if entry.dtype not in FP8 or name == _MARK:
                continue
            module = name.removesuffix(".weight")
            scale = next((f"{module}.{word}" for word in _SCALES if f"{module}.{word}" in files.entries), "")
            if scale:
                _check_scale(path, files.entries[scale], entry)
                self._scales[name] = scale
            counts[entry.dtype.name, scale.rpartition(".")[2]] += 1
        dropped = {*self._scales.values(), _MARK} | {n for n in files.entries if n.endswith(_UNUSED)}
        self.entries = {
            name: Entry(entry.stored_name, entry.shape, self._dtype(name, entry.dtype), entry.file)
            for name, entry in files.entries.items()
            if name not in dropped
        }
        self.precision = listed(
            f"{count} tensors of {dtype} " + (f"times their {scale}, float32" if scale else "without a scale, bfloat16")
            for (dtype, scale), count in counts.items()
        )

    def _dtype(self, name: str, stored: np.dtype) -> np.dtype:
        return np.dtype(np.float32 if name in self._scales else jnp.bfloat16 if stored in FP8 else stored)

    def read(self, name: str, index: Index) -> np.ndarray:
        """See `TensorFiles`."""
        value = np.asarray(self._files.read(name, index))
        if name in self._scales:
            stored = self._scales[name]
            scale = np.asarray(self._files.read(stored, (slice(None),) * len(self._files.entries[stored].shape)))
            scale = scale.astype(np.float32).reshape(-1)
            scale = scale if scale.size == 1 else scale[index[0]]
            return value.astype(np.float32) * scale.reshape(-1, *[1] * (value.ndim - 1))
        return value.astype(self.entries[name].dtype)


def dequantised(path: Path, files: TensorFiles) -> TensorFiles:
    """The files, of which FP8 weights are read as numbers; ``path`` is what the user named."""
    return Dequantised(path, files) if any(entry.dtype in FP8 for entry in files.entries.values()) else files


def _check_scale(path: Path, scale: Entry, weight: Entry) -> None:
    rows = weight.shape[:1]
    shapes = {(), (1,), rows, *(rows + (1,) * more for more in range(1, len(weight.shape))), (1,) * len(weight.shape)}
    if scale.shape not in shapes or not jnp.issubdtype(scale.dtype, jnp.floating) or scale.dtype in FP8:
        raise UserError(
            f"{path}: {scale.stored_name} has shape {list(scale.shape)} and dtype {scale.dtype}; of the scales of FP8 "
            f"weights one number, or one for each of the {weight.shape[0]} rows, are read. Use weights that are not "
            "quantised.",
            "path",
        )
