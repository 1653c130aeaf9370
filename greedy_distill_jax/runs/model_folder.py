"""The teacher of a model folder in the layout of diffusers, ready to sample."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.config import base, read_settings
from greedy_distill_jax.errors import UserError, about
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.runs.conversion import WAN_FPS, WAN_SAMPLING
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.runs.teacher_sampler import check_memory
from greedy_distill_jax.streaming.timeline import Timeline
from greedy_distill_jax.text.load import load_text_encoder
from greedy_distill_jax.text.prompts import WAN_NEGATIVE_PROMPT
from greedy_distill_jax.text.store import TextStore
from greedy_distill_jax.text.table import TextTable
from greedy_distill_jax.weights import pipeline


def load_model_folder(
    folder: str | Path,
    prompts: Sequence[str],
    *,
    height: int,
    width: int,
    frames: int,
    negative: str | None = None,
    dtype: str = "bfloat16",
    text: str | Path | None = None,
    codec: str | Path | None = None,
) -> Run:
    """Loads the teacher of a model folder for given prompts and sizes.

    The text encoder, which may be larger than the transformer, is gone when the transformer is loaded.

    Args:
      folder: with `transformer/`, and `text_encoder/` and `tokenizer/` unless ``text`` is given.
      prompts: all that will be asked for.
      height, width, frames: of the videos, in pixels and frames of video.
      negative: prompt of the unconditional branch; None for Wan2.1's own.
      dtype: to compute in, "bfloat16" or "float32".
      text: a text store or another model folder; None for the folder's own encoder.
      codec: what turns latents into pixels, see ``weights.pipeline.load_codec``; None for the folder's own.

    Raises:
      UserError: an incomplete folder, or parts and sizes that do not fit each other; its field is the argument's name.
    """
    negative = WAN_NEGATIVE_PROMPT if negative is None else negative
    with about("codec" if codec else "folder"):
        codec: VideoCodec = pipeline.load_codec(codec or folder, dtype=dtype)
    latent_shape = (Timeline(codec.temporal_stride).latent_frames(frames), *codec.latent_shape(height, width))
    with about("folder"):
        cfg = pipeline.transformer_config(folder, dtype=dtype)
    check_memory(cfg, latent_shape, videos=1, frames=frames)
    if latent_shape[-1] != cfg.channels:
        raise UserError(
            f"model folder {folder}: the latents of its codec have {latent_shape[-1]} channels, the transformer takes "
            f"{cfg.channels}; give a folder whose parts belong together",
            "folder",
        )
    for name, pixels, latents in (("height", height, latent_shape[1]), ("width", width, latent_shape[2])):
        if latents % cfg.patch:
            side = pixels // latents * cfg.patch
            raise UserError(f"{height} x {width}: both must be multiples of {side} pixels", name)
    with about("text" if text else "folder"):
        encoder = load_text_encoder(text or folder, text_len=cfg.text_len, text_dim=cfg.text_dim)
    if not isinstance(encoder, TextStore):
        encoder = TextTable(encoder, [*prompts, negative])
    with about("folder"):
        cfg, params = pipeline.load_transformer(folder, dtype=dtype)
    config = base()
    config.model.update(dataclasses.asdict(cfg))
    config.data.frames, config.data.negative_prompt, config.log.fps = latent_shape[0], negative, WAN_FPS
    config.sample.update(WAN_SAMPLING, shift=pipeline.read_shift(folder))
    return Run(read_settings(config), Teacher(cfg), params, codec, encoder, latent_shape, {})
