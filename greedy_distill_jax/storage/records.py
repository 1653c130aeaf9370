"""A record of a prepared folder: named arrays behind a JSON header, as one string of bytes.

The bytes are a magic number, the length of the header (uint32, little endian), the header and the arrays.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

_HEAD, _BLOCK, _BLOCKS = 2**16, 2**12, 64  # bytes of a file's start, of a sample; samples
_MAGIC = b"GDJ2"
_CLIPS_MAGIC = b"GDJ1"  # of clips prepared before records named their arrays: one video of uint8
_DTYPES = {"uint8": np.uint8, "float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}


def encode_record(arrays: Mapping[str, Shaped[np.ndarray, "..."]], **header: Any) -> bytes:
    """Returns the bytes of named arrays (uint8 or floating point) behind a JSON header."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    shapes = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
    text = json.dumps({**header, "arrays": shapes}, ensure_ascii=False).encode()
    return b"".join([_MAGIC, len(text).to_bytes(4, "little"), text, *(array.tobytes() for array in arrays.values())])


def decode_record(record: bytes) -> dict[str, Any]:
    """Returns the header with the arrays in it under their names; ValueError when the bytes are not a whole record."""
    magic, start = record[:4], 8 + int.from_bytes(record[4:8], "little")
    if magic not in (_MAGIC, _CLIPS_MAGIC):
        raise ValueError(f"it does not begin with {_MAGIC!r}")
    out = json.loads(record[8:start])
    shapes = {"video": ("uint8", out.pop("shape"))} if magic == _CLIPS_MAGIC else out.pop("arrays")
    for name, (dtype, shape) in shapes.items():
        kind = np.dtype(_DTYPES[dtype])
        count = int(np.prod(shape, dtype=np.int64))
        out[name] = np.frombuffer(record, kind, count, start).reshape(shape)
        start += count * kind.itemsize
    if start != len(record):
        raise ValueError(f"{len(record)} bytes instead of {start}")
    return out


def fingerprint(items: Iterable[str]) -> str:
    """Returns a short name of a list of strings, for the plan of a `RecordJob`."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{len(item)}:{item}".encode())
    return digest.hexdigest()[:16]


def fingerprint_files(files: Iterable[Path]) -> str:
    """Returns a short name of files by name, size and samples of their bytes, wherever their folder lies.

    The samples are the first 64 KiB (headers, configurations) and 64 blocks of 4 KiB at even distances up to the end:
    another training of the same network differs in all, an edit elsewhere in a large file is not seen.
    """
    told = []
    for path in files:
        digest, size = hashlib.sha256(), path.stat().st_size
        with open(path, "rb") as file:
            digest.update(file.read(_HEAD))
            for block in range(_BLOCKS if size > _HEAD else 0):
                file.seek(max(0, (size - _BLOCK) * (block + 1) // _BLOCKS))
                digest.update(file.read(_BLOCK))
        told.append(f"{path.parent.name}/{path.name} {size} {digest.hexdigest()}")
    return fingerprint(told)


def first_line(error: Exception) -> str:
    """Returns what an error says, in one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]
