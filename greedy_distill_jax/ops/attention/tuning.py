"""Block sizes of kernels: a tuned table per device, and the rule for what is not in it.

``tuned/<device>.json`` is written by ``python -m greedy_distill_jax.compile sweep`` and lists, per (query chunk, key
chunk, head dim, dtype), the blocks of each kernel.
"""

import dataclasses
import functools
import json
from pathlib import Path

from greedy_distill_jax.ops.attention.pattern import largest_divisor

Pair = tuple[int, int]
# What jax calls the devices with a table.
TARGETS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
# The rule: the longest block that divides a chunk, stays within these limits and fills whole tiles of 8 rows. A chunk
# with no such divisor, or only short ones, is cut into blocks of 512 with a masked end.
LIMIT_Q, LIMIT_K, RAGGED = 640, 1600, 512


@dataclasses.dataclass(frozen=True)
class Blocks:
    """(query tokens, key tokens) of a block of each kernel."""

    forward: Pair
    dq: Pair
    dkv: Pair


def default_block(tokens: int, limit: int) -> int:
    """Block for a chunk of ``tokens`` by the rule above."""
    if tokens <= RAGGED:
        return tokens  # the whole chunk, whatever its length
    divisor = largest_divisor(tokens, limit, 8)
    return divisor if divisor and divisor >= LIMIT_Q // 5 else RAGGED


def default_blocks(q_tokens: int, k_tokens: int) -> Pair:
    """(query, key) blocks by the rule above."""
    return default_block(q_tokens, LIMIT_Q), default_block(k_tokens, LIMIT_K)


def key(q_chunk: int, k_chunk: int, dim: int, dtype: str) -> str:
    """Name of an entry in the tuned table."""
    return f"{q_chunk}x{k_chunk} dim {dim} {dtype}"


def path(target: str) -> Path:
    """Where the table of a target such as "v5p" is."""
    return Path(__file__).parent / "tuned" / f"{target}.json"


@functools.lru_cache
def record(target: str) -> dict:
    """The tuned table of a target; {} if there is none."""
    return json.loads(path(target).read_text()) if path(target).is_file() else {}


def tuned(target: str, name: str) -> Blocks | None:
    """The blocks of an entry of a target's table; None where it has none."""
    found = record(target).get("blocks", {}).get(name)
    return Blocks(**{name: tuple(pair) for name, pair in found.items()}) if found else None


def choose(device_kind: str, q_chunk: int, k_chunk: int, dim: int, dtype: str) -> Blocks:
    """Blocks for one workload on one kind of TPU (as jax names it, or a target's name)."""
    pair = default_blocks(q_chunk, k_chunk)
    name = key(q_chunk, k_chunk, dim, dtype)
    return tuned(TARGETS.get(device_kind, device_kind), name) or Blocks(pair, pair, pair)
