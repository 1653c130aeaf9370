"""Clips as latents: what a codec makes of their windows, in record shards, so that training encodes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.data.sources.cutting import SPLITS, Cutting
from greedy_distill_jax.data.sources.protocol import check_held
from greedy_distill_jax.data.sources.windows import write_windows
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.records import fingerprint, fingerprint_files
from greedy_distill_jax.storage.sharded import RecordKind, ShardedSource
from greedy_distill_jax.weights.pipeline import CODEC, load_codec


def _example(record: dict[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    latents = record["latents"].astype(np.float32)
    if latents.shape != tuple(info["latent_shape"]):
        raise ValueError(f"latents of shape {latents.shape}")
    return {"latents": latents, "caption": str(record["caption"])}


# {"latents": float32 [T, h, w, C], "caption": str}
LATENTS = RecordKind("latents", "latents", SPLITS, _example, ("latent_shape", "codec"))


def prepare_latents(
    clips: str | os.PathLike,
    captions: str | os.PathLike,
    directory: str | os.PathLike,
    cutting: Cutting,
    codec: VideoCodec,
    *,
    dtype: str = "float32",
    group: int = 32,
    share: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Encodes the windows of captioned clips; clips are cut exactly as `prepare_clips` does.

    Args:
      clips, captions: see `read_captions`.
      directory: folder to write.
      cutting: sizes and windows.
      codec: encodes windows; a patch codec is saved in the folder, of another one its path.
      dtype: of the stored latents, "float32" or "bfloat16".
      group, share, overwrite, progress: see `write_windows`.

    Returns:
      What dataset.json holds; None if other processes have not finished.

    Raises:
      UserError: captions and clips that do not match, a size or length that the codec does not divide, a folder of
        another job, or no clip that gives a window.
    """
    stride = codec.temporal_stride
    if (cutting.frames - 1) % stride:
        near = 1 + (cutting.frames - 1) // stride * stride
        raise UserError(
            f"frames={cutting.frames}: the codec takes 1 + {stride} k, such as {near} or {near + stride}", "frames"
        )
    latent_shape = (1 + (cutting.frames - 1) // stride, *codec.latent_shape(cutting.height, cutting.width))
    made_by, path = _identity(codec)

    def begin(folder: Path) -> None:
        if isinstance(codec, PatchCodec) and not (folder / path).exists():
            codec.save(folder / path)

    return write_windows(
        clips,
        captions,
        directory,
        LATENTS.name,
        cutting,
        lambda window: {"latents": np.asarray(codec.encode(window)).astype(jnp.dtype(dtype))},
        plan={"dtype": dtype, "codec": made_by},
        info={"latent_shape": latent_shape, "codec": path, "plan": {**cutting.plan(), "dtype": dtype}},
        group=group,
        share=share,
        overwrite=overwrite,
        progress=progress,
        begin=begin,
    )


def _identity(codec: VideoCodec) -> tuple[str, str]:
    """(name of what latents depend on of a codec, where the prepared folder finds it: a copy, or the model folder)."""
    if isinstance(codec, PatchCodec):
        arrays = (codec.mean, codec.components, np.float32(codec.scale))
        return fingerprint(array.tobytes().hex() for array in arrays), CODEC
    vae = Path(codec.source) / "vae" if (Path(codec.source) / "vae").is_dir() else Path(codec.source)
    files = sorted(file for file in vae.iterdir() if file.is_file()) if vae.is_dir() else [vae]
    return fingerprint_files(files), codec.source


def open_latents(
    directory: str, *, split: str, size: int | None, frames: int | None, seed: int
) -> tuple[ShardedSource, VideoCodec]:
    """Opens a folder written by `prepare_latents` and the codec that made it; see `registry.load_source`.

    ``size`` and ``frames`` are those of the latents.
    """
    source = ShardedSource(directory, LATENTS, split)
    shape = source.info["latent_shape"]
    check_held(source, {"frames": shape[:1], "size": shape[1:3]}, frames=frames, size=size)
    return source, load_codec(source.directory / source.info["codec"])
