"""The text encoder that a configuration or a command names."""

from __future__ import annotations

import os
from pathlib import Path

from greedy_distill_jax.errors import UserError, about
from greedy_distill_jax.text.hashed_words import HashWordEncoder
from greedy_distill_jax.text.protocol import TextEncoder
from greedy_distill_jax.text.store import TextStore


def load_text_encoder(text: str | os.PathLike, *, text_len: int, text_dim: int) -> TextEncoder:
    """Opens the encoder that ``text`` names, checked against the sizes of the network.

    Args:
      text: "" for hashed words, a folder written by `prepare text`, or a model folder with `tokenizer/` and
        `text_encoder/` (encodes while it is asked; any prompt).
      text_len, text_dim: rows of a prompt and their width, as the network takes them.

    Raises:
      UserError: something else, or rows of another size.
    """
    if not os.fspath(text):
        return HashWordEncoder(text_len, text_dim)
    folder = Path(text).expanduser()
    if (folder / "text_encoder").is_dir():
        from greedy_distill_jax.text.umt5 import UMT5Encoder

        with about("text"):
            encoder: TextEncoder = UMT5Encoder(folder, text_len=text_len)
    elif (folder / "plan.json").is_file():
        encoder = TextStore(folder)
    else:
        raise UserError(
            f"{text} is neither a folder made by prepare text nor a model folder with text_encoder/; name one of them",
            field="text",
        )
    if (encoder.text_len, encoder.text_dim) != (text_len, text_dim):
        raise UserError(
            f"{text} has {encoder.text_len} rows of width {encoder.text_dim}, the network takes {text_len} of "
            f"{text_dim}; set the network's text_len and text_dim, or encode the prompts again",
            field="text",
        )
    return encoder
