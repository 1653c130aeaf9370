"""Windows of captioned clips into record shards: the job that `prepare clips` and `prepare latents` share."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from tqdm import tqdm

from greedy_distill_jax.data.sources.captions import read_captions
from greedy_distill_jax.data.sources.cutting import SPLITS, Cutting, check_rates, cut
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.record_job import PLAN, RecordJob
from greedy_distill_jax.storage.records import encode_record, fingerprint


def _size(path: Path) -> int:
    """Bytes of a file; -1 of one that cannot be read, such as a link to nothing, which `cut` will name."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def write_windows(
    clips: str | os.PathLike,
    captions: str | os.PathLike,
    directory: str | os.PathLike,
    kind: str,
    cutting: Cutting,
    arrays: Callable[[UInt8[np.ndarray, "T H W 3"]], Mapping[str, Shaped[np.ndarray, "..."]]],
    *,
    plan: Mapping[str, Any],
    info: Mapping[str, Any],
    group: int,
    share: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    progress: bool = True,
    begin: Callable[[Path], None] = lambda directory: None,
    before: Callable[[dict[str, Any]], None] = lambda info: None,
) -> dict[str, Any] | None:
    """Cuts clips and stores what `arrays` makes of every window; goes on where an earlier call was killed.

    A clip that does not decode to at least one window is named on standard error and skipped. One clip at a time is
    held in memory, at the size of the windows.

    Args:
      clips, captions: see `read_captions`.
      directory: folder to write.
      kind: name of the kind of records.
      cutting: sizes and windows.
      arrays: uint8 frames of a window -> the arrays of its record.
      plan: what the records depend on besides clips, captions and cutting, see `RecordJob`.
      info: what dataset.json tells besides the clips, their captions and counts.
      group: clips of a part; a kill costs each process at most the work on one part.
      share: (index, count) of this process.
      overwrite: replace a folder prepared before.
      progress: show a bar on standard error.
      begin: called with the folder once it is there.
      before: called with what dataset.json will hold; see `RecordJob.finish`.

    Returns:
      What dataset.json holds; None if other processes have not finished.

    Raises:
      UserError: captions and clips that do not match, clips of several rates without `cutting.fps`, a folder of another
        job, or no clip that gives a window.
    """
    caption_of = read_captions(clips, captions)
    names, folder = list(caption_of), Path(clips)
    files = fingerprint(f"{name} {_size(folder / name)} {caption_of[name]}" for name in names)
    if cutting.fps is None and (overwrite or not (Path(directory).expanduser() / PLAN).exists()):  # or as it began
        check_rates([folder / name for name in names], progress=progress)
    plan = {"clips": files, **cutting.plan(), **plan}
    job = RecordJob(directory, kind, plan, items=len(names), group=group, overwrite=overwrite)
    begin(job.directory)
    pending = job.pending(share)
    total = sum(len(job.items_of(number)) for number in pending)
    with tqdm(total=total, desc=f"prepare {kind}", unit="clip", disable=not progress) as bar:
        for number in pending:
            with job.part(number) as part:
                for name in (names[item] for item in job.items_of(number)):
                    bar.set_postfix_str(name, refresh=True)
                    try:
                        entry, starts, video = cut(folder / name, cutting)
                    except UserError as error:
                        part.notes.append({"clip": name, "reason": str(error)})
                        tqdm.write(f"skipped {name}: {error}", file=sys.stderr)
                        bar.update()
                        continue
                    counts = dict.fromkeys(SPLITS, 0)
                    for split in SPLITS:
                        for start in starts[split]:
                            for crop, images in enumerate(video if split == "train" else video[:1]):
                                window = arrays(images[start : start + cutting.frames])
                                header = dict(caption=caption_of[name], clip=name, start=start, crop=crop)
                                part.write(split, encode_record(window, **header))
                                counts[split] += 1
                    part.notes.append({"clip": name, **entry, **counts})
                    bar.update()

    def check(described: dict[str, Any]) -> None:
        if not described["counts"].get("train"):
            first = described["skipped"][0]["reason"]
            raise UserError(f"{clips}: none of the {len(names)} clips gives a window; the first: {first}", "clips")
        before(described)

    told = {
        "fps": lambda notes: cutting.fps or statistics.median_low([note["fps"] for note in _used(notes)] or [0]),
        "captions": lambda notes: {note["clip"]: caption_of[note["clip"]] for note in _used(notes)},
        "clips": _used,
        "skipped": lambda notes: [note for note in notes if "reason" in note],
    }
    return job.finish(check, **{**info, **told})


def _used(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [note for note in notes if "reason" not in note]
