"""The Hopper kernels' block sizes, measured, and whether they beat cuDNN with them: a card's tuned table.

Rows of item "attention". The table, ``OUTPUT/tuned/<target>.json``, is what the package reads: put it into
``greedy_distill_jax/ops/attention/tuned/``.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from greedy_distill_jax.ops.attention.backends import mosaic_gpu
from greedy_distill_jax.ops.attention.tuning import Blocks

# The forward kernel's sizes are chosen on their own, those of dq and of dk and dv together.
TRIED = (
    Blocks((128, 128), (128, 64), (64, 128)),
    Blocks((128, 96), (128, 128), (64, 128)),
    Blocks((192, 64), (128, 64), (64, 128)),
)
FORWARD, BOTH = "forward ms", "forward + backward ms"
Rows = Mapping[str, Mapping[str, Any]]


def label(blocks: Blocks) -> str:
    """Name of a row."""
    return "kernels " + ", ".join("{} x {}".format(*pair) for pair in dataclasses.astuple(blocks))


def _figure(rows: Rows, name: str, figure: str) -> float | None:
    """A figure of a row that counts."""
    return rows.get(name, {}).get("figures", {}).get(figure)


def entry(rows: Rows, works: Sequence, peer: Mapping[str, str]) -> dict[str, Any] | None:
    """What a table says of the works with one key; None unless every row that decides is there.

    Args:
      rows: of the item, ``{work}: {label}``.
      works: with the same chunks, head dim and dtype.
      peer: for each kind of work, "stream" and "train", the label of cuDNN's row.

    Returns:
      blocks {kernel: pair}, the best by their sum over the works; ours and cuDNN's milliseconds with them, forward of
      streams and forward with backward of tables; whether ours are less for each of them.
    """
    times, theirs = {}, {}
    for work in works:
        name = f"{work.name}: " + peer["stream" if work.stream else "train"]
        theirs[work.name] = _figure(rows, name, FORWARD if work.stream else BOTH)
        for blocks in TRIED:
            found = rows.get(f"{work.name}: {label(blocks)}", {}).get("figures", {})
            times[work.name, blocks] = found.get(FORWARD), found.get(BOTH)
    usable = [b for b in TRIED if all(times[w.name, b][0] is not None for w in works)]
    if not usable or None in theirs.values():
        return None
    tables = [work for work in works if not work.stream]

    def forward(blocks):
        return sum(times[work.name, blocks][0] for work in works)

    def backward(blocks):
        return sum(times[work.name, blocks][1] - times[work.name, blocks][0] for work in tables)

    best, second = min(usable, key=forward), min(usable, key=backward)
    ours = {w.name: times[w.name, best][0] for w in works if w.stream}
    for work in tables:
        pair = times[work.name, second]
        ours[work.name] = times[work.name, best][0] + pair[1] - pair[0]
    return {
        "blocks": {"forward": best.forward, "dq": second.dq, "dkv": second.dkv},
        "ms": ours,
        "cudnn_ms": theirs,
        "fastest": all(ours[name] < theirs[name] for name in ours),
    }


def write(folder: Path, target: str, about: Mapping[str, Any], rows: Rows, works: Sequence, peer) -> Path | None:
    """Writes the tuned table of a card, and says what is left out of it; None if no key has every row."""
    keys: dict[str, list] = {}
    for work in works:
        keys.setdefault(mosaic_gpu.key(work.table, work.dim, work.dtype), []).append(work)
    found = {key: entry(rows, group, peer) for key, group in keys.items()}
    for key in [key for key, value in found.items() if value is None]:
        print(f"tuned table: {key} is left out: not every row that decides was measured", flush=True)
        del found[key]
    if not found:
        return None
    record = {
        **{name: about[name] for name in ("device", "versions", "commit") if name in about},
        "fastest": [key for key, value in found.items() if value["fastest"]],
        "blocks": {key: value["blocks"] for key, value in found.items()},
        "measured": {key: {"ms": value["ms"], "cudnn_ms": value["cudnn_ms"]} for key, value in found.items()},
    }
    path = folder / "tuned" / f"{target}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"tuned table: {path}, the fastest for {', '.join(record['fastest']) or 'nothing'}", flush=True)
    return path
