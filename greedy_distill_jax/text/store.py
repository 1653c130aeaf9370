"""A store of encoder rows on disk, read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from greedy_distill_jax.errors import UserError, about
from greedy_distill_jax.storage.sharded import RecordKind, ShardedSource
from greedy_distill_jax.text.protocol import TextEncoder


def _rows(record: dict[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    rows = record["rows"]
    if rows.ndim != 2 or len(rows) > info["text_len"] or rows.shape[1] != info["text_dim"]:
        raise ValueError(f"rows of shape {rows.shape}")
    return {"prompt": record["prompt"], "rows": rows}


STORE = RecordKind("text", "text", ("text",), _rows, ("text_len", "text_dim", "prompts"))


class TextStore:
    """Encoder rows from disk, written by `write_text_store`: any prompt of it at once, no other prompt.

    Attributes:
      text_len, text_dim: see `TextEncoder`.
      directory: of the store.
      info: the content of its dataset.json.
      prompts: its prompts, with the number of their record.
      fingerprint: of its content, see `ShardedSource`.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        """Opens a finished store; UserError when there is none or a shard is damaged."""
        with about("text"):
            self._source = ShardedSource(directory, STORE, "text")
        self.directory, self.info = self._source.directory, self._source.info
        self.fingerprint = self._source.fingerprint
        self.text_len, self.text_dim = int(self.info["text_len"]), int(self.info["text_dim"])
        self.prompts = {prompt: index for index, prompt in enumerate(self.info["prompts"])}

    def __call__(self, prompts: Sequence[str]) -> Float32[np.ndarray, "B M D"]:
        """Rows of every prompt; UserError naming the first that is not in the store."""
        if isinstance(prompts, str):
            raise TypeError("TextStore: expected a list of prompts, got one string; wrap it in a list")
        out = np.zeros((len(prompts), self.text_len, self.text_dim), np.float32)
        for rows, prompt in zip(out, prompts, strict=True):
            found = self._read(prompt.strip())
            rows[: len(found)] = found
        return out

    def _read(self, prompt: str) -> np.ndarray:
        index = self.prompts.get(prompt)
        if index is None:
            raise UserError(
                f"the text store {self.directory} has no prompt {prompt!r}; encode it with python -m "
                "greedy_distill_jax.prepare text, or name the text encoder itself (a model folder)",
                field="text",
            )
        with about("text"):
            record = self._source[index]
            if record["prompt"] != prompt:
                raise UserError(
                    f"text: record {index} of {self.directory} holds {record['prompt']!r} instead of {prompt!r}; "
                    "remove the folder and encode the prompts again"
                )
        return record["rows"]


def check_captions(encoder: TextEncoder, captions: Iterable[str], *, augment: str) -> None:
    """Raises UserError when a store lacks one of the captions that training asks for; other encoders know them all."""
    if not isinstance(encoder, TextStore):
        return
    if augment != "none":
        raise UserError(
            f"augmentation {augment!r} changes captions, and the text store {encoder.directory} has none of the "
            "changed ones; use none",
            field="augment",
        )
    missing = [caption for caption in captions if caption.strip() not in encoder.prompts]
    if missing:
        encoder(missing[:1])
