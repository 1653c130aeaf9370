"""How a clip becomes windows of frames: sizes, rates, starts, what is held out, crops."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from greedy_distill_jax import ranges
from greedy_distill_jax.data.video_io import LARGEST, probe, read_frames
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ranges import Count, FrameRate, Natural, Range, between

SPLITS = ("train", "held_out")


Side = Annotated[int, between(1, LARGEST)]  # pixels


@dataclasses.dataclass(frozen=True)
class Cutting:
    """How clips become windows.

    Frames are cropped about the centre to the aspect ratio asked for, then resized by area. The last ``held_out`` of
    each clip in time (at least one window) becomes held-out windows that share no frame with training windows; a clip
    too short for both gives training windows only.

    Attributes:
      width, height: of the windows, in pixels.
      frames: per window.
      fps: frames per second to resample to; frame k of a clip is then the one on display at time k / fps. None keeps
        each clip's own frames; their rates must be one then, see `check_rates`.
      stride: frames between the starts of windows; None for half of ``frames``.
      held_out: fraction of each clip, in [0, 1); 0 for none.
      crops: further training windows from each stretch of time, each seen through a random crop that stays where it is
        for the whole clip (a few clips hold many small scenes); seeded by the name of the clip.

    Raises:
      UserError: a number out of its range.
    """

    width: Side
    height: Side
    frames: Count
    fps: FrameRate | None = None
    stride: Count | None = None
    held_out: Annotated[float | int, Range(0, 1, with_high=False)] = 0.15
    crops: Natural = 0

    def __post_init__(self) -> None:
        ranges.check_fields(self)

    @property
    def step(self) -> int:
        """Frames from the start of a window to the next."""
        return max(1, self.frames // 2) if self.stride is None else self.stride

    def plan(self) -> dict[str, Any]:
        """As JSON, defaults filled in."""
        return {**dataclasses.asdict(self), "stride": self.step}


def check_rates(paths: Sequence[Path], *, progress: bool = True) -> None:
    """Refuses clips that do not share one constant frame rate: motion would be learned at several speeds.

    Reads all clips, decoding one frame of each; what cannot be read is passed over, because `cut` will name it.

    Args:
      paths: of the clips.
      progress: show a bar on standard error.

    Raises:
      UserError: (field "fps") rates more than 1% apart, or a clip whose frames come at uneven times.
    """
    infos = {}
    for path in tqdm(paths, desc="frame rates", unit="clip", disable=not progress):
        with contextlib.suppress(UserError):
            infos[path.name] = probe(path)
    rates = sorted(info.fps for info in infos.values())
    if not rates:
        return
    uneven = [name for name, info in infos.items() if info.variable]
    first, last = (next(name for name, info in infos.items() if info.fps == rates[at]) for at in (0, -1))
    if uneven:
        told = f"{uneven[0]} has a variable frame rate" + (f", so have {len(uneven) - 1} more" if uneven[1:] else "")
    elif rates[-1] > 1.01 * rates[0]:
        told = f"clips have different frame rates ({first} {rates[0]:.4g}, {last} {rates[-1]:.4g} frames per second)"
    else:
        return
    raise UserError(
        f"{told}: the speed of motion would be learned wrongly; give one rate for all, such as "
        f"{statistics.median_low(rates):.4g}",
        "fps",
    )


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


def cut(path: Path, cutting: Cutting) -> tuple[dict[str, Any], dict[str, range], UInt8[np.ndarray, "V n H W 3"]]:
    """Decodes one clip.

    Args:
      path: of the clip.
      cutting: sizes and windows.

    Returns:
      (its entry in dataset.json, the starts of its windows by split, its frames in V = 1 + crops views).

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
        raise UserError(f"{path} has {count} frames, a window needs {frames}; use fewer frames", "frames")
    held = max(frames, round(cutting.held_out * count)) if cutting.held_out else 0
    if count - held < frames:
        held = 0
    starts = {
        "train": range(0, count - held - frames + 1, cutting.step),
        "held_out": range(count - held, count - frames + 1, cutting.step),
    }
    entry = {"width": info.width, "height": info.height, "fps": fps or info.fps, "frames": count, "alpha": info.alpha}
    return entry, starts, np.swapaxes(np.asarray(images), 0, 1)
