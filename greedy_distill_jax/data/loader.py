"""Batches of latents and text rows from a random-access source, resumable at one global example index."""

from __future__ import annotations

import operator
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import grain
import numpy as np

from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.data.sources.clips import ClipWindows
from greedy_distill_jax.data.sources.latents import LatentWindows
from greedy_distill_jax.data.sources.moving_shapes import MovingShapes
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.text.encoders import TextEncoder
from greedy_distill_jax.weights.pipeline import load_codec

_CODEC_SEED, _CODEC_VIDEOS = 0, 512


@runtime_checkable
class VideoSource(Protocol):
    """Random access to {"video": uint8 [T, H, W, 3], "caption": str}; a bad record raises ValueError naming it.

    A source of latents has {"latents": float32 [T, h, w, C], "caption": str}.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]: ...


class SkipBadRecords:
    """A source whose bad records (ValueError) are replaced by the next good record of the source.

    The replacement depends on the index alone, so it is the same on every process and after a restart. Every bad record
    is named in one warning; more than `limit` different ones raise.
    """

    def __init__(self, source: VideoSource, limit: int) -> None:
        """Args: `source` to read, `limit` of different bad records (0: the first one raises)."""
        self._source, self._limit = source, limit
        self._bad: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """The record, or the next good one; UserError beyond the limit or when no record is good."""
        first = operator.index(index)
        for offset in range(len(self)):
            candidate = (first + offset) % len(self)
            if candidate not in self._bad:
                try:
                    return self._source[candidate]
                except ValueError as error:
                    self._report(candidate, error)
        raise UserError(f"{self._source!r}: all {len(self)} records are bad; prepare the data again")

    def _report(self, index: int, error: ValueError) -> None:
        with self._lock:
            known = index in self._bad
            count = len(self._bad | {index})
            if count <= self._limit:
                self._bad.add(index)
        if count > self._limit:
            raise UserError(
                f"{count} bad records, max_bad_records={self._limit}; the last: {error}; "
                "prepare the data again, or raise max_bad_records"
            ) from error
        if not known:
            warnings.warn(f"skipped a bad record ({count} of at most {self._limit}): {error}")


def make_loader(
    source: VideoSource,
    *,
    codec: VideoCodec,
    text_encoder: TextEncoder,
    global_batch: int,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    num_threads: int = 2,
    max_bad_records: int = 10,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of this process; the global batch at `start` is a function of (seed, start) alone.

    Examples form one endless sequence (the source, shuffled anew each epoch); the global batch k is its examples
    k * global_batch onwards, and process p reads the p-th contiguous part of it. So the position in the data is one
    number that holds for any number of processes: resume with `start`.

    Args:
      source: random access to videos (or latents) and captions.
      codec: encodes uint8 videos to latents.
      text_encoder: encodes captions to rows.
      global_batch: examples per batch over all processes.
      seed: of the shuffle, in [0, 2**32).
      start: global index of the first example, a multiple of `global_batch`.
      process_index, process_count: which part of every batch to read.
      shuffle: False for the order of the source.
      num_threads: threads that prefetch batches; 0 reads in the calling thread.
      max_bad_records: different records of the source that may be bad before it is an error.

    Returns:
      Iterator of {"latents": float32 [b, T, h, w, C], "text": float32 [b, M, D]}, b = global_batch / process_count.

    Raises:
      UserError: numbers out of range, an empty source; while iterating, too many bad records.
    """
    if global_batch < 1 or process_count < 1 or global_batch % process_count:
        raise UserError(
            f"loader: global_batch={global_batch} over process_count={process_count}; use a multiple of process_count"
        )
    if not 0 <= process_index < process_count:
        raise UserError(f"loader: process_index={process_index}; use 0 to {process_count - 1}")
    if start < 0 or start % global_batch:
        raise UserError(
            f"loader: start={start} is not a multiple of global_batch={global_batch}; resume with the batch size of "
            f"the run, or at {max(0, start) // global_batch * global_batch}"
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"loader: seed={seed}; use 0 to {2**32 - 1}")
    if not len(source):
        raise UserError(f"loader: {source!r} is empty; give a split with at least one record")
    examples = grain.MapDataset.source(SkipBadRecords(source, max_bad_records))
    if shuffle:
        examples = examples.shuffle(seed=seed)
    examples = examples.repeat()
    local_batch = global_batch // process_count
    offset = process_index * local_batch

    def read(batch: int) -> dict[str, np.ndarray]:
        first = batch * global_batch + offset
        items = [examples[index] for index in range(first, first + local_batch)]
        return {
            "latents": latents_of(items, codec),
            "text": text_encoder([item["caption"] for item in items]),
        }

    # Batches are read by number, not by slicing the examples: a slice with a step would interleave the processes' rows.
    batches = grain.MapDataset.range(start // global_batch, sys.maxsize // global_batch).map(read)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(batches.to_iter_dataset(options))


def latents_of(examples: Sequence[Mapping[str, Any]], codec: VideoCodec) -> np.ndarray:
    """float32 [B, T, h, w, C] of a source's examples; videos are encoded."""
    if "latents" in examples[0]:
        return np.stack([example["latents"] for example in examples])
    return codec.encode(np.stack([example["video"] for example in examples]))


def videos_of(examples: Sequence[Mapping[str, Any]], codec: VideoCodec) -> np.ndarray:
    """uint8 [B, T, H, W, 3] of a source's examples; latents are decoded."""
    if "latents" in examples[0]:
        return codec.decode(latents_of(examples, codec))
    return np.stack([example["video"] for example in examples])


def is_shapes(spec: str) -> bool:
    """Whether a data specification names drawn shapes, which an oracle can read."""
    return spec.partition(":")[0] == "moving_shapes"


def captions_of(source: VideoSource) -> set[str]:
    """All captions of a prepared folder, which lists them; of another source those of its first records."""
    if isinstance(source, ClipWindows | LatentWindows):
        return set(source.info["captions"].values())
    return {source[index]["caption"] for index in range(min(4, len(source)))}


def load_source(
    spec: str, split: str = "train", *, size: int | None = None, frames: int | None = None, seed: int = 0
) -> tuple[VideoSource, VideoCodec]:
    """The source and the codec that a data specification names.

    Args:
      spec: "moving_shapes", "moving_shapes:wandering", "clips:DIR" with a folder written by `prepare clips`, or
        "latents:DIR" with one by `prepare latents`.
      split: "train" or "held_out".
      size, frames: of the videos (frames: latent ones of "latents:"); None for 16 and 8 (moving shapes) or for what the
        folder holds.
      seed: of the moving shapes. Their codec does not depend on it, nor on the split: it is fitted on a fixed sample.

    Raises:
      UserError: an unknown specification, or a size or frame count that the folder does not hold.
    """
    kind, _, directory = spec.partition(":")
    if is_shapes(spec):
        shapes = dict(size=size or 16, motion=directory or "captioned")
        sample = MovingShapes(**shapes, frames=4, split="train", seed=_CODEC_SEED)
        codec = PatchCodec.fit(np.stack([sample[index]["video"] for index in range(_CODEC_VIDEOS)]))
        return MovingShapes(**shapes, frames=frames or 8, split=split, seed=seed), codec
    if kind not in ("clips", "latents") or not directory:
        raise UserError(
            f"data {spec!r} is unknown; use moving_shapes, moving_shapes:wandering, clips:DIR or latents:DIR"
        )
    directory = Path(directory).expanduser()
    if kind == "latents":
        source: VideoSource = LatentWindows(directory, split)
        holds = (("frames", frames, source.latent_shape[:1]), ("size", size, source.latent_shape[1:3]))
    else:
        source = ClipWindows(directory, split)
        holds = (("frames", frames, (source.frames,)), ("size", size, (source.height, source.width)))
    for name, asked, held in holds:
        if asked is not None and set(held) != {asked}:
            raise UserError(
                f"data {spec!r} holds {name}={'x'.join(map(str, held))}, asked for {asked}; change the configuration, "
                f"or prepare the {kind} again"
            )
    return source, load_codec(source.codec if kind == "latents" else directory / "codec.npz")
