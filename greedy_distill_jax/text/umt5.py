"""Wan's text encoder, UMT5, with its tokenizer, through transformers: prompts to rows as Wan's pipeline makes them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from greedy_distill_jax import ranges
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ranges import Count
from greedy_distill_jax.storage.records import fingerprint, fingerprint_files, first_line
from greedy_distill_jax.text.cleaning import clean_prompt, cleaning
from greedy_distill_jax.text.write_store import write_text_store
from greedy_distill_jax.weights.torch_files import import_torch

DTYPES = ("stored", "float32", "bfloat16")
TEXT_LEN = 512


def read_encoder_config(folder: str | os.PathLike) -> dict[str, Any]:
    """Reads config.json of a model folder's text encoder; UserError unless it is a UMT5 beside a tokenizer."""
    folder = Path(folder).expanduser()
    for part in ("tokenizer", "text_encoder"):
        if not (folder / part).is_dir():
            raise UserError(
                f"model folder {folder} has no {part}/; give one in the layout of diffusers, such as that of "
                "Wan2.1-T2V-1.3B-Diffusers",
                field="folder",
            )
    path = folder / "text_encoder" / "config.json"
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
        if config.get("model_type") != "umt5":
            raise ValueError(f"model_type {config.get('model_type')!r}, expected 'umt5'")
        config["d_model"] = int(config["d_model"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} does not describe a UMT5 encoder ({first_line(error)}); copy it again", field="folder"
        ) from error
    return config


def encoder_plan(folder: str | os.PathLike, text_len: int, dtype: str) -> tuple[dict[str, Any], str]:
    """Returns (what the rows of an encoder depend on, for a `RecordJob`; the dtype in which to store them).

    The model is named by its files' content, see `fingerprint_files`, so that it may be moved between two runs.
    """
    folder = Path(folder).expanduser()
    config = read_encoder_config(folder)
    files = [p for part in ("tokenizer", "text_encoder") for p in sorted((folder / part).iterdir()) if p.is_file()]
    plan = {
        "encoder": fingerprint_files(files),
        "cleaning": cleaning(),
        "text_len": text_len,
        "text_dim": config["d_model"],
    }
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    half = (stored if dtype == "stored" else dtype) == "bfloat16"
    return plan, "bfloat16" if half else "float32"


class UMT5Encoder:
    """UMT5 as a `TextEncoder`: cleans prompts, tokenises, encodes, and zeroes the rows of the padding.

    The same steps as diffusers' ``WanPipeline``: `clean_prompt`, special tokens, padding to `text_len` with an
    attention mask inside the encoder, zeros past the true length after it.

    Attributes:
      text_len, text_dim: rows of a prompt and their width.
      fingerprint: of what the rows depend on, see `encoder_plan`.
    """

    def __init__(
        self, folder: str | os.PathLike, *, text_len: int = TEXT_LEN, dtype: str = "stored", device: str | None = None
    ) -> None:
        """Loads tokenizer and encoder.

        Args:
          folder: model folder in the layout of diffusers, with `tokenizer/` and `text_encoder/` (safetensors).
          text_len: rows of a prompt, end-of-text token included.
          dtype: to compute in, one of `DTYPES`.
          device: of torch; None for CUDA where torch has it, else the CPU.

        Raises:
          UserError: no torch or transformers, an incomplete folder, another kind of model, weights that are missing.
        """
        ranges.check(text_len, Count, "text_len")
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}", field="dtype")
        folder = Path(folder).expanduser()
        config = read_encoder_config(folder)
        self.fingerprint = fingerprint([json.dumps(encoder_plan(folder, text_len, dtype))])
        self._torch = torch = import_torch("the text encoder")
        try:
            from transformers import AutoTokenizer, UMT5EncoderModel
        except ImportError as error:
            raise UserError(
                "the text encoder needs transformers; install it with: pip install 'greedy_distill_jax[torch]'."
            ) from error
        self.text_len, self.text_dim = text_len, config["d_model"]
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            self._model, report = UMT5EncoderModel.from_pretrained(
                folder / "text_encoder",
                dtype="auto" if dtype == "stored" else getattr(torch, dtype),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:  # transformers and its readers raise almost anything for a damaged file
            raise UserError(
                f"model folder {folder}: tokenizer/ or text_encoder/ cannot be loaded ({first_line(error)}); download "
                "it again",
                field="folder",
            ) from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise UserError(
                f"model folder {folder}: text_encoder/ lacks the tensor {missing[0]}; download it again", field="folder"
            )
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model.eval().requires_grad_(False).to(self._device)

    def __call__(self, prompts: Sequence[str]) -> Float32[np.ndarray, "B M D"]:
        """Rows of every prompt; a prompt of more than `text_len` tokens is cut with a warning that says where."""
        if isinstance(prompts, str):
            raise TypeError("UMT5Encoder: expected a list of prompts, got one string; wrap it in a list")
        if not prompts:
            return np.zeros((0, self.text_len, self.text_dim), np.float32)
        torch = self._torch
        prompts = [clean_prompt(prompt) for prompt in prompts]
        self._warn_of_cuts(prompts)
        tokens = self._tokenizer(
            prompts,
            padding="max_length",
            max_length=self.text_len,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(self._device)
        with torch.no_grad():
            rows = self._model(tokens.input_ids.to(self._device), mask).last_hidden_state
        rows = torch.where(mask[..., None] > 0, rows, torch.zeros_like(rows))
        return rows.float().cpu().numpy()

    def _warn_of_cuts(self, prompts: list[str]) -> None:
        for prompt, ids in zip(prompts, self._tokenizer(prompts, verbose=False).input_ids, strict=True):
            if len(ids) > self.text_len:
                kept = self._tokenizer.decode(ids[: self.text_len - 1], skip_special_tokens=True)
                warnings.warn(
                    f"prompt {prompt[:60]!r} has {len(ids)} tokens, text_len is {self.text_len}: cut after "
                    f"{kept[-40:]!r}",
                    stacklevel=3,
                )


def encode_prompts(
    prompts: Sequence[str],
    directory: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    text_len: int = TEXT_LEN,
    dtype: str = "stored",
    batch: int = 8,
    share: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Encodes prompts with a model folder's encoder into a store; see `write_text_store`.

    Args:
      prompts: the keys of the store.
      directory: folder to write.
      folder, text_len, dtype: as for `UMT5Encoder`; rows are stored in the dtype they are computed in.
      batch: prompts per call of the encoder.
      share: (index, count) of this process.
      overwrite: replace a store.
      progress: show a bar on standard error.

    Returns:
      What dataset.json holds; None if other processes have not finished.
    """
    for name, value in (("text_len", text_len), ("batch", batch)):
        ranges.check(value, Count, name)
    plan, stored = encoder_plan(folder, text_len, dtype)
    return write_text_store(
        prompts,
        directory,
        lambda: UMT5Encoder(folder, text_len=text_len, dtype=dtype),
        plan=plan,
        dtype=stored,
        batch=batch,
        share=share,
        overwrite=overwrite,
        progress=progress,
    )
