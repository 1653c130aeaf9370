"""Reads shape, colour, position and validity of the moving shapes back from pixels; nothing in it is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8

from greedy_distill_jax.data.sources import moving_shapes as ms
from greedy_distill_jax.errors import UserError

IOU_THRESHOLD = 0.7
MASS_RANGE = (0.7, 1.4)  # of the template's mass

_PIXELS_PER_CHUNK = 1 << 20


@dataclass(frozen=True)
class OracleReading:
    """What the oracle sees in every frame t of every video v.

    Attributes:
      shape_VT, colour_VT: indices into `moving_shapes.SHAPES` and `COLOURS` of the best match.
      position_VT2: centre of the matched template, (x, y) in pixels.
      velocity_VT2: position minus the position one frame before, pixels per frame; zero in frame 0.
      iou_VT: soft intersection over union, sum(min) / sum(max), of coverage and best template at that position.
      mass_VT: coverage over the template's coverage; 1 for a real frame, 0 for an empty one.
      rgb_VT3: colour of the object in [0, 1], the least-squares fit of the template to the frame.
    """

    shape_VT: Int[np.ndarray, "V T"]
    colour_VT: Int[np.ndarray, "V T"]
    position_VT2: Float32[np.ndarray, "V T 2"]
    velocity_VT2: Float32[np.ndarray, "V T 2"]
    iou_VT: Float32[np.ndarray, "V T"]
    mass_VT: Float32[np.ndarray, "V T"]
    rgb_VT3: Float32[np.ndarray, "V T 3"]


def read(video_VTHWC: UInt8[np.ndarray, "V T H W 3"]) -> OracleReading:
    """Reads every frame on its own.

    The colour is the one of the four whose mixtures with the background explain the frame best; the coverage of a
    pixel is its projection on that colour. Each shape's template is put where its centroid meets the centroid of the
    coverage, and the shape of the highest soft IoU wins.

    Raises:
      UserError: the frames are not square.
    """
    video = np.asarray(video_VTHWC)
    if video.dtype != np.uint8 or video.ndim != 5 or video.shape[-1] != 3:
        raise TypeError(f"oracle: expected uint8 [V, T, H, W, 3], got {video.dtype} {video.shape}")
    n_videos, n_frames, height, width = video.shape[:4]
    if height != width:
        raise UserError(f"oracle: frames of {width}x{height} pixels; moving shapes are read from square frames only")
    frames = video.reshape(-1, height * width, 3)
    n_chunks = max(1, -(-len(frames) * height * width // _PIXELS_PER_CHUNK))
    parts = [_read_frames(chunk, height) for chunk in np.array_split(frames, n_chunks)]
    shape, colour, position, iou, mass, rgb = (
        np.concatenate(field).reshape(n_videos, n_frames, *field[0].shape[1:]) for field in zip(*parts, strict=True)
    )
    velocity = np.zeros_like(position)
    velocity[:, 1:] = np.diff(position, axis=1)
    return OracleReading(shape, colour, position, velocity, iou, mass, rgb)


def valid(
    reading: OracleReading, captions: Sequence[str], *, iou_threshold: float = IOU_THRESHOLD, window: int = 8
) -> Bool[np.ndarray, "V T"]:
    """Frames that show the captioned shape in the captioned colour, with its mass and an IoU above the threshold.

    Where the caption names no colour, the one that most of the first `window` frames show takes its place.

    Raises:
      UserError: a caption is not one of the moving shapes'; the number of captions is not V.
    """
    shape_V, colour_V, _ = expected(reading, captions, window).T
    return (
        (reading.shape_VT == shape_V[:, None])
        & (reading.colour_VT == colour_V[:, None])
        & (reading.mass_VT > MASS_RANGE[0])
        & (reading.mass_VT < MASS_RANGE[1])
        & (reading.iou_VT > iou_threshold)
    )


def redrawn(
    video_VTHWC: UInt8[np.ndarray, "V T H W 3"], shape_V: Int[np.ndarray, " V"], rgb_V3: Float32[np.ndarray, "V 3"]
) -> UInt8[np.ndarray, "V T H W 3"]:
    """Real frames in the place of a video's: its object as it should be, at the positions that are read of it.

    Args:
      video_VTHWC: any videos.
      shape_V: index into `moving_shapes.SHAPES` of every video's object.
      rgb_V3: its colour, in [0, 1].
    """
    tint = 255 * rgb_V3[:, None] - ms.COLOUR_RGB[0]
    return ms.draw(shape_V[:, None], 0, read(video_VTHWC).position_VT2, video_VTHWC.shape[2], tint)


def expected(reading: OracleReading, captions: Sequence[str], window: int) -> Int[np.ndarray, "V 3"]:
    """`captioned`, with the colour that most of the first `window` frames show where the caption names none."""
    out = captioned(captions, len(reading.colour_VT))
    shown = (reading.colour_VT[:, :window, None] == np.arange(len(ms.COLOURS))).sum(1).argmax(1)
    out[:, 1] = np.where(out[:, 1] < 0, shown, out[:, 1])
    return out


def captioned(captions: Sequence[str], count: int) -> Int[np.ndarray, "V 3"]:
    """(shape, colour, direction) indices of every caption, -1 where it names none; UserError unless there are `count`
    known ones."""
    if len(captions) != count:
        raise UserError(f"oracle: {len(captions)} captions for {count} videos; give one caption per video")
    return np.array([ms.attributes(caption) for caption in captions], np.int64).reshape(count, 3)


def _read_frames(frames: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """(shape, colour, position, iou, mass, rgb) of uint8 frames [n, size * size, 3]."""
    pixels = frames.astype(np.float32) - ms.BACKGROUND  # [n, P, 3]
    contrast = ms.COLOUR_RGB - ms.BACKGROUND  # [colour, 3]
    norm = (contrast**2).sum(1)
    dot = pixels @ contrast.T  # [n, P, colour]
    mixing = np.clip(dot / norm, 0, 1)
    colour = ((mixing * norm - 2 * dot) * mixing).sum(1).argmin(1)  # residual, less the constant |pixels|^2
    alpha = np.take_along_axis(mixing, colour[:, None, None], 2)[..., 0]  # [n, P]
    alpha = np.where(alpha < 0.1, np.float32(0), alpha)

    mass = alpha.sum(1)
    centres = np.arange(size, dtype=np.float32) + np.float32(0.5)
    grid = np.stack(np.meshgrid(centres, centres, indexing="xy"), -1).reshape(-1, 2)  # [P, 2]
    centroid = np.where(mass[:, None] > 0, alpha @ grid / np.maximum(mass, 1e-6)[:, None], np.float32(size / 2))
    centre = np.full((len(ms.SHAPES), 2), size / 2, np.float32)
    reference = ms.coverage(np.arange(len(ms.SHAPES)), centre, size).reshape(len(ms.SHAPES), -1)
    offset = reference @ grid / reference.sum(1, keepdims=True) - size / 2  # centroid minus centre [shape, 2]
    positions = centroid[:, None] - offset  # [n, shape, 2]
    templates = ms.coverage(np.arange(len(ms.SHAPES)), positions, size).reshape(len(frames), len(ms.SHAPES), -1)
    overlap = np.minimum(templates, alpha[:, None]).sum(2)
    ious = overlap / np.maximum(templates.sum(2) + mass[:, None] - overlap, 1e-6)
    shape = ious.argmax(1)

    rows = np.arange(len(frames))
    template = templates[rows, shape]  # [n, P]
    template_sum = np.maximum(template.sum(1), 1e-6)
    rgb = np.einsum("np,npc->nc", template, pixels) / np.maximum((template**2).sum(1), 1e-6)[:, None]
    rgb = np.clip((rgb + ms.BACKGROUND) / 255, 0, 1)
    return shape, colour, positions[rows, shape], ious[rows, shape], mass / template_sum, rgb
