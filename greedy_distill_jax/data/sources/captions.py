"""The captions of clips: a CSV file, checked both ways against the folder of clips."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from greedy_distill_jax.data.video_io import VIDEO_SUFFIXES
from greedy_distill_jax.errors import UserError


def read_captions(clips: str | os.PathLike, captions: str | os.PathLike) -> dict[str, str]:
    """Returns clip file name -> caption in sorted order.

    Args:
      clips: folder of video files; subfolders are not searched.
      captions: CSV file, UTF-8, with the columns `clip` (file name) and `caption`.

    Raises:
      UserError: no folder or file, a missing column, a clip named twice, without a caption or without a file.
    """
    folder, table = Path(clips), Path(captions)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds the clips", "clips")
    files = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        raise UserError(f"{folder} holds no clip; put files ending in {', '.join(VIDEO_SUFFIXES)} there", "clips")
    caption_of = _read_table(table)
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
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            for column in ("clip", "caption"):
                if column not in (reader.fieldnames or ()):
                    raise UserError(f"{path} has no column {column!r}; its first line must be clip,caption", "captions")
            for row in reader:
                clip, caption = ((row[column] or "").strip() for column in ("clip", "caption"))
                where = f"{path} line {reader.line_num}"
                if clip in caption_of:
                    raise UserError(f"{where}: {clip!r} is named twice; keep one line", "captions")
                if not caption:
                    raise UserError(f"{where}: {clip!r} has no caption; write one", "captions")
                caption_of[clip] = caption
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}); give a UTF-8 CSV file clip,caption", "captions") from error
    return caption_of


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
