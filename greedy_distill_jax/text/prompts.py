"""Prompts from a file, and the unconditional one of Wan2.1."""

from __future__ import annotations

import io
import os
from pathlib import Path

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.text.user_files import read_table, read_text

_COLUMNS = ("prompt", "caption")

# The negative prompt that Wan2.1 ships with (wan/configs/shared_config.py of its repository).
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"  # noqa: RUF001
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)


def read_prompts(prompts: str | os.PathLike) -> list[str]:
    """Returns the different prompts of a file, in order.

    Args:
      prompts: a .txt file with a prompt a line, where empty lines are none, or a .csv file with a column `prompt` or
        `caption` (see `read_table`), in UTF-8.

    Raises:
      UserError: a file of another kind, one that cannot be read or that holds no prompt, a row without one.
    """
    path = Path(prompts).expanduser()
    if path.suffix.lower() not in (".txt", ".csv"):
        raise UserError(f"{path}: give a .txt file (one prompt a line) or a .csv file", field="prompts")
    if path.suffix.lower() == ".txt":
        found = list(io.StringIO(read_text(path, "prompts"), newline=""))
    else:
        names, rows = read_table(path, _COLUMNS, "prompts")
        columns = [name for name in _COLUMNS if name in names]
        if len(columns) != 1:
            how = "both" if columns else "neither"
            raise UserError(
                f"{path} line 1 has {how} a column prompt {'and' if columns else 'nor'} a column caption; name one so",
                field="prompts",
            )
        for line, row in rows:
            if not row[columns[0]]:
                raise UserError(f"{path} line {line} holds no {columns[0]}; write one, or remove the line", "prompts")
        found = [row[columns[0]] for _, row in rows]
    different = list(dict.fromkeys(prompt.strip() for prompt in found if prompt.strip()))
    if not different:
        raise UserError(f"{path} holds no prompt; write at least one", field="prompts")
    return different
