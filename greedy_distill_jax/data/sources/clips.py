"""Real clips: windows of captioned frames in array_record shards, written by `prepare_clips`, read by `ClipWindows`.

A prepared folder holds `train-00000-of-0000N.array_record` (and `held_out-...`), `dataset.json` and `codec.npz`. A
record describes itself: magic, length of a JSON header (uint32, little endian), header (shape, caption, clip, start),
pixels.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import operator
import os
import shutil
import statistics
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import cv2
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import UInt8
from tqdm import tqdm

from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.data.video_io import VIDEO_SUFFIXES, probe, read_frames
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.records import WRITER_OPTIONS, Shards, first_line

SPLITS = ("train", "held_out")

_FORMAT = 1
_MAGIC = b"GDJ1"
_SHARD_BYTES = 256 << 20
_CODEC_PATCH = 4
_CODEC_PATCHES = 1 << 18  # the codec is fitted on about this many patches


@dataclasses.dataclass(frozen=True)
class Cutting:
    """How clips become windows; the arguments of `prepare_clips` of the same names.

    Raises:
      UserError: a number out of its range, named as the command line names it.
    """

    width: int
    height: int
    frames: int
    fps: float | int | None = None
    stride: int | None = None
    held_out: float | int = 0.15
    crops: int = 0

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 1:
            raise UserError(f"--size {self.width}x{self.height}: both sides must be positive, as in 32x32")
        if self.frames < 1 or self.step < 1:
            raise UserError(f"--frames {self.frames}, --stride {self.step}: both must be at least 1")
        if self.fps is not None and not self.fps > 0:
            raise UserError(f"--fps {self.fps}: must be positive")
        if self.crops < 0:
            raise UserError(f"--crops {self.crops}: must be 0 or more")
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out {self.held_out}: must be at least 0 and less than 1")

    @property
    def step(self) -> int:
        """Frames from the start of a window to the next."""
        return max(1, self.frames // 2) if self.stride is None else self.stride

    def plan(self) -> dict[str, Any]:
        """As JSON, defaults filled in."""
        return {**dataclasses.asdict(self), "stride": self.step}


def encode_record(video_THWC: UInt8[np.ndarray, "T H W 3"], caption: str, **source: Any) -> bytes:
    """One record: the pixels of a window behind a JSON header with its shape, caption and whatever `source` says."""
    video = np.ascontiguousarray(video_THWC)
    header = json.dumps({"shape": video.shape, "caption": caption, **source}, ensure_ascii=False).encode()
    return _MAGIC + len(header).to_bytes(4, "little") + header + video.tobytes()


def decode_record(record: bytes) -> dict[str, Any]:
    """{"video": uint8 [T, H, W, 3], "caption": str}; ValueError when the bytes are not a whole record."""
    if record[:4] != _MAGIC:
        raise ValueError(f"it does not begin with {_MAGIC!r}")
    end = 8 + int.from_bytes(record[4:8], "little")
    header = json.loads(record[8:end])
    shape = tuple(header["shape"])
    if len(shape) != 4 or shape[3] != 3 or len(record) - end != np.prod(shape):
        raise ValueError(f"{len(record) - end} bytes of pixels for shape {shape}")
    return {"video": np.frombuffer(record, np.uint8, offset=end).reshape(shape), "caption": str(header["caption"])}


class ClipWindows:
    """Random-access source over a prepared folder: index -> {"video": uint8 [T, H, W, 3], "caption": str}; picklable.

    Attributes:
      directory: the prepared folder.
      split: "train" or "held_out" (the last part of each clip in time).
      info: the content of dataset.json.
      height, width, frames, fps: of every window.
    """

    def __init__(self, directory: str | os.PathLike, split: str = "train") -> None:
        """Opens the shards of a split.

        Raises:
          UserError: no prepared folder, an unknown split, a missing or damaged shard.
        """
        self.directory, self.split = Path(directory), split
        if split not in SPLITS:
            raise UserError(f"clips: split={split!r} is unknown; use one of {', '.join(SPLITS)}")
        path = self.directory / "dataset.json"
        remedy = "make it with python -m greedy_distill_jax.prepare clips"
        try:
            self.info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if self.info["format"] != _FORMAT:
                raise ValueError(f"format {self.info['format']}, this version reads {_FORMAT}")
            self.height, self.width = int(self.info["height"]), int(self.info["width"])
            self.frames, self.fps = int(self.info["frames"]), float(self.info["fps"])
            shards = [(self.directory / shard["file"], int(shard["records"])) for shard in self.info["shards"][split]]
        except FileNotFoundError as error:
            raise UserError(f"clips: {path} does not exist; {remedy}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"clips: {path} is not a description of prepared clips ({error!r}); {remedy}") from error
        self._shards = Shards(shards, what="clips", remedy=remedy)

    def __len__(self) -> int:
        return len(self._shards)

    def __repr__(self) -> str:
        return f"ClipWindows({os.fspath(self.directory)!r}, {self.split!r})"

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """One window; UserError naming the file and the index when the record is damaged."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"{self!r}: index {index} is outside [0, {len(self)})")
        shard, position = self._shards.locate(index)
        try:
            example = decode_record(self._shards[index])
            if example["video"].shape != (self.frames, self.height, self.width, 3):
                raise ValueError(f"a window of shape {example['video'].shape}")
        except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
            raise UserError(
                f"clips: record {position} of {self._shards.paths[shard]} (index {index} of {self.split}) is damaged: "
                f"{first_line(error)}; prepare the clips again"
            ) from error
        return example


def prepare_clips(
    clips: str | os.PathLike,
    captions: str | os.PathLike,
    output: str | os.PathLike,
    *,
    width: int,
    height: int,
    frames: int,
    fps: float | int | None = None,
    stride: int | None = None,
    held_out: float | int = 0.15,
    crops: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Cuts clips into captioned windows and writes a prepared folder; everything or nothing appears at `output`.

    Frames are cropped about the centre to the aspect ratio asked for, then resized by area. With `fps`, frame k of a
    clip is the one on display at time k / fps. The last `held_out` of each clip in time (at least one window) becomes
    held-out windows that share no frame with training windows; a clip too short for both gives training windows only.
    One clip at a time is held in memory, at the output size.

    Args:
      clips: folder of the clips (mp4, webm, mov, avi, mkv); subfolders are not searched.
      captions: CSV file, UTF-8, with the columns `clip` (file name) and `caption`.
      output: folder to write.
      width, height: of the windows in pixels, multiples of 4.
      frames: frames per window.
      fps: frames per second to resample to; None keeps each clip's own frames.
      stride: frames between the starts of windows; None for frames // 2.
      held_out: fraction of each clip, in [0, 1); 0 for none.
      crops: further training windows from each stretch of time, each seen through a random crop that stays where it is
        for the whole clip (a few clips hold many small scenes); seeded by the name of the clip.
      overwrite: replace a folder prepared before.
      progress: show a bar on standard error. Clips that are skipped are named there in any case.

    Returns:
      What dataset.json holds.

    Raises:
      UserError: bad numbers, captions and clips that do not match, an output that exists or cannot be written, no clip
        that decodes to at least one window, no held-out window though some were asked for.
    """
    clips, output = Path(clips), Path(output)
    if width % _CODEC_PATCH or height % _CODEC_PATCH:
        raise UserError(
            f"--size {width}x{height}: both sides must be positive multiples of {_CODEC_PATCH}, as in 32x32"
        )
    cutting = Cutting(width, height, frames, fps, stride, held_out, crops)
    caption_of = read_captions(clips, captions)
    _check_output(output, overwrite)

    partial = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}); choose a writable folder") from error
    try:
        writers = {split: _ShardWriter(partial, split) for split in SPLITS}
        used, skipped = [], []
        bar = tqdm(caption_of.items(), desc="prepare clips", unit="clip", disable=not progress)
        for clip, caption in bar:
            bar.set_postfix_str(clip, refresh=True)
            try:
                entry, starts, video = cut(clips / clip, cutting)
            except UserError as error:
                skipped.append({"clip": clip, "reason": str(error)})
                tqdm.write(f"skipped {clip}: {error}", file=sys.stderr)
                continue
            for split in SPLITS:
                for start in starts[split]:
                    for crop, images in enumerate(video if split == "train" else video[:1]):
                        window = images[start : start + frames]
                        writers[split].write(encode_record(window, caption, clip=clip, start=start, crop=crop))
            counts = {"train": len(starts["train"]) * len(video), "held_out": len(starts["held_out"])}
            used.append({"clip": clip, **entry, **counts})
        if not used:
            raise UserError(
                f"--clips {clips}: none of the {len(skipped)} clips gives a window; the first: {skipped[0]['reason']}"
            )
        shards = {split: writer.close() for split, writer in writers.items()}
        if held_out and not shards["held_out"]:
            raise UserError(
                f"--held-out {held_out}: no clip has the {2 * frames} frames of a training and a held-out window; "
                "use fewer --frames, or --held-out 0"
            )
        info = {
            "format": _FORMAT,
            "width": width,
            "height": height,
            "frames": frames,
            "fps": fps or statistics.median(entry["fps"] for entry in used),
            "stride": cutting.step,
            "held_out": held_out,
            "crops": crops,
            "counts": {split: sum(shard["records"] for shard in shards[split]) for split in SPLITS},
            "shards": shards,
            "captions": {entry["clip"]: caption_of[entry["clip"]] for entry in used},
            "clips": used,
            "skipped": skipped,
        }
        text = json.dumps(info, indent=2, ensure_ascii=False) + "\n"
        (partial / "dataset.json").write_text(text, encoding="utf-8")
        PatchCodec.fit(_codec_sample(ClipWindows(partial)), _CODEC_PATCH).save(partial / "codec.npz")
        _move_into_place(partial, output)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"--output {output} cannot be written ({error}); free space or choose another folder"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return info


def read_captions(clips: str | os.PathLike, captions: str | os.PathLike) -> dict[str, str]:
    """Clip file name -> caption in sorted order, checked both ways against the folder.

    Raises:
      UserError: no folder or file, a missing column, a clip named twice, without a caption or without a file.
    """
    clips, captions = Path(clips), Path(captions)
    if not clips.is_dir():
        raise UserError(f"--clips {clips} is not a folder; give the folder that holds the clips")
    files = sorted(path.name for path in clips.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        raise UserError(f"--clips {clips} holds no clip; put files ending in {', '.join(VIDEO_SUFFIXES)} there")
    caption_of: dict[str, str] = {}
    try:
        with open(captions, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            for column in ("clip", "caption"):
                if column not in (reader.fieldnames or ()):
                    raise UserError(
                        f"--captions {captions} has no column {column!r}; its first line must be clip,caption"
                    )
            for row in reader:
                clip, caption = ((row[column] or "").strip() for column in ("clip", "caption"))
                if clip in caption_of:
                    raise UserError(
                        f"--captions {captions} line {reader.line_num}: {clip!r} is named twice; keep one line"
                    )
                if not caption:
                    raise UserError(f"--captions {captions} line {reader.line_num}: {clip!r} has no caption; write one")
                caption_of[clip] = caption
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--captions {captions} cannot be read ({reason}); give a UTF-8 CSV file clip,caption"
        ) from error
    for names, others, message in (
        (caption_of, set(files), f"{captions} names {{}}, which is not in {clips}; add the file, or remove the line"),
        (files, caption_of, f"{captions} has no caption for {{}} in {clips}; add a line, or remove the file"),
    ):
        missing = [name for name in names if name not in others]
        if missing:
            raise UserError("--captions " + message.format(_some(missing)))
    return dict(sorted(caption_of.items()))


def fit_frame(frame: UInt8[np.ndarray, "A B 3"], width: int, height: int) -> UInt8[np.ndarray, "H W 3"]:
    """Crops a frame about its centre to the aspect ratio asked for and resizes it (by area; linear to enlarge)."""
    rows, columns = frame.shape[:2]
    scale = max(width / columns, height / rows)
    crop_rows, crop_columns = min(rows, round(height / scale)), min(columns, round(width / scale))
    top, left = (rows - crop_rows) // 2, (columns - crop_columns) // 2
    crop = frame[top : top + crop_rows, left : left + crop_columns]
    return cv2.resize(crop, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def _random_boxes(clip: str, rows: int, columns: int, aspect: float, count: int) -> list[tuple[slice, slice]]:
    """Boxes of the given aspect ratio (width / height), 0.4 to 1 times the largest that fits, anywhere in a frame."""
    rng = np.random.default_rng(list(clip.encode()))
    largest = min(rows, columns / aspect)
    boxes = []
    for scale in rng.uniform(0.4, 1.0, count):
        box_rows, box_columns = max(1, int(largest * scale)), max(1, int(largest * scale * aspect))
        top, left = rng.integers(rows - box_rows + 1), rng.integers(columns - box_columns + 1)
        boxes.append((slice(top, top + box_rows), slice(left, left + box_columns)))
    return boxes


def cut(path: Path, cutting: Cutting) -> tuple[dict[str, Any], dict[str, range], np.ndarray]:
    """One clip: dataset.json's entry, the starts of its windows by split, its frames [1 + crops, n, H, W, 3] uint8.

    Raises:
      UserError: it does not decode, or is shorter than a window.
    """
    width, height, frames, fps = cutting.width, cutting.height, cutting.frames, cutting.fps
    info = probe(path)
    images, boxes = [], None
    for frame in read_frames(path, fps=fps):
        boxes = boxes or _random_boxes(path.name, *frame.shape[:2], width / height, cutting.crops)
        images.append([fit_frame(view, width, height) for view in (frame, *(frame[box] for box in boxes))])
    count = len(images)
    if count < frames:
        raise UserError(f"{path} has {count} frames, a window needs {frames}; use fewer --frames")
    held = max(frames, round(cutting.held_out * count)) if cutting.held_out else 0
    if count - held < frames:
        held = 0
    starts = {
        "train": range(0, count - held - frames + 1, cutting.step),
        "held_out": range(count - held, count - frames + 1, cutting.step),
    }
    entry = {"width": info.width, "height": info.height, "fps": fps or info.fps, "frames": count}
    return entry, starts, np.swapaxes(np.asarray(images), 0, 1)


class _ShardWriter:
    """Writes records of one split to shards of about 256 MiB; `close` names them by their number and lists them."""

    def __init__(self, directory: Path, split: str) -> None:
        self._directory, self._split = directory, split
        self._records: list[int] = []  # per shard
        self._writer, self._bytes = None, 0

    def write(self, record: bytes) -> None:
        if self._writer is None or self._bytes >= _SHARD_BYTES:
            self._finish()
            self._writer, self._bytes = ArrayRecordWriter(self._path(len(self._records)), WRITER_OPTIONS), 0
            self._records.append(0)
        self._writer.write(record)
        self._bytes += len(record)
        self._records[-1] += 1

    def close(self) -> list[dict[str, Any]]:
        self._finish()
        shards = []
        for number, records in enumerate(self._records):
            file = f"{self._split}-{number:05d}-of-{len(self._records):05d}.array_record"
            os.replace(self._path(number), self._directory / file)
            shards.append({"file": file, "records": records})
        return shards

    def _path(self, number: int) -> str:
        return os.fspath(self._directory / f"{self._split}-{number:05d}.partial")

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _codec_sample(source: ClipWindows) -> np.ndarray:
    """Evenly spread frames of evenly spread training windows, [n, H, W, 3], about _CODEC_PATCHES patches in all."""
    total = max(1, _CODEC_PATCHES * _CODEC_PATCH**2 // (source.height * source.width))  # frames
    windows = np.unique(np.linspace(0, len(source) - 1, min(total, len(source), 256)).astype(int))
    per_window = min(source.frames, max(1, total // len(windows)))
    picks = np.unique(np.linspace(0, source.frames - 1, per_window).astype(int))
    return np.concatenate([source[index]["video"][picks] for index in windows])


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; choose a folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise UserError(f"--output {output} exists and is not empty; choose another folder, or add --overwrite")
        if not (output / "dataset.json").is_file():
            raise UserError(
                f"--output {output} holds files but no prepared clips: not overwritten; choose another folder"
            )


def _move_into_place(partial: Path, output: Path) -> None:
    old = partial.with_suffix(".old")
    if output.is_dir():
        output.rename(old)
    partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
