"""Record shards that a job writes in pieces: on several processes, killed and started again, without gap or repeat.

A job is a list of items, cut into parts of equal size. A part is computed as a whole: its shards get their names when
they are complete, then `parts/NNNNN.json` says that the part is done. Whoever finishes the last part writes
`dataset.json`, and with it the folder is finished. What is done is a matter of files, so any number of processes may
share the parts, and a job that is started again goes on with the parts that are missing; `plan.json` holds it to the
same input. A part that two processes would write at once is refused to the second, and so is overwriting a job at which
a process still is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.lock import check_free, held, join
from greedy_distill_jax.storage.partial import Partial, whole
from greedy_distill_jax.storage.records import first_line
from greedy_distill_jax.storage.sharded import FORMAT

PLAN = "plan.json"
WRITER_OPTIONS = "group_size:1,zstd:3"  # records are read one by one, in random order


class Part:
    """The shards of one part while they are written; see `RecordJob.part`.

    Attributes:
      notes: JSON values that stay with the part, such as the keys of its records or what was skipped.
    """

    def __init__(self, directory: Path, number: int, of: int) -> None:
        self.notes: list[Any] = []
        self._directory, self._suffix = directory, f"{number:05d}-of-{of:05d}.array_record"
        self._shards: dict[str, _Shard] = {}

    def write(self, split: str, record: bytes) -> None:
        """Appends a record to the part's shard of a split."""
        if split not in self._shards:
            self._shards[split] = _Shard(self._directory / f"{split}-{self._suffix}")
        self._shards[split].write(record)

    def finish(self) -> dict[str, Any]:
        """Gives the shards their names, once all are whole, and returns what `parts/NNNNN.json` holds."""
        shards = {split: shard.close() for split, shard in self._shards.items()}
        for shard in self._shards.values():
            shard.partial.commit()
        return {"shards": shards, "notes": self.notes}

    def abort(self) -> None:
        """Removes what was written."""
        for shard in self._shards.values():
            shard.abort()


class _Shard:
    """One array_record file while it is written."""

    def __init__(self, path: Path) -> None:
        self.partial, self._records, self._digest = Partial(path), 0, hashlib.sha256()
        self._writer: ArrayRecordWriter | None = None

    def write(self, record: bytes) -> None:
        with _disk():
            self._writer = self._writer or ArrayRecordWriter(str(self.partial.path), WRITER_OPTIONS)
            self._writer.write(record)
        self._digest.update(len(record).to_bytes(8, "little") + record)
        self._records += 1

    def close(self) -> dict[str, Any]:
        with _disk():
            self._writer.close()
            size = self.partial.path.stat().st_size
        told = {"file": self.partial.target.name, "records": self._records, "bytes": size}
        return {**told, "sha256": self._digest.hexdigest()}

    def abort(self) -> None:
        with contextlib.suppress(OSError), _disk():  # it may be what failed, or be closed
            if self._writer is not None:
                self._writer.close()
        self.partial.abort()


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    """What array_record says of a disk is an OSError; its writer raises other errors, with every detail it has."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise OSError(first_line(error).split(";")[0]) from error


class RecordJob:
    """A folder of shards in the making.

    Attributes:
      directory: the folder.
      items: how many items there are.
      parts: into how many parts they are cut.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        kind: str,
        plan: Mapping[str, Any],
        *,
        items: int,
        group: int,
        overwrite: bool = False,
    ) -> None:
        """Makes the folder, or goes on with one that the same job began.

        Args:
          directory: folder to write.
          kind: name of the kind of data; readers check it.
          plan: everything the records depend on, as JSON; a job that goes on must have the same.
          items: number of items, at least 1.
          group: items of a part; a kill costs at most the work on one part of each process.
          overwrite: remove what a job of the same kind has left there.

        Raises:
          UserError: a folder of something else or of another plan, one that another process overwrites or, with
            ``overwrite``, is at, or one that cannot be written.
        """
        self.directory, self.items, self._kind, self._group = Path(directory).expanduser(), items, kind, group
        if items < 1 or group < 1:
            raise UserError(
                f"{items} items in parts of {group}; both must be at least 1", field="items" if items < 1 else "group"
            )
        self.parts = -(-items // group)
        plan = json.loads(json.dumps({"format": FORMAT, "kind": kind, "items": items, "group": group, **plan}))
        with self._writing():
            stored = self._stored_plan()
            if stored is not None and overwrite and stored.get("kind") == kind:
                for lock in self.directory.glob("parts/*.lock"):
                    check_free(lock, str(self.directory), field="directory")
                leave = self._join(alone=True)  # nor is anybody between two parts
                self._empty()
                leave()
                stored = None
            if stored is None:
                (self.directory / "parts").mkdir(parents=True, exist_ok=True)
                _write_json(self.directory / PLAN, plan)
            self._leave = self._join()
            try:
                self._check_plan(self._stored_plan() or {}, plan)
            except UserError:
                self._leave()  # in a notebook the error keeps this object alive, and the remedy is to overwrite
                raise

    def _join(self, *, alone: bool = False) -> Callable[[], Any]:
        """Shows that this process is at the job; returns what ends it, at the latest when the job is forgotten."""
        try:
            descriptor = join(self.directory / PLAN, str(self.directory), alone=alone, field="directory")
        except FileNotFoundError:  # clips of an earlier version
            descriptor = None
        return weakref.finalize(self, os.close, descriptor) if descriptor is not None else lambda: None

    def _empty(self) -> None:
        """Removes what is in the folder, the plan, which is locked, last.

        The folder stays: NFS keeps an open file under another name in it, with which it could not be removed.
        """
        for path in sorted(self.directory.iterdir(), key=lambda path: path.name == PLAN):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _stored_plan(self) -> dict[str, Any] | None:
        """The plan that a job began here; that of clips prepared before these had one is only their kind."""
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"{self.directory} is a file; choose a folder", field="directory")
        path = self.directory / PLAN
        try:
            if path.is_file():
                return dict(json.loads(path.read_text(encoding="utf-8")))
            if (described := self.directory / "dataset.json").is_file():
                return {"kind": json.loads(described.read_text(encoding="utf-8")).get("kind", "clips")}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{self.directory}: plan.json or dataset.json is damaged ({error}); remove the folder and start again",
                field="directory",
            ) from error
        if self.directory.is_dir() and any(not _is_own(p.name) for p in self.directory.iterdir()):
            raise UserError(
                f"{self.directory} holds other files: not touched; choose another folder", field="directory"
            )
        return None

    def _check_plan(self, stored: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
        if stored == {"kind": plan["kind"]}:
            raise UserError(
                f"{self.directory} holds {plan['kind']} of an earlier version, which no job can go on with; choose "
                "another folder, or overwrite this one",
                field="directory",
            )
        for key in sorted(stored.keys() | plan.keys(), key=lambda k: (k != "kind", k)):
            if stored.get(key) != plan.get(key):
                other = "choose another folder" + ("" if key == "kind" else ", or overwrite this one")
                raise UserError(
                    f"{self.directory} was begun with {key} = {stored.get(key)!r}, not {plan.get(key)!r}; go on with "
                    f"the same input, {other}",
                    field="directory",
                )

    def pending(self, share: tuple[int, int] = (0, 1)) -> list[int]:
        """Returns the parts that a process still has to write, of a contiguous range of all parts.

        Args:
          share: (index of the process, number of processes).
        """
        index, count = share
        if not 0 <= index < count:
            raise UserError(f"process {index} of {count} processes: use 0 to {count - 1}", field="share")
        own = range(self.parts * index // count, self.parts * (index + 1) // count)
        return [number for number in own if not self._sidecar(number).is_file()]

    def items_of(self, part: int) -> range:
        """Returns the numbers of the items of a part."""
        return range(part * self._group, min(self.items, (part + 1) * self._group))

    @contextlib.contextmanager
    def part(self, number: int) -> Iterator[Part]:
        """Writes a part: everything or, if the block raises, nothing of it appears."""
        what = f"{self.directory}: part {number}"
        with held(self.directory / "parts" / f"{number:05d}.lock", what, field="directory"), self._writing():
            for left in self.directory.glob(f".*-{number:05d}-of-{self.parts:05d}.array_record.*.partial"):
                left.unlink(missing_ok=True)  # of a process that was killed
            part = Part(self.directory, number, self.parts)
            try:
                yield part
                _write_json(self._sidecar(number), part.finish())
            except BaseException:
                part.abort()
                self._leave()  # in a notebook the error keeps the job alive
                raise

    def finish(self, before: Callable[[dict[str, Any]], None] | None = None, **info: Any) -> dict[str, Any] | None:
        """Writes `dataset.json` and returns it if all parts are there; None if other processes are still at theirs.

        Args:
          before: called with what `dataset.json` will hold; what it writes is there when the folder is finished, and
            the folder is not finished if it raises, and is removed if no record is in it. Several processes may call
            it at the same time.
          info: what readers need to know besides the shards; a callable value gets the notes of all parts in order.
        """
        self._leave()
        if not all(self._sidecar(number).is_file() for number in range(self.parts)):
            return None
        done = [json.loads(self._sidecar(number).read_text(encoding="utf-8")) for number in range(self.parts)]
        notes = [note for part in done for note in part["notes"]]
        shards: dict[str, list] = {}
        for part in done:
            for split, shard in part["shards"].items():
                shards.setdefault(split, []).append(shard)
        described = {
            "format": FORMAT,
            "kind": self._kind,
            **{key: value(notes) if callable(value) else value for key, value in info.items()},
            "counts": {split: sum(shard["records"] for shard in own) for split, own in shards.items()},
            "shards": shards,
        }
        with self._writing():
            try:
                if before is not None:
                    before(described)
            except UserError:
                if not shards:  # no record to keep: with better input the same command starts anew
                    shutil.rmtree(self.directory, ignore_errors=True)  # other processes may be at it too
                raise
            _write_json(self.directory / "dataset.json", described)
        return described

    def _sidecar(self, number: int) -> Path:
        return self.directory / "parts" / f"{number:05d}.json"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            told = (
                f"{self.directory} cannot be written ({error.strerror or error}); free space or choose another folder"
            )
            raise UserError(told, field="directory") from error


def _is_own(name: str) -> bool:
    """Whether another process of the same job may just have put this there."""
    return name == "parts" or (name.startswith(f".{PLAN}.") and name.endswith(".partial"))


def _write_json(path: Path, value: Any) -> None:
    """Writes under a temporary name first: a reader sees the whole file or none."""
    with whole(path) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
