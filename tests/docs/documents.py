"""The documents and the blocks of code in them."""

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A block that needs more than an empty folder says so in a comment above it: <!-- run with: SETUP -->
BLOCK = re.compile(r"(?:<!-- run with: (?P<setup>.*?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    language: str
    setup: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str, pages: list[Path] = PAGES) -> list[Block]:
    """The blocks in these languages, in order."""
    out = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            if found["language"] in languages:
                line = text[: found.start("code")].count("\n") + 1
                out.append(Block(page, line, found["language"], found["setup"] or "", found["code"]))
    return out
