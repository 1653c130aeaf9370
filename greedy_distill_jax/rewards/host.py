"""Rewards in numpy, on decoded frames and prompts."""

import re
from typing import Annotated

import numpy as np
from jaxtyping import Float32, UInt8

from greedy_distill_jax.ranges import between
from greedy_distill_jax.rewards import colour
from greedy_distill_jax.rewards.images import to_jpeg
from greedy_distill_jax.rewards.protocol import HostView, Judged, reward

COLOURS = {  # name -> RGB
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "gray": (128, 128, 128),
    "red": (230, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 220, 50),
    "green": (50, 190, 70),
    "blue": (50, 80, 240),
    "purple": (140, 50, 170),
    "pink": (245, 140, 180),
    "brown": (130, 80, 40),
}


@reward(kind="host")
def jpeg_size(view: HostView, *, quality: Annotated[int, between(1, 100)] = 95) -> Float32[np.ndarray, " B"]:
    """Minus the mean size of a judged frame as JPEG, in thousands of bytes, for compressible videos.

    A frame of one colour is best. With a negative weight detail is asked for, and noise is best.

    References:
      Training Diffusion Models with Reinforcement Learning, arXiv 2305.13301 (compressibility).
    """
    sizes = [np.mean([len(to_jpeg(frame, quality)) for frame in video]) for video in view.video_BTHWC]
    return np.asarray(sizes, np.float32) / np.float32(-1000)


@reward(kind="host")
def target_colour(view: HostView) -> Judged:
    """Minus the distance in [0, 1] between what stands out and the first colour that the caption names.

    The mean over frames and channels of |c_t - colour|, c_t as in ``colour_kept``. A caption without a colour has no
    value. A frame full of specks of that colour is as good as an object.
    """
    wanted = [re.search(rf"\b({'|'.join(COLOURS)})\b", caption.lower()) for caption in view.captions]
    unnamed = [caption for caption, word in zip(view.captions, wanted, strict=True) if word is None]
    rgb = np.asarray([COLOURS[word[0]] if word else (np.nan,) * 3 for word in wanted], np.float32) / 255
    distance = np.asarray([_distance(*pair) for pair in zip(view.video_BTHWC, rgb, strict=True)], np.float32)
    return Judged(-distance, tuple(f"the caption {caption!r} names no colour" for caption in unnamed[:1]))


def _distance(video: UInt8[np.ndarray, "T H W 3"], rgb: Float32[np.ndarray, "3"]) -> np.floating:
    frames = video[None].astype(np.float32) / 255
    shown = colour.salient_colour(frames, *colour.salience(frames, np), np)
    return np.mean(np.abs(shown - rgb))
