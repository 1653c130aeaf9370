"""TPU slices and NVIDIA cards that are not there: their sizes, their published figures, and devices to compile for.

FLOPs and links per chip are from the tables of docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e. Those give the
inter-chip bandwidth of both directions together; here it is halved, as what a chip can send. Memory is what libtpu
0.0.51 lets a program have, as it says when one asks for more: a little less than the published 16 and 32 GiB.

Cards are the SXM forms of H100 and H200, 1 to 8 in one host: dense bfloat16 FLOPs and NVLink (900 GB/s of both
directions together) of NVIDIA's data sheets. Memory is the share ``CARD_SHARE`` of what XLA sees of a card
(ops/attention/cards); jax itself takes .75 unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
"""

import dataclasses
import math

import numpy as np

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ops.attention import aot


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one chip.

    hbm: bytes of memory that a program can have. flops: bfloat16 operations per second. link_rate: bytes per second
    sent to other chips over all links together. slices: what is compiled here, smallest first. cards: whether they are
    NVIDIA's, which a host has several of.
    """

    hbm: float
    flops: float
    link_rate: float
    slices: tuple[str, ...]
    cards: bool = False


GIB = 2.0**30
CARD_SHARE = 0.93
COUNTS = ("1", "2", "4", "8")
SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CHIPS: dict[str, Chip] = {
    "v5e": Chip(15.75 * GIB, 197e12, 200e9, SQUARES),
    "v6e": Chip(31.24 * GIB, 918e12, 400e9, SQUARES),
    "v5p": Chip(95.73 * GIB, 459e12, 600e9, ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")),
    "h100": Chip(CARD_SHARE * 84_942_979_072, 989e12, 450e9, COUNTS, cards=True),
    "h200": Chip(CARD_SHARE * 151_397_597_184, 989e12, 450e9, COUNTS, cards=True),
}


def check(topology: str) -> tuple[str, str]:
    """Reads "v5p:4x4x4" as ("v5p", "4x4x4"); UserError (field "topology") when it is none of the known slices."""
    generation, _, size = topology.partition(":")
    if topology in CHIPS:
        sizes = ", ".join(f"{topology}:{x}" for x in CHIPS[topology].slices)
        raise UserError(f"{topology} is a generation of chips; search it for a slice, or name one: {sizes}", "topology")
    if generation not in CHIPS or size not in CHIPS[generation].slices:
        known = ", ".join(f"{name}:{'|'.join(chip.slices)}" for name, chip in CHIPS.items())
        raise UserError(f"unknown topology {topology!r}; choose from {known}", "topology")
    return generation, size


def devices(topology: str) -> np.ndarray:
    """Returns the described devices of a slice, for ``mesh.make_mesh``.

    Raises:
      UserError: no such slice, or its compiler is not installed.
    """
    check(topology)
    return np.array(aot.describe(topology).devices)


def larger(topology: str) -> list[str]:
    """Returns the larger slices of the same chips, the next one first."""
    generation, size = check(topology)
    slices = CHIPS[generation].slices
    return [f"{generation}:{other}" for other in slices[slices.index(size) + 1 :]]


def chips(topology: str) -> int:
    """Returns the number of chips of a slice."""
    return math.prod(map(int, check(topology)[1].split("x")))
