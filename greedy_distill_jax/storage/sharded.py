"""A prepared folder, read: its description, its shards, and every kind of record through one random-access source."""

from __future__ import annotations

import dataclasses
import json
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.records import decode_record, fingerprint, first_line

FORMAT = 1  # of dataset.json


@dataclasses.dataclass(frozen=True)
class RecordKind:
    """One kind of prepared folder: what is in its records.

    Attributes:
      name: of the kind, in dataset.json and in messages.
      command: of `greedy_distill_jax.prepare`, that makes such a folder.
      splits: that such a folder may have.
      example: (decoded record, dataset.json) -> what a source hands out; a module's function, so that sources can be
        pickled. It raises ValueError when the record does not have the shapes that dataset.json tells.
      told: what dataset.json has to tell besides the shards.
    """

    name: str
    command: str
    splits: tuple[str, ...]
    example: Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any]]
    told: tuple[str, ...] = ()

    @property
    def remedy(self) -> str:
        """What to do when there is no such folder, or a damaged one."""
        return f"make it with python -m greedy_distill_jax.prepare {self.command}"


class ShardedSource:
    """Random access to the examples of one split of a prepared folder, whatever its records hold; picklable.

    The files are opened here and closed with the process.

    Attributes:
      directory: the folder.
      kind: of its records.
      split: one of the kind's.
      info: the content of dataset.json.
    """

    def __init__(self, directory: str | os.PathLike, kind: RecordKind, split: str = "train") -> None:
        """Opens the shards of a split of a finished folder.

        Raises:
          UserError: an unknown split, a folder that is missing, not finished or of another kind, a damaged shard.
        """
        self.directory, self.kind, self.split = Path(directory).expanduser(), kind, split
        if split not in kind.splits:
            raise UserError(
                f"{kind.name}: split={split!r} is unknown; use one of {', '.join(kind.splits)}", field="split"
            )
        self.info = read_dataset(self.directory, kind)
        self._shards = open_shards(self.directory, self.info, kind, split)

    def __len__(self) -> int:
        return len(self._shards)

    def __repr__(self) -> str:
        return f"ShardedSource({os.fspath(self.directory)!r}, {self.kind.name!r}, {self.split!r})"

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """One example; UserError naming the file and the index when the record is damaged, IndexError outside."""
        shard, position = self._shards.locate(index)
        try:
            return self.kind.example(decode_record(self._shards[index]), self.info)
        except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
            raise UserError(
                f"{self.kind.name}: record {position} of {self._shards.paths[shard]} (index {operator.index(index)} of "
                f"{self.split}) is damaged: {first_line(error)}; prepare the folder again",
                field="directory",
            ) from error

    @property
    def fingerprint(self) -> str:
        """Tells this content from any other: of dataset.json, which has a hash of the records of every shard.

        The same records in parts of another size count as another content.
        """
        # The codec is a path, which may move; reasons of what was skipped hold paths and the words of a version.
        content = {key: value for key, value in self.info.items() if key not in ("codec", "skipped")}
        content["shards"] = {
            split: [{key: value for key, value in shard.items() if key != "bytes"} for shard in shards]
            for split, shards in self.info["shards"].items()
        }  # another version may compress the same records otherwise
        return fingerprint([json.dumps(content, sort_keys=True)])

    @property
    def captions(self) -> set[str]:
        """All captions of the folder, as far as dataset.json lists them."""
        return set(self.info.get("captions", {}).values())

    @property
    def levels(self) -> tuple[float, ...] | None:
        """The noise levels of stored states, decreasing from 1; None where the records hold none."""
        return tuple(self.info["sigmas"]) if "sigmas" in self.info else None


class Shards:
    """Random access to the bytes in several array_record files, in order; picklable.

    Attributes:
      paths: of the files.
    """

    def __init__(self, shards: Sequence[tuple[Path, int, int | None]], kind: RecordKind) -> None:
        """Opens the files.

        Args:
          shards: (path, number of records it must hold, bytes it must have, None where they are not known) of each.
          kind: of the records, for messages.

        Raises:
          UserError: a file that is missing, damaged, of another size, or holds another number of records.
        """
        self.paths, self._readers = [path for path, *_ in shards], []
        for path, records, size in shards:
            try:
                if size not in (None, there := path.stat().st_size):
                    raise ValueError(f"it has {there} bytes instead of {size}")
                reader = ArrayRecordDataSource([os.fspath(path)])
                found = len(reader)
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"{kind.name}: shard {path} cannot be read ({first_line(error)}); {kind.remedy}", field="directory"
                ) from error
            if found != records:
                raise UserError(
                    f"{kind.name}: shard {path} holds {found} records instead of {records}; {kind.remedy}",
                    field="directory",
                )
            self._readers.append(reader)
        self._ends = np.cumsum([records for _, records, _ in shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, index: SupportsIndex) -> tuple[int, int]:
        """Returns (number of the file, position in it); IndexError outside."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside [0, {len(self)})")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def __getitem__(self, index: SupportsIndex) -> bytes:
        """The bytes of a record."""
        shard, position = self.locate(index)
        return self._readers[shard][position]


def read_dataset(directory: str | os.PathLike, kind: RecordKind) -> dict[str, Any]:
    """Returns the dataset.json of a finished folder.

    Raises:
      UserError: there is none (also when its job is not finished), or it is of another kind or format.
    """
    directory = Path(directory).expanduser()
    path = directory / "dataset.json"
    try:
        info = dict(json.loads(path.read_text(encoding="utf-8")))
        found = info.get("kind", "clips"), info["format"]  # clips were prepared before there were other kinds
        if found != (kind.name, FORMAT):
            raise ValueError(f"it is of {found[0]} in format {found[1]}, this version reads {FORMAT}")
        if not all({"file", "records"} <= shard.keys() for shards in info["shards"].values() for shard in shards):
            raise ValueError("it names no shards")
        for name in kind.told:
            if name not in info:
                raise ValueError(f"it does not tell {name}")
    except FileNotFoundError as error:
        begun = (directory / "plan.json").is_file()
        missing = "is not finished: run the same command again" if begun else f"holds no {kind.name}: {kind.remedy}"
        raise UserError(f"{directory} {missing}", field="directory") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not describe {kind.name} ({first_line(error)}); {kind.remedy}", field="directory"
        ) from error
    return info


def open_shards(directory: Path, info: Mapping[str, Any], kind: RecordKind, split: str) -> Shards:
    """Opens the shards of a split, of a finished folder or of one whose dataset.json is about to be written."""
    shards = info["shards"].get(split, [])
    return Shards([(directory / s["file"], int(s["records"]), s.get("bytes")) for s in shards], kind)
