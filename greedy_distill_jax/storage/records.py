"""Record shards that a job may write in pieces: on several processes, killed and started again, without gap or repeat.

A job is a list of items, cut into parts of equal size. A part is computed as a whole: its shards get their names when
they are complete, then `parts/NNNNN.json` says that the part is done. Whoever finishes the last part writes
`dataset.json`, and with it the folder is finished. What is done is a matter of files, so any number of processes may
share the parts, and a job that is started again goes on with the parts that are missing; `plan.json` holds it to the
same input.

A record is a magic number, the length of a JSON header (uint32, little endian), the header and the bytes of arrays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from greedy_distill_jax.errors import UserError

WRITER_OPTIONS = "group_size:1,zstd:3"  # records are read one by one, in random order
_FORMAT = 1
_MAGIC = b"GDJ2"
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}


def encode_record(arrays: Mapping[str, np.ndarray], **header: Any) -> bytes:
    """One record: named arrays of floating point behind a JSON header."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    shapes = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
    text = json.dumps({**header, "arrays": shapes}, ensure_ascii=False).encode()
    return b"".join([_MAGIC, len(text).to_bytes(4, "little"), text, *(array.tobytes() for array in arrays.values())])


def decode_record(record: bytes) -> dict[str, Any]:
    """The header with the arrays in it under their names; ValueError when the bytes are not a whole record."""
    if record[:4] != _MAGIC:
        raise ValueError(f"it does not begin with {_MAGIC!r}")
    start = 8 + int.from_bytes(record[4:8], "little")
    out = json.loads(record[8:start])
    for name, (dtype, shape) in out.pop("arrays").items():
        kind = np.dtype(_DTYPES[dtype])
        count = int(np.prod(shape, dtype=np.int64))
        out[name] = np.frombuffer(record, kind, count, start).reshape(shape)
        start += count * kind.itemsize
    if start != len(record):
        raise ValueError(f"{len(record)} bytes instead of {start}")
    return out


class Shards:
    """Random access to the records of several array_record files, in order; picklable, closed only with the process.

    Attributes:
      paths: of the files.
    """

    def __init__(self, shards: Sequence[tuple[Path, int]], *, what: str, remedy: str) -> None:
        """Opens the files.

        Args:
          shards: (path, number of records it must hold) of each.
          what: of which kind of data, for messages.
          remedy: what to do when a file is missing or damaged.

        Raises:
          UserError: a file that is missing, damaged or holds another number of records.
        """
        self.paths, self._readers = [path for path, _ in shards], []
        for path, records in shards:
            try:
                reader = ArrayRecordDataSource([os.fspath(path)])
                found = len(reader)
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(f"{what}: shard {path} cannot be read ({first_line(error)}); {remedy}") from error
            if found != records:
                raise UserError(f"{what}: shard {path} holds {found} records instead of {records}; {remedy}")
            self._readers.append(reader)
        self._ends = np.cumsum([records for _, records in shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, index: SupportsIndex) -> tuple[int, int]:
        """(number of the file, position in it); IndexError outside."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside [0, {len(self)})")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def __getitem__(self, index: SupportsIndex) -> bytes:
        """The bytes of a record."""
        shard, position = self.locate(index)
        return self._readers[shard][position]


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def fingerprint(items: Iterable[str]) -> str:
    """A short name of a list of strings, for `RecordJob.plan`."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{len(item)}:{item}".encode())
    return digest.hexdigest()[:16]


class Part:
    """The shards of one part while they are written; see `RecordJob.part`.

    Attributes:
      notes: JSON values that stay with the part, such as the keys of its records or what was skipped.
    """

    def __init__(self, directory: Path, number: int, of: int) -> None:
        self.notes: list[Any] = []
        self._directory, self._suffix = directory, f"{number:05d}-of-{of:05d}.array_record"
        self._writers: dict[str, tuple[ArrayRecordWriter, Path]] = {}
        self._records: dict[str, int] = {}

    def write(self, split: str, record: bytes) -> None:
        """Appends a record to the part's shard of a split."""
        if split not in self._writers:
            partial = self._directory / f".{split}-{self._suffix}.{uuid.uuid4().hex[:8]}.partial"
            self._writers[split], self._records[split] = (ArrayRecordWriter(str(partial), WRITER_OPTIONS), partial), 0
        self._writers[split][0].write(record)
        self._records[split] += 1

    def finish(self) -> dict[str, Any]:
        """Gives the shards their names and returns what `parts/NNNNN.json` holds."""
        shards = {}
        for split, (writer, partial) in self._writers.items():
            writer.close()
            file = f"{split}-{self._suffix}"
            partial.replace(self._directory / file)
            shards[split] = {"file": file, "records": self._records[split]}
        return {"shards": shards, "notes": self.notes}

    def abort(self) -> None:
        """Removes what was written."""
        for writer, partial in self._writers.values():
            with contextlib.suppress(RuntimeError, ValueError):  # it may be what failed
                writer.close()
            partial.unlink(missing_ok=True)


class RecordJob:
    """A folder of shards in the making.

    Attributes:
      directory: the folder.
      items: how many items there are.
      parts: into how many parts they are cut.
    """

    def __init__(
        self, directory: str | os.PathLike, kind: str, plan: Mapping[str, Any], *, items: int, group: int,
        overwrite: bool = False,
    ) -> None:  # fmt: skip
        """Makes the folder, or goes on with one that the same job began.

        Args:
          directory: folder to write.
          kind: of data; readers check it.
          plan: everything the records depend on, as JSON; a job that goes on must have the same.
          items: number of items, at least 1.
          group: items of a part; a kill costs at most the work on one part of each process.
          overwrite: remove what a job of the same kind has left there.

        Raises:
          UserError: a folder of something else or of another plan, or one that cannot be written.
        """
        self.directory, self.items, self._kind, self._group = Path(directory).expanduser(), items, kind, group
        if items < 1 or group < 1:
            raise UserError(f"--output {directory}: {items} items in parts of {group}; both must be at least 1")
        self.parts = -(-items // group)
        plan = json.loads(json.dumps({"format": _FORMAT, "kind": kind, "items": items, "group": group, **plan}))
        with self._writing():
            stored = self._stored_plan()
            if stored is not None and overwrite and stored.get("kind") == kind:
                shutil.rmtree(self.directory)
                stored = None
            if stored is None:
                (self.directory / "parts").mkdir(parents=True, exist_ok=True)
                _write_json(self.directory / "plan.json", plan)
            else:
                self._check_plan(stored, plan)

    def _stored_plan(self) -> dict[str, Any] | None:
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"--output {self.directory} is a file; choose a folder")
        path = self.directory / "plan.json"
        if not path.is_file():
            if self.directory.is_dir() and any(not _is_own(p.name) for p in self.directory.iterdir()):
                raise UserError(f"--output {self.directory} holds other files: not touched; choose another folder")
            return None
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); remove the folder and start again") from error

    def _check_plan(self, stored: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
        for key in sorted(stored.keys() | plan.keys(), key=lambda k: (k != "kind", k)):
            if stored.get(key) != plan.get(key):
                other = "choose another folder" + ("" if key == "kind" else ", or add --overwrite")
                raise UserError(
                    f"--output {self.directory} was begun with {key} = {stored.get(key)!r}, not {plan.get(key)!r}; go "
                    f"on with the same input, {other}"
                )

    def pending(self, index: int = 0, count: int = 1) -> list[int]:
        """The parts that process `index` of `count` still has to write, a contiguous range of all parts."""
        if not 0 <= index < count:
            raise UserError(f"--shard-index {index} of --num-shards {count}: use 0 to {count - 1}")
        own = range(self.parts * index // count, self.parts * (index + 1) // count)
        return [number for number in own if not self._sidecar(number).is_file()]

    def items_of(self, part: int) -> range:
        """Numbers of the items of a part."""
        return range(part * self._group, min(self.items, (part + 1) * self._group))

    @contextlib.contextmanager
    def part(self, number: int) -> Iterator[Part]:
        """Writes a part: everything or, if the block raises, nothing of it appears."""
        for left in self.directory.glob(f".*-{number:05d}-of-{self.parts:05d}.array_record.*.partial"):
            left.unlink(missing_ok=True)  # of a process that was killed
        part = Part(self.directory, number, self.parts)
        with self._writing():
            try:
                yield part
                _write_json(self._sidecar(number), part.finish())
            except BaseException:
                part.abort()
                raise

    def finish(self, **info: Any) -> dict[str, Any] | None:
        """Writes `dataset.json` and returns it if all parts are there; None if other processes are still at theirs.

        Args:
          info: what readers need to know besides the shards; a callable value gets the notes of all parts in order.
        """
        if not all(self._sidecar(number).is_file() for number in range(self.parts)):
            return None
        done = [json.loads(self._sidecar(number).read_text(encoding="utf-8")) for number in range(self.parts)]
        notes = [note for part in done for note in part["notes"]]
        shards: dict[str, list] = {}
        for part in done:
            for split, shard in part["shards"].items():
                shards.setdefault(split, []).append(shard)
        described = {
            "format": _FORMAT, "kind": self._kind,
            **{key: value(notes) if callable(value) else value for key, value in info.items()},
            "counts": {split: sum(shard["records"] for shard in own) for split, own in shards.items()},
            "shards": shards,
        }  # fmt: skip
        with self._writing():
            _write_json(self.directory / "dataset.json", described)
        return described

    def _sidecar(self, number: int) -> Path:
        return self.directory / "parts" / f"{number:05d}.json"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--output {self.directory} cannot be written ({error}); free space or choose another folder"
            ) from error


def read_dataset(directory: str | os.PathLike, kind: str, remedy: str) -> dict[str, Any]:
    """The `dataset.json` that `RecordJob.finish` wrote.

    Raises:
      UserError: there is none (also when the job is not finished), or it is of another kind.
    """
    directory = Path(directory).expanduser()
    path = directory / "dataset.json"
    try:
        info = dict(json.loads(path.read_text(encoding="utf-8")))
        if (info["format"], info["kind"]) != (_FORMAT, kind):
            raise ValueError(f"{info['kind']} of format {info['format']}")
    except FileNotFoundError as error:
        begun = (directory / "plan.json").is_file()
        missing = "is not finished: run the same command again" if begun else f"holds no {kind}: {remedy}"
        raise UserError(f"{directory} {missing}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe {kind} ({error}); {remedy}") from error
    return info


def open_shards(directory: str | os.PathLike, info: Mapping[str, Any], split: str, remedy: str) -> Shards:
    """The shards of a split of a finished folder."""
    listed = info["shards"].get(split, [])
    folder = Path(directory).expanduser()
    return Shards([(folder / s["file"], int(s["records"])) for s in listed], what=info["kind"], remedy=remedy)


def _is_own(name: str) -> bool:
    """Whether another process of the same job may just have put this there."""
    return name == "parts" or name.endswith(".partial")


def _write_json(path: Path, value: Any) -> None:
    """Under a temporary name first: a reader sees the whole file or none."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
