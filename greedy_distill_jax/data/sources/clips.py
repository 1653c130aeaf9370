"""Real clips: windows of captioned frames in record shards, with a codec fitted on them.

A prepared folder holds `train-00000-of-0000N.array_record` (and `held_out-...`), `dataset.json` and `codec.npz`,
besides `plan.json` and `parts/` of the job that wrote it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.data.sources.cutting import SPLITS, Cutting
from greedy_distill_jax.data.sources.protocol import check_held
from greedy_distill_jax.data.sources.windows import write_windows
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.records import decode_record
from greedy_distill_jax.storage.sharded import RecordKind, ShardedSource, Shards, open_shards
from greedy_distill_jax.weights.pipeline import CODEC, load_codec

_CODEC_PATCH = 4
_CODEC_PATCHES = 1 << 18  # the codec is fitted on about this many patches


def _example(record: dict[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    video = record["video"]
    if video.dtype != np.uint8 or video.shape != (info["frames"], info["height"], info["width"], 3):
        raise ValueError(f"a window of {video.dtype} {video.shape}")
    return {"video": video, "caption": str(record["caption"])}


# {"video": uint8 [T, H, W, 3], "caption": str}
CLIPS = RecordKind("clips", "clips", SPLITS, _example, ("frames", "height", "width"))


def prepare_clips(
    clips: str | os.PathLike,
    captions: str | os.PathLike,
    directory: str | os.PathLike,
    cutting: Cutting,
    *,
    group: int = 32,
    share: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Cuts clips into captioned windows; whoever finishes the folder fits its codec on the training windows.

    Args:
      clips, captions: see `read_captions`.
      directory: folder to write.
      cutting: sizes and windows; both sides must be multiples of 4 pixels.
      group, share, overwrite, progress: see `write_windows`.

    Returns:
      What dataset.json holds; None if other processes have not finished.

    Raises:
      UserError: captions and clips that do not match, a folder of another job, no clip that gives a window, no held-out
        window though some were asked for.
    """
    for field, side in (("width", cutting.width), ("height", cutting.height)):
        if side % _CODEC_PATCH:
            raise UserError(f"{field}={side}: both sides must be multiples of {_CODEC_PATCH}, as in 32x32", field)
    folder = Path(directory).expanduser()

    def before(info: dict[str, Any]) -> None:
        if cutting.held_out and not info["counts"].get("held_out"):
            raise UserError(
                f"held_out={cutting.held_out:g}: no clip has the {2 * cutting.frames} frames of a training and a "
                "held-out window; use fewer frames, or hold out 0",
                "held_out",
            )
        sample = _codec_sample(open_shards(folder, info, CLIPS, "train"), cutting)
        PatchCodec.fit(sample, _CODEC_PATCH).save(folder / CODEC)

    return write_windows(
        clips,
        captions,
        folder,
        CLIPS.name,
        cutting,
        lambda window: {"video": window},
        plan={},
        info={**cutting.plan(), "codec": CODEC},
        group=group,
        share=share,
        overwrite=overwrite,
        progress=progress,
        before=before,
    )


def _codec_sample(shards: Shards, cutting: Cutting) -> UInt8[np.ndarray, "n H W 3"]:
    """Evenly spread frames of evenly spread training windows, about _CODEC_PATCHES patches in all."""
    total = max(1, _CODEC_PATCHES * _CODEC_PATCH**2 // (cutting.height * cutting.width))  # frames
    windows = np.unique(np.linspace(0, len(shards) - 1, min(total, len(shards), 256)).astype(int))
    per_window = min(cutting.frames, max(1, total // len(windows)))
    picks = np.unique(np.linspace(0, cutting.frames - 1, per_window).astype(int))
    return np.concatenate([decode_record(shards[index])["video"][picks] for index in windows])


def open_clips(
    directory: str, *, split: str, size: int | None, frames: int | None, seed: int
) -> tuple[ShardedSource, VideoCodec]:
    """Opens a folder written by `prepare_clips` and its codec; see `registry.load_source`."""
    source = ShardedSource(directory, CLIPS, split)
    held = {"frames": (source.info["frames"],), "size": (source.info["height"], source.info["width"])}
    check_held(source, held, frames=frames, size=size)
    return source, load_codec(source.directory / CODEC)
