"""The words that a model with hashed words was trained on; any other one means nothing to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from greedy_distill_jax.text.hashed_words import words_of

MOST = 50_000  # words that are kept with a checkpoint
_NAMED = 8  # in one line


def vocabulary(captions: Iterable[str], text_len: int, more: Iterable[str] = ()) -> list[str] | None:
    """Returns the different words that a network reads of captions, sorted; None where there are more than ``MOST``.

    Args:
      captions: of which it reads the first words alone.
      text_len: how many of them.
      more: words besides those of the captions.
    """
    words = set(more)
    for caption in captions:
        words.update(words_of(caption)[:text_len])
        if len(words) > MOST:
            return None
    return sorted(words)


def unknown_words(prompts: Iterable[str], known: Iterable[str], text_len: int) -> list[str]:
    """Returns the different words that a network reads of prompts and does not know, in their order."""
    known = set(known)
    read = dict.fromkeys(word for prompt in prompts for word in words_of(prompt)[:text_len])
    return [word for word in read if word not in known]


def never_seen(words: Sequence[str]) -> str:
    """Returns a warning that names the first of some unknown words."""
    named = ", ".join(repr(word) for word in words[:_NAMED])
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return f"{named}{more} {'was' if len(words) == 1 else 'were'} never seen in training: noise to this model"
