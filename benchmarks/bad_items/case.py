"""One case: a command line, the files beside it, and what must come of it; the table of kinds."""

import dataclasses
import hashlib
import json
import random
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

REFUSED, ACCEPTED, EITHER, THEIRS, DIVERGED = "refused", "accepted", "either", "theirs", "diverged"
CODES = {REFUSED: (2,), ACCEPTED: (0,), EITHER: (0, 2), DIVERGED: (4,), THEIRS: ()}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of a command and its expected outcome.

    Attributes:
      command: module of greedy_distill_jax.
      argv: arguments; "{here}" is the folder of the case, "{made}" what was made once.
      expect: REFUSED (2 and one line), ACCEPTED (0), EITHER of the two, THEIRS (a traceback of the user's own code)
        or DIVERGED (4).
      needs: what the line must hold: one of every tuple.
      files: path in the case's folder -> content, None for a folder, text from "@" on for a link.
      skipped: a clip that must be named in dataset.json as skipped when the exit code is 0.
      unprivileged: run without the rights of root, where the process has them.
      env: of a process of its own, which such a case needs.
    """

    command: str
    argv: tuple[str, ...]
    expect: str = REFUSED
    needs: tuple[tuple[str, ...], ...] = ()
    files: Mapping[str, bytes | str | None] = dataclasses.field(default_factory=dict)
    skipped: str = ""
    unprivileged: bool = False
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def key(self) -> str:
        """Equal cases have equal keys."""
        digest = hashlib.sha256(repr((self.command, self.argv, sorted(self.env.items()))).encode("utf-8", "replace"))
        for name, content in sorted(self.files.items()):
            digest.update(name.encode("utf-8", "replace"))
            digest.update(content if isinstance(content, bytes) else repr(content).encode("utf-8", "replace"))
        return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Source:
    """What a kind draws from: random numbers, and the folder of what was made once."""

    rng: random.Random
    made: Path

    def pick(self, *options: Any) -> Any:
        """One of them."""
        return self.rng.choice(options)

    def chance(self, share: float) -> bool:
        """True for that share of the calls."""
        return self.rng.random() < share

    def word(self, low: int = 3, high: int = 10) -> str:
        """Random lower-case letters."""
        return "".join(self.rng.choices(string.ascii_lowercase, k=self.rng.randint(low, high)))

    def junk(self) -> str:
        """Text that is no number and no file, and not empty."""
        letters = string.ascii_letters + "_%$#@!?;&|<>^~*äß中🙂"
        return "".join(self.rng.choices(letters, k=self.rng.randint(1, 12)))

    def misspelt(self, word: str) -> str:
        """The word with a letter lost, doubled, swapped, added, or in capitals."""
        at = self.rng.randrange(len(word))
        forms = (
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[: at + 1] + self.word(1, 2) + word[at + 1 :],
            word[:at] + word[at:][1:2] + word[at] + word[at + 2 :],
            word.upper(),
            word + "s",
            word.replace("_", "-"),
        )
        found = [form for form in forms if form and form != word]
        return self.rng.choice(found)

    def folder(self, name: str, to: str) -> dict[str, bytes]:
        """The files of a folder that was made once, to be put below ``to``."""
        root = self.made / name
        return {f"{to}/{p.relative_to(root)}": p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

    def flipped(self, data: bytes, low: int = 0, high: int | None = None) -> bytes:
        """The bytes with a bit changed."""
        out = bytearray(data)
        out[self.rng.randrange(low, min(len(out), high or len(out)))] ^= 1 << self.rng.randrange(8)
        return bytes(out)

    def damaged(self, data: bytes) -> bytes:
        """The bytes with some changed, lost, or put between; never the same."""
        out = data
        while out == data:
            at = self.rng.randrange(max(1, len(data)))
            form = self.rng.randrange(4)
            if form == 0 and data:
                out = self.flipped(out)
            elif form == 1:
                out = data[:at] + data[at + self.rng.randint(1, 64) :]
            elif form == 2:
                out = data[:at] + self.rng.randbytes(self.rng.randint(1, 64)) + data[at:]
            else:
                out = data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
        return out

    def cut(self, data: bytes) -> bytes:
        """The bytes without some at their end."""
        return data[: self.rng.randrange(len(data))]


Kind = Callable[[Source], Case]
KINDS: dict[str, tuple[int, Kind]] = {}  # name -> (share, what draws a case)


def kind(name: str, share: int) -> Callable[[Kind], Kind]:
    """Adds a kind of cases; of all cases it has ``share`` over the sum of the shares."""

    def add(draw: Kind) -> Kind:
        KINDS[name] = share, draw
        return draw

    return add


def kind_of(number: int) -> str:
    """The kind of a case, by its number alone."""
    turns = [name for name, (share, _) in KINDS.items() for _ in range(share)]
    random.Random(0).shuffle(turns)
    return turns[number % len(turns)]


def draw(seed: int, number: int, made: Path) -> Case:
    """The case of that number; equal numbers are equal cases where the same things were made."""
    name = kind_of(number)
    return KINDS[name][1](Source(random.Random(json.dumps([seed, number, name])), made))
