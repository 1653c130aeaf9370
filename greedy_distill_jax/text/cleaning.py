"""Prompts as Wan's pipeline cleans them before its tokenizer sees them."""

from __future__ import annotations

import html
import importlib.util


def clean_prompt(prompt: str) -> str:
    """Cleans a prompt as Wan's pipeline does: ftfy (only if that package is installed), HTML entities, white space."""
    if _has_ftfy():
        import ftfy

        prompt = ftfy.fix_text(prompt)
    return " ".join(html.unescape(html.unescape(prompt)).split())


def cleaning() -> str:
    """Says what `clean_prompt` does on this machine; stores say it, because it decides what the encoder sees."""
    return "ftfy, html, whitespace" if _has_ftfy() else "html, whitespace"


def _has_ftfy() -> bool:
    return importlib.util.find_spec("ftfy") is not None
