"""What a source of training examples is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.sharded import ShardedSource

_ENTRIES = {
    "video": (("uint8",), ("T", "H", "W", "3")),
    "latents": (("float32", "bfloat16", "float16"), ("T", "h", "w", "C")),
    "states": (("float32", "bfloat16", "float16"), ("K", "T", "h", "w", "C")),
    "text": (("float32", "bfloat16", "float16"), ("M", "D")),
}


@runtime_checkable
class VideoSource(Protocol):
    """Random access to examples; a bad record raises ValueError naming it.

    An example is a dictionary with
      "caption": str, always, and besides it
      "video": uint8 [T, H, W, 3], or
      "latents": float32 [T, h, w, C], or neither (prompts for training without data);
      "states": float32 [K, T, h, w, C], noisy states on the way to these latents, at the K noise levels that the source
        tells as its attribute ``levels``;
      "text": float32 [M, D], the rows of the caption, where they are stored.

    A source may have an attribute ``captions``, the set of all of them, so that a missing one is found before training
    and words that none of them has are named when the trained network is asked for them, and ``fingerprint``, a text
    that tells its content from any other, so that no run goes on with other content.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]: ...


def check_example(example: Any, source: str) -> None:
    """Raises UserError (field "source") unless an example is what ``VideoSource`` says; ``source`` is its name."""
    if not isinstance(example, Mapping) or not isinstance(example.get("caption"), str):
        held = sorted(example) if isinstance(example, Mapping) else f"a {type(example).__name__}"
        raise UserError(f"{source!r} gives an example without a text as its caption: {held}; add 'caption'", "source")
    for name, (dtypes, dimensions) in _ENTRIES.items():
        value = example.get(name)
        if value is not None and (str(getattr(value, "dtype", "")) not in dtypes or np.ndim(value) != len(dimensions)):
            found = f"{getattr(value, 'dtype', type(value).__name__)}{list(np.shape(value))}"
            wanted = f"{dtypes[0]} [{', '.join(dimensions)}]"
            raise UserError(f"{source!r} gives {name!r} as {found}; a source gives {wanted}", "source")


def captions_of(source: VideoSource) -> set[str]:
    """Returns all captions of a source that lists them, of another one those of its first records."""
    return getattr(source, "captions", None) or {source[index]["caption"] for index in range(min(4, len(source)))}


def check_held(source: ShardedSource, held: Mapping[str, Sequence[int]], **asked: int | None) -> None:
    """Raises UserError when a prepared folder does not hold the numbers asked for (None: whatever it holds)."""
    for name, value in asked.items():
        if value is not None and set(held[name]) != {value}:
            raise UserError(
                f"{source.directory} holds {name}={'x'.join(map(str, held[name]))}, asked for {value}; change the "
                f"configuration, or prepare the {source.kind.name} again",
                field="source",
            )
