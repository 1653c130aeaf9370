"""Safetensors, read slice by slice: one file, or shards with an index."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights.files import AGAIN, Entry, named
from greedy_distill_jax.weights.names import Index

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
DTYPES |= {"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2}  # as stored; `fp8` makes numbers of them
# Beside the weights of a model, such as the alpha of an adapter.
DTYPES |= {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}


class SafetensorsFiles:
    """Tensors of one or several safetensors files. Reads with pread: what was read does not stay resident.

    Args:
      path: what the user named.
      files: that hold one model, or several.
      part: of several models the one to take, see `files.named`.

    Raises:
      UserError: a file that is missing, truncated or no safetensors file, or a tensor of a dtype that is not known.
    """

    def __init__(self, path: Path, files: list[Path], part: str = ""):
        from safetensors import SafetensorError, safe_open

        self.metadata, self._open, stored = {}, {}, []
        for file in files:
            try:
                handle = safe_open(file, framework="np", backend="pread")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is truncated or no safetensors file ({error}); {AGAIN}.", "path") from error
            self._open[file] = handle
            self.metadata.update(handle.metadata() or {})
            for name in handle.keys():  # noqa: SIM118 (the handle itself is not iterable)
                view = handle.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{file}: tensor {name} has dtype {view.get_dtype()}; use weights in one of "
                        f"{', '.join(list(DTYPES)[:4])} (not quantised).",
                        "path",
                    )
                stored.append(Entry(name, tuple(view.get_shape()), np.dtype(DTYPES[view.get_dtype()]), file))
        found = named(path, stored, part)
        self.entries, self.part, self.parts = found.entries, found.part, found.parts
        self.wrapper, self.besides = found.wrapper, found.besides

    def read(self, name: str, index: Index) -> np.ndarray:
        """See `TensorFiles`."""
        entry = self.entries[name]
        if entry.dtype.itemsize == 1 and jnp.issubdtype(entry.dtype, jnp.floating):
            return _read_bytes(entry)[index]  # numpy, and so safetensors' reader, has no FP8
        handle = self._open[entry.file]
        if all(s == slice(None) for s in index):
            return handle.get_tensor(entry.stored_name)
        return handle.get_slice(entry.stored_name)[tuple(slice(*s.indices(n)) for s, n in zip(index, entry.shape))]


def _read_bytes(entry: Entry) -> np.ndarray:
    """A whole tensor, one byte to a number, past the reader of the library."""
    with open(entry.file, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[entry.stored_name]["data_offsets"]
        file.seek(8 + length + begin)
        return np.frombuffer(file.read(end - begin), np.uint8).view(entry.dtype).reshape(entry.shape)
