"""Clips as latents: what a codec makes of their windows, in record shards, so that training encodes nothing.

A folder written by `prepare_latents` and read by `LatentWindows`; clips are cut exactly as `prepare clips` does.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.data.sources.clips import SPLITS, Cutting, cut, read_captions
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.records import (
    RecordJob,
    decode_record,
    encode_record,
    fingerprint,
    first_line,
    open_shards,
    read_dataset,
)

LATENTS = "latents"  # kind of a folder, see `records`
_REMEDY = "make it with python -m greedy_distill_jax.prepare latents"


class LatentWindows:
    """Random-access source: index -> {"latents": float32 [T, h, w, C], "caption": str}; picklable.

    Attributes:
      directory: the folder.
      split: "train" or "held_out".
      info: the content of dataset.json.
      latent_shape: (T, h, w, C) of every window.
      codec: path of what made the latents, for `export.pipeline.load_codec`.
    """

    def __init__(self, directory: str | os.PathLike, split: str = "train") -> None:
        """Opens the shards of a split; UserError for a missing or damaged folder, or an unknown split."""
        self.directory, self.split = Path(directory).expanduser(), split
        if split not in SPLITS:
            raise UserError(f"latents: split={split!r} is unknown; use one of {', '.join(SPLITS)}")
        self.info = read_dataset(self.directory, LATENTS, _REMEDY)
        self.latent_shape = tuple(self.info["latent_shape"])
        self.codec = self.directory / self.info["codec"]
        self._shards = open_shards(self.directory, self.info, split, _REMEDY)

    def __len__(self) -> int:
        return len(self._shards)

    def __repr__(self) -> str:
        return f"LatentWindows({os.fspath(self.directory)!r}, {self.split!r})"

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """One window; UserError naming the file and the index when the record is damaged."""
        shard, position = self._shards.locate(index)
        try:
            record = decode_record(self._shards[index])
            latents, caption = record["latents"].astype(np.float32), str(record["caption"])
            if latents.shape != self.latent_shape:
                raise ValueError(f"latents of shape {latents.shape}")
        except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
            raise UserError(
                f"latents: record {position} of {self._shards.paths[shard]} (index {index} of {self.split}) is "
                f"damaged: {first_line(error)}; prepare the latents again"
            ) from error
        return {"latents": latents, "caption": caption}


def prepare_latents(
    clips: str | os.PathLike,
    captions: str | os.PathLike,
    output: str | os.PathLike,
    cutting: Cutting,
    codec: VideoCodec,
    *,
    codec_path: str,
    plan: Mapping[str, Any],
    dtype: str = "float32",
    group: int = 32,
    share: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Encodes the windows of captioned clips; goes on where an earlier call was killed (see `records`).

    A clip that does not decode to at least one window is named on standard error and skipped. One clip at a time is
    held in memory, at the output size.

    Args:
      clips, captions: as for `clips.prepare_clips`.
      output: folder to write.
      cutting: sizes and windows.
      codec: encodes windows.
      codec_path: what `export.pipeline.load_codec` finds the codec by, absolute or relative to `output`; a `PatchCodec`
        is saved there.
      plan: what the latents depend on besides clips and cutting, see `RecordJob`.
      dtype: of the stored latents, "float32" or "bfloat16".
      group: clips of a part; a kill costs each process at most the work on one part.
      share: (index, count) of this process.
      overwrite: replace a folder prepared before.
      progress: show a bar on standard error.

    Returns:
      What dataset.json holds; None if other processes have not finished.

    Raises:
      UserError: captions and clips that do not match, a size or length that the codec does not divide, a folder of
        another job, or no clip at all that gives a window.
    """
    caption_of = read_captions(clips, captions)
    names, folder = list(caption_of), Path(clips)
    stride = codec.temporal_stride
    if (cutting.frames - 1) % stride:
        near = 1 + (cutting.frames - 1) // stride * stride
        raise UserError(f"--frames {cutting.frames}: the codec takes 1 + {stride} k, such as {near} or {near + stride}")
    latent_shape = (1 + (cutting.frames - 1) // stride, *codec.latent_shape(cutting.height, cutting.width))
    files = fingerprint(f"{name} {(folder / name).stat().st_size} {caption_of[name]}" for name in names)
    plan = {"clips": files, "dtype": dtype, **cutting.plan(), **plan}
    job = RecordJob(output, LATENTS, plan, items=len(names), group=group, overwrite=overwrite)
    if isinstance(codec, PatchCodec) and not (job.directory / codec_path).exists():
        codec.save(job.directory / codec_path)
    pending = job.pending(*share)
    total = sum(len(job.items_of(number)) for number in pending)
    with tqdm(total=total, desc="prepare latents", unit="clip", disable=not progress) as bar:
        for number in pending:
            with job.part(number) as part:
                for item in job.items_of(number):
                    name = names[item]
                    bar.set_postfix_str(name, refresh=True)
                    try:
                        entry, starts, video = cut(folder / name, cutting)
                    except UserError as error:
                        part.notes.append({"clip": name, "reason": str(error)})
                        tqdm.write(f"skipped {name}: {error}", file=sys.stderr)
                        bar.update()
                        continue
                    counts = dict.fromkeys(SPLITS, 0)
                    for split in SPLITS:
                        for start in starts[split]:
                            for crop, images in enumerate(video if split == "train" else video[:1]):
                                latents = codec.encode(images[start : start + cutting.frames])
                                record = {"latents": np.asarray(latents).astype(jnp.dtype(dtype))}
                                part.write(
                                    split, encode_record(record, caption=caption_of[name], clip=name, start=start,
                                                         crop=crop),
                                )  # fmt: skip
                                counts[split] += 1
                    part.notes.append({"clip": name, **entry, **counts})
                    bar.update()
    info = job.finish(
        latent_shape=latent_shape,
        codec=codec_path,
        plan=plan,
        fps=lambda notes: cutting.fps or statistics.median(n["fps"] for n in _used(notes)) if _used(notes) else 0,
        captions=lambda notes: {note["clip"]: caption_of[note["clip"]] for note in _used(notes)},
        clips=_used,
        skipped=lambda notes: [note for note in notes if "reason" in note],
    )
    if info is not None and not info["counts"].get("train"):
        raise UserError(
            f"--clips {clips}: none of the {len(names)} clips gives a window; the first: {info['skipped'][0]['reason']}"
        )
    return info


def _used(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [note for note in notes if "reason" not in note]
