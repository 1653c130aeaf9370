"""Procedurally drawn captioned videos: one bouncing shape, random steps, 48 captions of which 12 are held out.

The step length of every frame is random, so that the next frame is a distribution and not a function of the past
(deterministic motion leaves no gap between few and many denoising steps).
Lengths are given at 16x16 pixels and scale with the size of the frame.

"Wandering" shapes make errors add up over a long stream: colour, tint, axis and heading are not in the caption, so that
only the frames before can tell them; and every window of a video looks like any other, so that a teacher of short clips
can judge any part of a long one.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Float, Float32, Float64, UInt8

from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.errors import UserError

SHAPES = ("square", "circle", "triangle")
COLOURS = ("red", "green", "blue", "yellow")
DIRECTIONS = ("left", "right", "up", "down")
COLOUR_RGB = np.array([[230, 50, 50], [50, 200, 70], [60, 90, 240], [240, 220, 50]], np.float32)  # [colour, 3]
DIRECTION_XY = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]], np.float64)  # [direction, 2], y grows downwards
BACKGROUND = np.float32(20)
SPLITS = ("train", "held_out")
MOTIONS = ("captioned", "wandering")

_RADIUS = 3.3 / 16  # half the side of every shape's bounding box, as a fraction of the frame
_STEP_RANGE = (0.2 / 16, 2.4 / 16)  # step per frame, as fractions of the frame
_CODEC_SEED, _CODEC_VIDEOS = 0, 512
_TINT = 24.0  # largest difference of a wandering shape's colour from its name's, per channel of 0..255


def radius(size: int) -> float:
    """Half the side, in pixels, of the bounding box of every shape in a frame of `size` x `size`."""
    return _RADIUS * size


def caption_of(shape: int, colour: int, direction: int) -> str:
    """The caption of three indices, e.g. "a red square moving left"; without direction (-1) "a square wandering"."""
    if direction < 0:
        return f"a {SHAPES[shape]} wandering"
    return f"a {COLOURS[colour]} {SHAPES[shape]} moving {DIRECTIONS[direction]}"


def _is_held_out(shape: int, colour: int, direction: int) -> bool:
    # A Latin choice: one direction per shape-colour pair, so that each pair of attributes also occurs in training.
    return direction == (shape + colour) % len(DIRECTIONS)


_ALL = tuple(itertools.product(range(len(SHAPES)), range(len(COLOURS)), range(len(DIRECTIONS))))
_OF_SPLIT = {
    "train": tuple(c for c in _ALL if not _is_held_out(*c)),
    "held_out": tuple(c for c in _ALL if _is_held_out(*c)),
}
_PAIRS = tuple(itertools.product(range(len(SHAPES)), range(len(COLOURS))))
_ATTRIBUTES = {caption_of(*c): c for c in _ALL} | {caption_of(s, -1, -1): (s, -1, -1) for s in range(len(SHAPES))}


def captions(split: str) -> tuple[str, ...]:
    """The captions of a split in a fixed order: 36 of "train", 12 of "held_out".

    Every pair (shape, colour), (shape, direction) and (colour, direction) of a held-out caption occurs in training.
    """
    return tuple(caption_of(*c) for c in _OF_SPLIT[_checked_split(split)])


def attributes(caption: str) -> tuple[int, int, int]:
    """(shape, colour, direction) indices of a caption (-1: untold); UserError if it is not one of the 51."""
    if caption not in _ATTRIBUTES:
        raise UserError(
            f"moving_shapes: caption {caption!r} is none of its 51; write 'a COLOUR SHAPE moving DIRECTION' or 'a "
            f"SHAPE wandering' with colour in {', '.join(COLOURS)}, shape in {', '.join(SHAPES)}, direction in "
            f"{', '.join(DIRECTIONS)}",
            field="caption",
        )
    return _ATTRIBUTES[caption]


def coverage(shape: Any, position_xy: Float[np.ndarray, "*n 2"], size: int) -> Float32[np.ndarray, "*n size size"]:
    """The fraction of every pixel that a shape covers, antialiased by its distance to the outline.

    Args:
      shape: index or array of indices into SHAPES, broadcast against the leading axes of `position_xy`.
      position_xy: centre of the bounding box in pixels; (0.5, 0.5) is the centre of the upper left pixel.
      size: height and width of the frame in pixels.

    Returns:
      Values in [0, 1], rows first.
    """
    position_xy = np.asarray(position_xy, np.float32)
    shape = np.broadcast_to(shape, position_xy.shape[:-1])
    centres = np.arange(size, dtype=np.float32) + np.float32(0.5)
    x, y = (centres - position_xy[..., k, None] for k in (0, 1))  # [*n, size], each along its own axis
    x, y = x[..., None, :], y[..., :, None]
    r = np.float32(radius(size))
    kinds = np.unique(shape)
    if len(kinds) == 1:
        return np.clip(0.5 - _distance(int(kinds[0]), x, y, r), 0, 1)
    out = np.empty((*position_xy.shape[:-1], size, size), np.float32)
    for kind in kinds:
        of_kind = shape == kind
        out[of_kind] = np.clip(0.5 - _distance(int(kind), x[of_kind], y[of_kind], r), 0, 1)
    return out


def _distance(kind: int, x: np.ndarray, y: np.ndarray, r: np.float32) -> np.ndarray:
    """Signed distance to the outline of a shape that fills the box [-r, r]^2 (negative inside)."""
    if SHAPES[kind] == "square":
        return np.maximum(np.abs(x), np.abs(y)) - r
    if SHAPES[kind] == "circle":
        return np.sqrt(x * x + y * y) - r
    # Apex (0, -r), base from (-r, r) to (r, r): the sides have the normal (2, -1) / sqrt(5).
    side = (2 * np.abs(x) - y - r) * np.float32(5**-0.5)
    return np.maximum(side, y - r)


def draw(
    shape: Any, colour: Any, position_xy: Float[np.ndarray, "*n 2"], size: int, tint: Any = 0.0
) -> UInt8[np.ndarray, "*n size size 3"]:
    """Draws one shape per frame on the dark background.

    Args:
      shape, colour: index or array of indices into SHAPES and COLOURS, broadcast against `position_xy[..., 0]`.
      position_xy: centre of the bounding box in pixels (see `coverage`).
      size: height and width of the frame in pixels.
      tint: [3], added to the colour.
    """
    alpha = coverage(shape, position_xy, size)[..., None]
    rgb = np.clip(COLOUR_RGB[np.asarray(colour)] + np.asarray(tint, np.float32), 0, 255)
    contrast = (rgb - BACKGROUND)[..., None, None, :]
    return (BACKGROUND + alpha * contrast + np.float32(0.5)).astype(np.uint8)


@dataclass(frozen=True)
class ShapeState:
    """Ground truth of one video: centre `position_T2` (x, y in pixels), indices into SHAPES, COLOURS, DIRECTIONS, and
    the colour's tint (0..255 per channel). A wandering shape has direction -1."""

    position_T2: Float64[np.ndarray, "T 2"]
    shape: int
    colour: int
    direction: int
    tint: Float64[np.ndarray, "3"]


class MovingShapes:
    """Random-access source of captioned videos, drawn on the fly; a pure function of (seed, split, index).

    An object starts in the half of its range that lies away from the captioned direction, moves that way by
    U(0.2, 2.4) * size / 16 pixels per frame, and bounces at the walls; the other coordinate stays constant. It never
    bounces within the first two steps. "held_out" cycles evenly through the held-out captions, "train" draws them.
    With `motion="wandering"` start, axis and heading are uniform, so that bounces are as likely early as late, and both
    splits have all 3 captions (their videos differ).
    """

    def __init__(
        self,
        *,
        size: int = 16,
        frames: int = 8,
        split: str = "train",
        seed: int = 0,
        length: int = 2**31 - 1,
        motion: str = "captioned",
    ) -> None:
        """Args: `size` in pixels (at least 8), `frames` per video, `split` in SPLITS, `seed` >= 0, `length` >= 1,
        `motion` in MOTIONS."""
        if motion not in MOTIONS:
            raise UserError(f"moving_shapes: motion={motion!r} is unknown; use one of {', '.join(MOTIONS)}", "motion")
        self.motion = motion
        for name, value, least in (("size", size, 8), ("frames", frames, 1), ("seed", seed, 0), ("length", length, 1)):
            if value < least:
                raise UserError(f"moving_shapes: {name}={value} is too small; use at least {least}", name)
        self.size, self.frames, self.seed, self.length = size, frames, seed, length
        self.split = _checked_split(split)

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return (
            f"MovingShapes(size={self.size}, frames={self.frames}, split={self.split!r}, seed={self.seed}, "
            f"motion={self.motion!r})"
        )

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """{"video": uint8 [T, H, W, 3], "caption": str}."""
        truth = self.state(index)
        return {
            "video": draw(truth.shape, truth.colour, truth.position_T2, self.size, truth.tint),
            "caption": caption_of(truth.shape, truth.colour, truth.direction),
        }

    @property
    def captions(self) -> set[str]:
        """All captions of the split."""
        if self.motion == "wandering":
            return {caption_of(shape, -1, -1) for shape in range(len(SHAPES))}
        return {caption_of(*choice) for choice in _OF_SPLIT[self.split]}

    def state(self, index: SupportsIndex) -> ShapeState:
        """The ground truth of video `index`; IndexError outside [0, length)."""
        index = operator.index(index)
        if not 0 <= index < self.length:
            raise IndexError(f"{self!r}: index {index} is outside [0, {self.length})")
        # Seed sequences, PCG64 and `random` are what numpy keeps stable across versions: use nothing else.
        seeds = np.random.SeedSequence([self.seed, SPLITS.index(self.split), index])
        random = np.random.Generator(np.random.PCG64(seeds))
        uniform = random.random(self.frames + 2)
        if self.motion == "wandering":
            return self._wandering(index, uniform, random.random(4))
        choices = _OF_SPLIT[self.split]
        choice = index % len(choices) if self.split == "held_out" else int(uniform[0] * len(choices))
        shape, colour, direction = choices[choice]

        travel, (_, longest) = self._travel, self._step_range
        steps = self._steps(uniform[3:])
        start = uniform[2] * (travel - 2 * longest)  # from the wall behind the object
        axis, sign = direction // 2, DIRECTION_XY[direction].sum()
        position = self._positions(start, steps, axis, sign, uniform[1])
        return ShapeState(position, shape, colour, direction, np.zeros(3))

    def _wandering(self, index: int, uniform: np.ndarray, hidden: np.ndarray) -> ShapeState:
        choice = index % len(_PAIRS) if self.split == "held_out" else int(uniform[0] * len(_PAIRS))
        shape, colour = _PAIRS[choice]
        # A start on the way there or back is a start anywhere, in either direction.
        start, axis = uniform[2] * 2 * self._travel, int(hidden[0] * 2)
        position = self._positions(start, self._steps(uniform[3:]), axis, 1.0, uniform[1])
        return ShapeState(position, shape, colour, -1, (2 * hidden[1:] - 1) * _TINT)

    @property
    def _travel(self) -> float:
        """Pixels between the two extreme positions."""
        return self.size - 2 * radius(self.size)

    @property
    def _step_range(self) -> tuple[float, float]:
        return _STEP_RANGE[0] * self.size, _STEP_RANGE[1] * self.size

    def _steps(self, uniform: np.ndarray) -> np.ndarray:
        shortest, longest = self._step_range
        return shortest + (longest - shortest) * uniform

    def _positions(self, start: float, steps: np.ndarray, axis: int, sign: float, aside: float) -> np.ndarray:
        """[T, 2]: along one axis, reflected at both walls; constant on the other."""
        travel = self._travel
        along = np.concatenate([[0.0], np.cumsum(steps)]) + start
        along = travel - np.abs(along % (2 * travel) - travel)
        position = np.empty((self.frames, 2))
        position[:, axis] = self.size / 2 + sign * (along - travel / 2)
        position[:, 1 - axis] = radius(self.size) + aside * travel
        return position


def is_shapes(source: str) -> bool:
    """Whether a data specification names drawn shapes, which an oracle can read."""
    return source.partition(":")[0] == "moving_shapes"


def open_moving_shapes(
    motion: str, *, split: str, size: int | None, frames: int | None, seed: int
) -> tuple[MovingShapes, PatchCodec]:
    """Draws shapes ("" for captioned motion), with a codec fitted on a fixed sample; see `registry.load_source`."""
    shapes = dict(size=size or 16, motion=motion or "captioned")
    sample = MovingShapes(**shapes, frames=4, split="train", seed=_CODEC_SEED)
    codec = PatchCodec.fit(np.stack([sample[index]["video"] for index in range(_CODEC_VIDEOS)]))
    return MovingShapes(**shapes, frames=frames or 8, split=split, seed=seed), codec


def _checked_split(split: str) -> str:
    if split not in SPLITS:
        raise UserError(f"moving_shapes: split={split!r} is unknown; use one of {', '.join(SPLITS)}", "split")
    return split
