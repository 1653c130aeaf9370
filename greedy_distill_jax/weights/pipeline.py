"""A model folder in the layout of diffusers (`transformer/`, `text_encoder/`, `tokenizer/`, `vae/`, `scheduler/`)."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.errors import UserError, about
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.models.wan.linear import is_cast
from greedy_distill_jax.storage.partial import whole
from greedy_distill_jax.weights.architecture import describe
from greedy_distill_jax.weights.load import load
from greedy_distill_jax.weights.open import open_source
from greedy_distill_jax.weights.vae import load_vae_codec

CODEC, REFERENCE = "codec.npz", "codec.json"
WAN_SHIFT = 5.0  # of the noise levels, where the folder says nothing


def load_codec(codec: str | os.PathLike, *, dtype: str = "bfloat16") -> VideoCodec:
    """Loads what turns the latents of a model into pixels.

    Args:
      codec: path of a `codec.npz`, of a folder where `save_codec` left one, of a model folder with `vae/`, or of the
        weights of a VAE (see `weights.vae.load_vae`).
      dtype: that a VAE computes in; what `save_codec` wrote knows its own.

    Raises:
      UserError: none of these, or weights that do not fit.
    """
    path = Path(codec).expanduser()
    with about("codec"):
        if not path.exists():
            raise UserError(
                f"{path} does not exist; give a {CODEC}, a folder that holds one (a run or a prepared data set), a "
                "model folder with vae/, or the weights of a VAE"
            )
        if path.suffix == ".npz" or (path / CODEC).is_file():
            return PatchCodec.load(path if path.suffix == ".npz" else path / CODEC)
        if (path / REFERENCE).is_file():
            file, (path, dtype) = path / REFERENCE, _referenced(path)
            if not path.exists():
                raise UserError(
                    f'{file} names the VAE {path}, which is not there; correct "vae" in that file, or name the VAE '
                    "itself as the codec"
                )
        elif path.suffix not in (".safetensors", ".pth", ".pt") and not any(
            (path / part).exists() for part in ("vae", "config.json")
        ):
            raise UserError(
                f"{path} has no vae/ and no {CODEC}, so nothing turns its latents into pixels; give a complete model "
                "folder, or a run directory"
            )
        return load_vae_codec(path, dtype=dtype)


def _referenced(folder: Path) -> tuple[Path, str]:
    """Returns (place of the VAE that `save_codec` noted in a folder, the dtype it computes in)."""
    try:
        stored = json.loads((folder / REFERENCE).read_text(encoding="utf-8"))
        return Path(stored["vae"]), str(stored["dtype"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / REFERENCE} is damaged ({error}); name the VAE's weights instead", "codec"
        ) from error


def moved_codec(folder: str | os.PathLike, path: str | os.PathLike) -> VideoCodec:
    """Loads the codec at ``path`` instead of what `save_codec` left in a folder; the dtype is the one noted there."""
    folder = Path(folder).expanduser()
    if not (folder / REFERENCE).is_file():
        return load_codec(path)
    try:
        dtype = _referenced(folder)[1]
    except UserError as error:
        print(f"warning: {error}: computing in bfloat16", file=sys.stderr)
        dtype = "bfloat16"
    return load_codec(path, dtype=dtype)


def save_codec(codec: VideoCodec, folder: str | os.PathLike) -> None:
    """Leaves in a folder what `load_codec` needs: a patch codec itself, of a VAE the path of its weights."""
    if isinstance(codec, PatchCodec):
        codec.save(Path(folder) / CODEC)
    else:
        text = json.dumps({"vae": codec.source, "dtype": codec.vae.cfg.dtype})
        with whole(Path(folder) / REFERENCE) as partial:
            partial.write_text(text + "\n", encoding="utf-8")


def saved_codec(folder: str | os.PathLike) -> Path | None:
    """Returns the file that `save_codec` left in a folder, or None."""
    return next((path for name in (CODEC, REFERENCE) if (path := Path(folder) / name).is_file()), None)


def transformer_config(folder: str | os.PathLike, *, dtype: str = "bfloat16") -> WanConfig:
    """Reads the sizes of a model folder's `transformer/`, to compute in ``dtype`` without rematerialisation.

    Raises:
      UserError: no such folder, or no text-to-video model with one transformer.
    """
    return _open(folder, dtype)[0]


def load_transformer(folder: str | os.PathLike, *, dtype: str = "bfloat16") -> tuple[WanConfig, Any]:
    """Loads (sizes, parameters) of a model folder's `transformer/`: kernels that are used in ``dtype`` in it, as by
    `models.wan.linear.compute_precision`, the rest as stored.

    Raises:
      UserError: as for `transformer_config`, or a tensor that is missing or cannot be read.
    """
    cfg, source = _open(folder, dtype)

    def dtype_of(path: str) -> str:
        return dtype if is_cast(*("", *path.split("/"))[-2:]) else "keep"

    return cfg, load(source, dtype=dtype_of)


def _open(folder: str | os.PathLike, dtype: str):
    folder = Path(folder).expanduser()
    if not (folder / "transformer").is_dir():
        raise UserError(f"model folder {folder} has no transformer/; give one in the layout of diffusers", "folder")
    with about("folder"):
        source = open_source(folder / "transformer")
    if not isinstance(source.cfg, WanConfig):
        raise UserError(
            f"model folder {folder} holds {describe(source.cfg)}, which makes no whole videos; import it with "
            "`python -m greedy_distill_jax.convert import` and name what that wrote as a checkpoint",
            "folder",
        )
    return dataclasses.replace(source.cfg, dtype=dtype, remat="none"), source


def read_shift(folder: str | os.PathLike) -> float:
    """Returns the shift of the noise levels that a model folder's `scheduler/` asks for, else `WAN_SHIFT`.

    Raises:
      UserError: a scheduler of something else than flows, or no number.
    """
    path = Path(folder).expanduser() / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("prediction_type", "flow_prediction") != "flow_prediction":
            raise ValueError(f"prediction_type {config['prediction_type']!r}")
        shift = float(config.get("flow_shift", config.get("shift", WAN_SHIFT)))
        if not shift > 0:
            raise ValueError(f"a shift of {shift}")
    except FileNotFoundError:
        return WAN_SHIFT
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} describes no flow-matching scheduler ({error}); correct its prediction_type or flow_shift",
            "folder",
        ) from error
    return shift
