"""Any format, recognised by what is there."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.weights import names
from greedy_distill_jax.weights.architecture import Config, as_config, wan_of
from greedy_distill_jax.weights.files import TensorFiles
from greedy_distill_jax.weights.kind import Asked, check_asked, with_kind
from greedy_distill_jax.weights.lora import is_adapter
from greedy_distill_jax.weights.others import check_model, unknown
from greedy_distill_jax.weights.shards import TORCH_SUFFIXES, safetensors_in
from greedy_distill_jax.weights.source import ENCODER, METADATA, STUDENT_FORMAT, TEXT, ForeignSource, OurSource, Source
from greedy_distill_jax.weights.tensor_files import read_config, tensor_files


def open_source(
    path: str | Path,
    *,
    part: str = "",
    step: int | None = None,
    heads: int | None = None,
    text_len: int | None = None,
    asked: Asked = Asked(),  # noqa: B008
) -> Source:
    """Recognises and opens a model.

    Args:
      path: a safetensors file or its index.json, a `.pt` / `.pth` file, a folder with one of them, the folder of a
        diffusers pipeline, an exported student, a converted folder or a training run.
      part: dictionary of a `.pt`, or which of several models in one file (see `tensor_files`), or "ema" / "params" of a
        run; "" for the default.
      step: of a training run; None for the newest.
      heads, text_len: where no config.json tells (heads are otherwise assumed to be of 128 channels).
      asked: whether a Wan DiT is a teacher or a causal student, and of which frames.

    Raises:
      UserError: nothing that is known, or a model that cannot be used; names file, tensor and remedy.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist; name a file or a folder with weights.", "path")
    if path.is_dir() and (path / "checkpoints").is_dir():
        source = OurSource(path, part, step)
        check_asked(path, asked, source.cfg)
        return source
    if step is not None:
        raise UserError(f"{step} is asked for, but {path} is no training run, which has steps; leave it out.", "step")
    if path.is_dir() and (path / "transformer").is_dir() and not safetensors_in(path):
        path = path / "transformer"  # a diffusers pipeline
    files = tensor_files(path, part)
    folder = path if path.is_dir() else path.parent
    config = read_config(folder / "config.json")
    if is_adapter(files):
        raise UserError(
            f"{path} holds LoRA weights, not a model; name their base model, and these as what is merged into it.",
            "path",
        )
    naming = names.naming_of(files.entries)
    if naming is None:
        raise unknown(path, files.entries)
    if naming == "student":
        if config.get("format") != STUDENT_FORMAT:
            raise UserError(
                f"{folder}: config.json is missing or not that of an exported student; copy it there.", "path"
            )
        try:
            cfg = as_config(config["architecture"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder / 'config.json'} describes no student ({error!r}); export it again.", "path"
            ) from error
        check_asked(path, asked, cfg)
        return ForeignSource(path, "torch-student", files, cfg, "original", config | _found(files))
    form = "causal-pt" if next(iter(files.entries.values())).file.suffix in TORCH_SUFFIXES else naming
    check_model(path, files.entries)
    cfg, told = _wan_config(path, files, naming, config, heads, text_len), "it says so itself"
    if METADATA in files.metadata:
        check_asked(path, asked, cfg)
    else:
        cfg, told = with_kind(path, cfg, asked, part=files.part, wrapper=files.wrapper, config=config)
    return ForeignSource(path, form, files, cfg, naming, _found(files) | {"naming": naming, "told": told})


def _found(files: TensorFiles) -> dict[str, Any]:
    """Where in the file or files the model was, and what encodes its prompts: foreign weights know no hashed words."""
    ours = files.metadata.keys() & {METADATA, TEXT}
    text = files.metadata.get(TEXT, "") if ours else ENCODER
    precision = getattr(files, "precision", "")
    where = dict(part=files.part, parts=files.parts, wrapper=files.wrapper, besides=files.besides)
    return where | {"text": text, "precision": precision}


# config.json of Wan's repository and of diffusers -> ours.
_KEYS = {
    "original": {
        **{key: key for key in ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "text_len", "eps")},
        "in_dim": "channels",
    },
    "diffusers": {
        **{key: key for key in ("ffn_dim", "freq_dim", "num_layers", "eps", "text_dim")},
        "num_attention_heads": "num_heads",
        "in_channels": "channels",
    },
}


def _wan_config(path: Path, files: TensorFiles, naming: str, config: Mapping, heads, text_len) -> Config:
    """What the file says of itself, then config.json, then the shapes of the tensors."""
    if METADATA in files.metadata:
        try:
            cfg = as_config(json.loads(files.metadata[METADATA]))
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}: metadata {METADATA!r} describes no model ({error}); export it again.", "path"
            ) from error
        for name, given, held in (
            ("heads", heads, wan_of(cfg).num_heads),
            ("text_len", text_len, wan_of(cfg).text_len),
        ):
            if given not in (None, held):
                raise UserError(f"{given} is given, but {path} itself says {held}; leave it out.", name)
        return cfg

    def shape(leaf: str) -> tuple[int, ...]:
        name = names.foreign_names(leaf, (1,), naming)[0]
        if name not in files.entries:
            raise UserError(f"{path}: tensor {name} is missing; the file is incomplete, download it again.", "path")
        return files.entries[name].shape

    patch = shape("embed/patch/kernel")
    if len(patch) != 5 or patch[2] != 1 or patch[3] != patch[4]:
        raise UserError(
            f"{path}: tensor patch_embedding.weight has shape {list(patch)}, expected [dim, C, 1, p, p].", "path"
        )
    layers = [int(found[1]) for name in files.entries if (found := re.match(r"blocks\.(\d+)\.", name))]
    fields = dict(
        dim=patch[0],
        channels=patch[1],
        patch=patch[3],
        num_layers=max(layers, default=0) + 1,
        ffn_dim=shape("blocks/ffn/up/kernel")[0],
        freq_dim=shape("embed/time_in/kernel")[-1],
        text_dim=shape("embed/text_in/kernel")[-1],
    )
    by_width = {size["dim"]: size["num_heads"] for size in WAN_SIZES.values() if size["dim"] > 1000}
    fields["num_heads"] = by_width.get(fields["dim"], fields["dim"] // 128)
    fields.update({ours: config[theirs] for theirs, ours in _KEYS[naming].items() if theirs in config})
    if naming == "diffusers" and {"num_attention_heads", "attention_head_dim"} <= set(config):
        fields["dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    fields.update({k: v for k, v in (("num_heads", heads), ("text_len", text_len)) if v is not None})
    try:
        return WanConfig(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error} Give the number of heads.", "heads") from error
