"""The file or files that a path names, opened by the reader of their format."""

import json
from pathlib import Path
from typing import Any

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights.files import TensorFiles
from greedy_distill_jax.weights.fp8 import dequantised
from greedy_distill_jax.weights.others import check_file, check_folder
from greedy_distill_jax.weights.safetensors_files import SafetensorsFiles, files_of_index, safetensors_in
from greedy_distill_jax.weights.torch_files import TorchFile

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


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
            return _safetensors(path, found, part)
        found = sorted(p for p in path.iterdir() if p.suffix in TORCH_SUFFIXES)
        if len(found) == 1:
            check_file(found[0])
            return TorchFile(found[0], part)
        for file in sorted(path.glob("*.gguf")) if not found else ():
            check_file(file)
        several = f"several files ({', '.join(p.name for p in found[:4])}); name one of them" if found else ""
        raise UserError(
            f"{path} holds {several or 'no safetensors, .pt or checkpoints; name a folder with weights'}.", "path"
        )
    check_file(path)
    if path.name.endswith(".index.json"):
        return _safetensors(path, files_of_index(path), part)
    if path.suffix == ".safetensors":
        return SafetensorsFiles(path, [path], part)
    if path.suffix in TORCH_SUFFIXES:
        return TorchFile(path, part)
    raise UserError(
        f"{path} is neither .safetensors nor one of {', '.join(TORCH_SUFFIXES)}; name a file with weights.", "path"
    )


def _safetensors(path: Path, files: list[Path], part: str) -> TensorFiles:
    for file in files:
        check_file(file)
    return SafetensorsFiles(path, files, part)


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
