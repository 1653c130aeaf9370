"""Augmentation that does not leak: what was done to a video is said in its caption.

A few real clips are memorised within minutes. Mirrored, rotated, recoloured and reversed copies make a network learn
how frames follow each other instead; because the caption names the change, a plain caption still means a plain video
(the idea of Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", section 5).
"""

import itertools
import operator
from typing import Any, SupportsIndex

import numpy as np

from greedy_distill_jax.data.sources.protocol import VideoSource
from greedy_distill_jax.errors import UserError

COPIES = 128  # variants of a video in one pass over the data
_PLAIN = 0.25  # fraction left as it is
_CHANNELS = tuple(itertools.permutations(range(3)))
_MIRRORED, _INVERTED, _TRANSPOSED, _REVERSED = "mirrored", "inverted", "transposed", "reversed"


def _recoloured(order: tuple[int, ...]) -> str:
    return "".join("rgb"[i] for i in order)


# What captions may say besides their own words, by the name of an augmentation.
WORDS = {
    "none": (),
    "labelled": (_MIRRORED, _INVERTED, _TRANSPOSED, _REVERSED, *map(_recoloured, _CHANNELS[1:])),
}
AUGMENTATIONS = tuple(WORDS)


class Labelled:
    """Every video also mirrored, inverted, transposed (if square), recoloured and reversed in time."""

    def __init__(self, source: VideoSource, seed: int) -> None:
        self._source, self._seed = source, seed

    def __len__(self) -> int:
        return min(len(self._source) * COPIES, 2**31 - 1)

    def __repr__(self) -> str:
        return f"Labelled({self._source!r}, seed={self._seed})"

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        index = operator.index(index)
        example = self._source[index % len(self._source)]
        rng = np.random.default_rng((self._seed, index))
        if rng.random() < _PLAIN:
            return example
        video, words = example["video"], []
        square = video.shape[1] == video.shape[2]
        for word, possible, change in (
            (_MIRRORED, True, lambda v: v[:, :, ::-1]),
            (_INVERTED, True, lambda v: v[:, ::-1]),
            (_TRANSPOSED, square, lambda v: v.swapaxes(1, 2)),
            (_REVERSED, True, lambda v: v[::-1]),
        ):
            if possible and rng.random() < 0.5:
                video, words = change(video), [*words, word]
        order = _CHANNELS[rng.integers(len(_CHANNELS))]
        if order != (0, 1, 2):
            video, words = video[..., order], [*words, _recoloured(order)]
        return {**example, "video": np.ascontiguousarray(video), "caption": " ".join([example["caption"], *words])}


def augmented(source: VideoSource, name: str, seed: int) -> VideoSource:
    """Returns ``source`` under the augmentation ``name``, one of ``AUGMENTATIONS``.

    Raises:
      UserError: another name, or a source without pixels to change.
    """
    if name not in AUGMENTATIONS:
        raise UserError(f"augmentation {name!r} is unknown; choose from {', '.join(AUGMENTATIONS)}", "augment")
    if name == "none":
        return source
    if "video" not in source[0]:
        raise UserError(f"augmentation {name!r} changes pixels, but {source!r} holds none; use none", "augment")
    return Labelled(source, seed)
