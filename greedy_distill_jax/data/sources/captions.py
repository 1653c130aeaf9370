"""The captions of clips: a CSV file, checked both ways against the folder of clips."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from greedy_distill_jax.data.video_io import VIDEO_SUFFIXES
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.text.user_files import read_table

_COLUMNS = ("clip", "caption")


def read_captions(clips: str | os.PathLike, captions: str | os.PathLike) -> dict[str, str]:
    """Returns clip file name -> caption in sorted order.

    Args:
      clips: folder of video files; subfolders are not searched.
      captions: CSV file, UTF-8, with the columns `clip` (file name) and `caption`; see `read_table`.

    Raises:
      UserError: no folder or file, a bad table, a missing column, a clip named twice, without a caption or without a
        file.
    """
    folder, table = Path(clips), Path(captions)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds the clips", "clips")
    files = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        raise UserError(f"{folder} holds no clip; put files ending in {', '.join(VIDEO_SUFFIXES)} there", "clips")
    caption_of = _read_table(table)
    other = [name for name in caption_of if name not in files and (folder / name).is_file()]
    if other:
        kinds = ", ".join(VIDEO_SUFFIXES)
        raise UserError(
            f"{table} names {_some(other)}, of a kind that is not read; convert to one of {kinds}", "captions"
        )
    for names, others, message in (
        (caption_of, set(files), f"{table} names {{}}, which is not in {folder}; add the file, or remove the line"),
        (files, caption_of, f"{table} has no caption for {{}} in {folder}; add a line, or remove the file"),
    ):
        missing = [name for name in names if name not in others]
        if missing:
            raise UserError(message.format(_some(missing)), "captions")
    return dict(sorted(caption_of.items()))


def _read_table(path: Path) -> dict[str, str]:
    caption_of: dict[str, str] = {}
    names, rows = read_table(path, _COLUMNS, "captions")
    for column in _COLUMNS:
        if column not in names:
            raise UserError(
                f"{path} has no column {column!r} in line 1 ({', '.join(map(repr, names)) or 'which is empty'}); it "
                "must be clip,caption",
                "captions",
            )
    for line, row in rows:
        clip, caption = row["clip"], row["caption"]
        where = f"{path} line {line}"
        if not clip:
            raise UserError(f"{where} names no clip; write the name of its file", "captions")
        if clip in caption_of:
            raise UserError(f"{where}: {clip!r} is named twice; keep one line", "captions")
        if not caption:
            raise UserError(f"{where}: {clip!r} has no caption; write one", "captions")
        caption_of[clip] = caption
    return caption_of


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
