"""Prompts from a file, and the unconditional one of Wan2.1."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from greedy_distill_jax.errors import UserError

# The negative prompt that Wan2.1 ships with (wan/configs/shared_config.py of its repository).
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"  # noqa: RUF001
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)


def read_prompts(prompts: str | os.PathLike) -> list[str]:
    """Returns the different prompts of a file, in order.

    Args:
      prompts: a .txt file with a prompt a line, or a .csv file with a column `prompt` or `caption`, in UTF-8.

    Raises:
      UserError: a file of another kind, one that cannot be read or that holds no prompt.
    """
    path = Path(prompts).expanduser()
    if path.suffix.lower() not in (".txt", ".csv"):
        raise UserError(f"{path}: give a .txt file (one prompt a line) or a .csv file", field="prompts")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".txt":
                found = list(file)
            else:
                reader = csv.DictReader(file, skipinitialspace=True)
                column = next((c for c in ("prompt", "caption") if c in (reader.fieldnames or ())), None)
                if column is None:
                    raise UserError(
                        f"{path} has neither a column prompt nor a column caption in line 1; name one so",
                        field="prompts",
                    )
                found = [row[column] or "" for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}); give a UTF-8 file", field="prompts") from error
    different = list(dict.fromkeys(prompt.strip() for prompt in found if prompt.strip()))
    if not different:
        raise UserError(f"{path} holds no prompt; write at least one", field="prompts")
    return different
