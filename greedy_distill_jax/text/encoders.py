"""Text encoders: prompts to a fixed number of rows, padded with zeros (attended without a mask, as Wan does).

The words embedded here need no files; rows of a large encoder are read from a store (`TextStore`) or made by that
encoder itself (`export.umt5`).
"""

from __future__ import annotations

import csv
import hashlib
import html
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

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

# The unconditional prompt of Wan2.1 (METHOD_SPEC A.9).
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"  # noqa: RUF001
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
STORE = "text"  # kind of a store, see `records`
_REMEDY = "make it with python -m greedy_distill_jax.prepare text"
_GROUP = 256  # prompts of a shard


@runtime_checkable
class TextEncoder(Protocol):
    """What turns prompts into rows; rows past the true length are zero after encoding.

    Attributes:
      text_len: rows M per prompt (512 for Wan).
      text_dim: width of a row (4096 for Wan).
    """

    text_len: int
    text_dim: int

    def __call__(self, prompts: Sequence[str]) -> Float32[np.ndarray, "B M D"]:
        """Rows of every prompt, float32 [B, text_len, text_dim]."""
        ...


class HashWordEncoder:
    """One row per word, drawn from N(0, 1) by the SHA-256 of the word: no files, open vocabulary, equal everywhere.

    Words are lower-case runs of letters and digits. The empty prompt is all zeros (the unconditional embedding).
    """

    def __init__(self, text_len: int = 16, text_dim: int = 32) -> None:
        """Args: `text_len` rows per prompt, `text_dim` their width, both at least 1."""
        if text_len < 1 or text_dim < 1:
            raise UserError(f"HashWordEncoder: text_len={text_len}, text_dim={text_dim}; both must be at least 1")
        self.text_len, self.text_dim = text_len, text_dim
        self._rows: dict[str, np.ndarray] = {}

    def __call__(self, prompts: Sequence[str]) -> Float32[np.ndarray, "B M D"]:
        """Rows of every prompt; a prompt of more than `text_len` words is cut with a warning that says where."""
        if isinstance(prompts, str):
            raise TypeError("HashWordEncoder: expected a list of prompts, got one string; wrap it in a list")
        out = np.zeros((len(prompts), self.text_len, self.text_dim), np.float32)
        for rows, prompt in zip(out, prompts, strict=True):
            words = re.findall(r"[^\W_]+", prompt.lower())
            if len(words) > self.text_len:
                warnings.warn(
                    f"prompt {prompt[:60]!r} has {len(words)} words, text_len is {self.text_len}: cut after "
                    f"{words[self.text_len - 1]!r} (word {self.text_len})",
                    stacklevel=2,
                )
            for row, word in zip(rows, words, strict=False):
                row[:] = self._row(word)
        return out

    def _row(self, word: str) -> np.ndarray:
        if word not in self._rows:
            # RandomState is numpy's frozen generator: the same numbers in every version.
            seed = np.frombuffer(hashlib.sha256(word.encode()).digest(), "<u4")
            self._rows[word] = np.random.RandomState(seed).standard_normal(self.text_dim).astype(np.float32)
        return self._rows[word]


def clean_prompt(prompt: str) -> str:
    """A prompt as Wan's pipeline cleans it: ftfy (only if that package is installed), HTML entities, white space."""
    if _has_ftfy():
        import ftfy

        prompt = ftfy.fix_text(prompt)
    return " ".join(html.unescape(html.unescape(prompt)).split())


def cleaning() -> str:
    """What `clean_prompt` does on this machine; stores say it, because it decides what the encoder sees."""
    return "ftfy, html, whitespace" if _has_ftfy() else "html, whitespace"


def _has_ftfy() -> bool:
    return importlib.util.find_spec("ftfy") is not None


def read_prompts(path: str | os.PathLike) -> list[str]:
    """The different prompts of a file, in order: one a line (.txt), or the column `prompt` or `caption` (.csv).

    Raises:
      UserError: a file of another kind, one that cannot be read or that holds no prompt.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in (".txt", ".csv"):
        raise UserError(f"--prompts {path}: give a .txt file (one prompt a line) or a .csv file")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".txt":
                found = list(file)
            else:
                reader = csv.DictReader(file, skipinitialspace=True)
                column = next((c for c in ("prompt", "caption") if c in (reader.fieldnames or ())), None)
                if column is None:
                    raise UserError(f"--prompts {path} has neither a column prompt nor a column caption in line 1")
                found = [row[column] or "" for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--prompts {path} cannot be read ({reason}); give a UTF-8 file") from error
    prompts = list(dict.fromkeys(prompt.strip() for prompt in found if prompt.strip()))
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt; write at least one")
    return prompts


class TextStore:
    """Encoder rows from disk, written by `write_text_store`: any prompt of it at once, no other prompt.

    Attributes:
      text_len, text_dim: see `TextEncoder`.
      directory: of the store.
      info: the content of its dataset.json.
      prompts: its prompts, with the number of their record.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        """Opens a finished store; UserError when there is none or a shard is damaged."""
        self.directory = Path(directory).expanduser()
        self.info = read_dataset(self.directory, STORE, _REMEDY)
        self.text_len, self.text_dim = int(self.info["text_len"]), int(self.info["text_dim"])
        self._shards = open_shards(self.directory, self.info, STORE, _REMEDY)
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
                "greedy_distill_jax.prepare text, or name the text encoder itself (a model folder)"
            )
        try:
            record = decode_record(self._shards[index])
            if record["prompt"] != prompt or record["rows"].shape[1] != self.text_dim:
                raise ValueError(f"it holds {record['prompt']!r}, {record['rows'].shape}")
        except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
            shard, position = self._shards.locate(index)
            raise UserError(
                f"text store: record {position} of {self._shards.paths[shard]} is damaged: {first_line(error)}; "
                "remove the folder and encode the prompts again"
            ) from error
        return record["rows"]


def check_captions(encoder: TextEncoder, captions: Iterable[str], *, augment: str) -> None:
    """UserError when a store lacks one of the captions that training will ask for; other encoders know them all."""
    if not isinstance(encoder, TextStore):
        return
    if augment != "none":
        raise UserError(
            f"config.data.augment {augment!r} changes captions, and the text store {encoder.directory} has none of the "
            "changed ones; set config.data.augment=none"
        )
    missing = [caption for caption in captions if caption.strip() not in encoder.prompts]
    if missing:
        encoder(missing[:1])


class TextTable:
    """Rows that were encoded before, in memory: what remains of an encoder that is too large to keep."""

    def __init__(self, encoder: TextEncoder, prompts: Sequence[str]) -> None:
        """Args: `encoder` to ask once, for all of `prompts`."""
        self.text_len, self.text_dim = encoder.text_len, encoder.text_dim
        different = list(dict.fromkeys(prompts))
        self._rows = dict(zip(different, encoder(different), strict=True))

    def __call__(self, prompts: Sequence[str]) -> Float32[np.ndarray, "B M D"]:
        """Rows of every prompt; KeyError for one that was not encoded."""
        return np.stack([self._rows[prompt] for prompt in prompts])


def write_text_store(
    prompts: Sequence[str],
    output: str | os.PathLike,
    make_encoder: Callable[[], TextEncoder],
    *,
    plan: Mapping[str, Any],
    dtype: str,
    batch: int = 8,
    share: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Encodes prompts into a store that `TextStore` reads; goes on where an earlier call was killed.

    Rows past the true length are not stored. The empty prompt is always among the prompts.

    Args:
      prompts: the keys of the store; each is encoded as the encoder cleans it.
      output: folder to write.
      make_encoder: loads the encoder; called only if something is left to do.
      plan: what the rows depend on besides the prompts, see `RecordJob`; holds "text_len" and "text_dim".
      dtype: of the stored rows, "float32" or "bfloat16".
      batch: prompts per call of the encoder.
      share: (index, count) of this process.
      overwrite: replace a store.
      progress: show a bar on standard error.

    Returns:
      What dataset.json holds; None if other processes have not finished.
    """
    prompts = list(dict.fromkeys([*(prompt.strip() for prompt in prompts), ""]))
    plan = {"prompts": fingerprint(prompts), "dtype": dtype, **plan}
    job = RecordJob(output, STORE, plan, items=len(prompts), group=_GROUP, overwrite=overwrite)
    pending = job.pending(*share)
    encoder = make_encoder() if pending else None
    total = sum(len(job.items_of(number)) for number in pending)
    with tqdm(total=total, desc="prepare text", unit="prompt", disable=not progress) as bar:
        for number in pending:
            own = [prompts[item] for item in job.items_of(number)]
            with job.part(number) as part:
                for start in range(0, len(own), batch):
                    some = own[start : start + batch]
                    for prompt, rows in zip(some, encoder(some), strict=True):
                        length = np.flatnonzero(rows.any(1)).max(initial=-1) + 1
                        rows = rows[:length].astype(jnp.dtype(dtype))
                        part.write(STORE, encode_record({"rows": rows}, prompt=prompt))
                        part.notes.append(prompt)
                    bar.update(len(some))
    return job.finish(text_len=plan["text_len"], text_dim=plan["text_dim"], plan=plan, prompts=list)


def load_text_encoder(spec: str | os.PathLike, *, text_len: int, text_dim: int) -> TextEncoder:
    """The encoder that `config.data.text` (or `--text`) names, checked against the sizes of the network.

    Args:
      spec: "" for the embedded words, a folder written by `prepare text`, or a model folder with `tokenizer/` and
        `text_encoder/` (encodes while it is asked; any prompt).
      text_len, text_dim: rows of a prompt and their width, as the network takes them.

    Raises:
      UserError: something else, or rows of another size.
    """
    if not os.fspath(spec):
        return HashWordEncoder(text_len, text_dim)
    folder = Path(spec).expanduser()
    if (folder / "text_encoder").is_dir():
        from greedy_distill_jax.text.umt5 import UMT5Encoder

        encoder: TextEncoder = UMT5Encoder(folder, text_len=text_len)
    elif (folder / "plan.json").is_file():
        encoder = TextStore(folder)
    else:
        raise UserError(f"text {spec} is neither a folder made by prepare text nor a model folder with text_encoder/")
    if (encoder.text_len, encoder.text_dim) != (text_len, text_dim):
        raise UserError(
            f"text {spec} has {encoder.text_len} rows of width {encoder.text_dim}, the network takes {text_len} of "
            f"{text_dim}; set config.model.text_len and config.model.text_dim, or encode the prompts again"
        )
    return encoder
