"""Batches of latents and text rows from a random-access source, resumable at one global example index."""

from __future__ import annotations

import operator
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import grain
import numpy as np
from jaxtyping import Float32, UInt8

from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.data.sources.protocol import VideoSource
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.text.protocol import TextEncoder


class _TooManyBad(UserError):
    """No bad record by itself: a source that skips bad records, around another that does, lets it pass."""


class SkipBadRecords:
    """A source whose bad records (ValueError) are replaced by the next good record of the source.

    The replacement depends on the index alone, so it is the same on every process and after a restart. Every bad record
    is named in one warning; more than `limit` different ones raise.
    """

    def __init__(self, source: VideoSource, limit: int, readers: Callable[[int], Sequence[int]] | None = None) -> None:
        """Reads `source`.

        Args:
          source: what to read.
          limit: of different bad records (0: the first one raises).
          readers: of a bad record's index, the processes that have to skip what this one skips and do not say that
            they cannot read it; see ``distribution.agreement.readers``.
        """
        self._source, self._limit, self._readers = source, limit, readers
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
                except _TooManyBad:
                    raise
                except ValueError as error:
                    self._report(candidate, error)
        raise _TooManyBad(f"{self._source!r}: all {len(self)} records are bad; prepare the data again", "source")

    def _report(self, index: int, error: ValueError) -> None:
        self._count(index, error)
        # Outside the lock: other processes wait for what the other threads of this one find, too.
        if self._readers and (others := self._readers(index)):
            raise _TooManyBad(
                f"{error}; but process {others[0]}, which feeds the same rows, did not say that it cannot read it, and "
                "would train on other data; see why this process cannot, or prepare the data again",
                field="source",
            ) from error
        with self._lock:
            known, count = index in self._bad, self._count(index, error)
            self._bad.add(index)
        if not known:
            warnings.warn(f"skipped a bad record ({count} of at most {self._limit}): {error}")

    def _count(self, index: int, error: ValueError) -> int:
        """Of different bad records with this one."""
        count = len(self._bad | {index})
        if count > self._limit:
            raise _TooManyBad(
                f"{count} bad records, max_bad_records={self._limit}; the last: {error}; "
                "prepare the data again, or raise max_bad_records",
                field="max_bad_records",
            ) from error
        return count


def make_loader(
    source: VideoSource,
    *,
    codec: VideoCodec | None,
    text_encoder: TextEncoder,
    global_batch: int,
    seed: int,
    start: int = 0,
    rows: Sequence[int] | None = None,
    shuffle: bool = True,
    num_threads: int = 2,
    max_bad_records: int = 10,
) -> Iterator[dict[str, Any]]:
    """Endless batches of this process; the global batch at `start` is a function of (seed, start) alone.

    Examples form one endless sequence (the source, shuffled anew each epoch); the global batch k is its examples
    k * global_batch onwards, of which a process reads its rows. So the position in the data is one number that holds
    for any number of processes: resume with `start`.

    Args:
      source: random access to captions, with videos, latents or neither.
      codec: encodes uint8 videos to latents; None where the source has no videos.
      text_encoder: encodes captions to rows; not asked where the source stores them.
      global_batch: examples per batch over all processes.
      seed: of the shuffle, in [0, 2**32).
      start: global index of the first example, a multiple of `global_batch`.
      rows: of every global batch, which this process reads, in this order; None for all.
      shuffle: False for the order of the source.
      num_threads: threads that prefetch batches; 0 reads in the calling thread.
      max_bad_records: different records of the source that may be bad before it is an error.

    Returns:
      Iterator of {"latents": float32 [b, T, h, w, C], "text": float32 [b, M, D], "captions": list of b strings},
      b the number of rows; without "latents" where the source has captions alone, and with "states":
      float32 [b, K, T, h, w, C] where it has trajectories.

    Raises:
      UserError: numbers out of range, an empty source; while iterating, too many bad records.
    """
    if global_batch < 1:
        raise UserError(f"global_batch={global_batch}; use at least 1", field="global_batch")
    rows = range(global_batch) if rows is None else tuple(rows)
    if not rows or not set(rows) <= set(range(global_batch)):
        raise UserError(f"rows={list(rows)}; use some of 0 to {global_batch - 1}, rows of a batch", "rows")
    if start < 0 or start % global_batch:
        raise UserError(
            f"start={start} is not a multiple of global_batch={global_batch}; resume with the batch size of the run, "
            f"or at {max(0, start) // global_batch * global_batch}",
            field="start",
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed}; use 0 to {2**32 - 1}", "seed")
    if not len(source):
        raise UserError(f"{source!r} is empty; give a split with at least one record", "source")
    examples = grain.MapDataset.source(SkipBadRecords(source, max_bad_records))
    if shuffle:
        examples = examples.shuffle(seed=seed)
    examples = examples.repeat()

    def read(batch: int) -> dict[str, Any]:
        return collate([examples[batch * global_batch + row] for row in rows], codec, text_encoder)

    # Batches are read by number, not by slicing the examples: a slice with a step would interleave the processes' rows.
    batches = grain.MapDataset.range(start // global_batch, sys.maxsize // global_batch).map(read)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(batches.to_iter_dataset(options))


def collate(
    examples: Sequence[Mapping[str, Any]], codec: VideoCodec | None, text_encoder: TextEncoder
) -> dict[str, Any]:
    """Makes a batch of a source's examples; see `make_loader` for its entries."""
    batch: dict[str, Any] = {"captions": [example["caption"] for example in examples]}
    if {"latents", "video"} & examples[0].keys():
        batch["latents"] = latents_of(examples, codec)
    if "states" in examples[0]:
        batch["states"] = np.stack([example["states"] for example in examples])
    if "text" in examples[0]:
        batch["text"] = np.stack([example["text"] for example in examples])
        held, asked = batch["text"].shape[1:], (text_encoder.text_len, text_encoder.text_dim)
        if held != asked:
            raise UserError(
                f"the data holds {held[0]} text rows of width {held[1]}, the network takes {asked[0]} of {asked[1]}; "
                "set the network's text_len and text_dim, or prepare the data again",
                field="source",
            )
    else:
        batch["text"] = text_encoder(batch["captions"])
    return batch


def latents_of(examples: Sequence[Mapping[str, Any]], codec: VideoCodec | None) -> Float32[np.ndarray, "B T h w C"]:
    """Stacks the latents of a source's examples; videos are encoded."""
    if "latents" in examples[0]:
        return np.stack([example["latents"] for example in examples])
    return codec.encode(np.stack([example["video"] for example in examples]))


def videos_of(examples: Sequence[Mapping[str, Any]], codec: VideoCodec) -> UInt8[np.ndarray, "B T H W 3"]:
    """Stacks the videos of a source's examples; latents are decoded."""
    if "latents" in examples[0]:
        return codec.decode(latents_of(examples, codec))
    return np.stack([example["video"] for example in examples])
