"""The file or files of one model: in a folder, by an index.json, or by their numbers."""

import json
import re
from pathlib import Path

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights.files import AGAIN
from greedy_distill_jax.weights.others import check_file

SAFETENSORS = ".safetensors"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)")


def safetensors_in(folder: Path) -> list[Path]:
    """`files_in` of safetensors."""
    return files_in(folder, (SAFETENSORS,))


def files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of one model in a folder, checked against its index.json or their numbers; [] if there are none."""
    indices = sorted(path for suffix in suffixes for path in folder.glob(f"*{suffix}.index.json"))
    files = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
    if len(indices) > 1:
        raise _several(folder, indices)
    if indices:
        return files_of_index(indices[0])
    parts = [_SHARD.fullmatch(file.stem) for file in files]
    if files and all(parts) and len({(p[1], p[3]) for p in parts}) == 1:
        if len(files) != int(parts[0][3]):
            raise UserError(f"{folder} holds {len(files)} of {int(parts[0][3])} shards; {AGAIN}.", "path")
        return files
    if len(files) > 1:
        raise _several(folder, files)
    return files


def check_whole(file: Path) -> None:
    """Raises UserError for one of several shards, named by itself."""
    shard = _SHARD.fullmatch(file.stem)
    if shard and int(shard[3]) > 1:
        raise UserError(
            f"{file} is one of {int(shard[3])} shards of a model; name their folder or their index.", "path"
        )


def _several(folder: Path, files: list[Path]) -> UserError:
    return UserError(
        f"{folder} holds several models ({', '.join(f.name for f in files)}); name one of these files.", "path"
    )


def files_of_index(index: Path) -> list[Path]:
    """The files an index.json names; UserError when one is missing."""
    check_file(index)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("it names no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is no index of shards ({error!r}); {AGAIN}.", "path") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"{index} names {missing[0]}, which is missing; {AGAIN}.", "path")
    return [index.parent / name for name in names]
