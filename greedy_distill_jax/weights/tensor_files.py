"""The file or files that a path names, opened by the reader of their format."""

import json
from pathlib import Path
from typing import Any

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights.files import TensorFiles
from greedy_distill_jax.weights.fp8 import dequantised
from greedy_distill_jax.weights.others import check_expert, check_file, check_folder
from greedy_distill_jax.weights.safetensors_files import SafetensorsFiles
from greedy_distill_jax.weights.shards import (
    SAFETENSORS,
    TORCH_SUFFIXES,
    check_whole,
    files_in,
    files_of_index,
    safetensors_in,
)
from greedy_distill_jax.weights.torch_files import TorchFiles


def tensor_files(path: Path, part: str = "") -> TensorFiles:
    """The tensors of a file, of an index.json or of the one model in a folder.

    Args:
      path: file or folder.
      part: which dictionary of a `.pt`, or which of several models in one file; "" for the first of `files.PARTS`.
    """
    return dequantised(path, _stored(path, part))


def _stored(path: Path, part: str) -> TensorFiles:
    if path.is_dir():
        check_folder(path)
        if found := safetensors_in(path):
            return _read(path, found, part)
        if found := files_in(path, TORCH_SUFFIXES):
            return _read(path, found, part)
        for file in sorted(path.glob("*.gguf")):
            check_file(file)
        raise UserError(f"{path} holds no safetensors, .pt or checkpoints; name a folder with weights.", "path")
    check_expert(path.parent)
    if path.name.endswith(".index.json"):
        return _read(path, files_of_index(path), part)
    check_file(path)
    if path.suffix in (SAFETENSORS, *TORCH_SUFFIXES):
        check_whole(path)
        return _read(path, [path], part)
    raise UserError(
        f"{path} is neither .safetensors nor one of {', '.join(TORCH_SUFFIXES)}; name a file with weights.", "path"
    )


def _read(path: Path, files: list[Path], part: str) -> TensorFiles:
    for file in files:
        check_file(file)
    return (SafetensorsFiles if files[0].suffix == SAFETENSORS else TorchFiles)(path, files, part)


def read_config(file: Path) -> dict[str, Any]:
    """The dictionary in a config.json, {} if there is none; UserError when it is another thing."""
    if file.is_file():
        check_file(file)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({error}); remove it or copy the right one.", "path") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is no dictionary ({type(config).__name__}); remove it or copy the right one.", "path")
    return config
