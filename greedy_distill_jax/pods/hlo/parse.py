"""The text of an optimised HLO module as computations and instructions."""

import math
import re
from typing import NamedTuple

BITS = {
    **{"token": 0, "s4": 4, "u4": 4},
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 8),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64"), 64),
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_PARTITIONS = re.compile(r"num_partitions=(\d+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
NAME = re.compile(r"%([\w.\-]+)")


class Instruction(NamedTuple):
    """One line: ``%name = shape op(operands), rest``."""

    name: str
    shape: str
    op: str
    operands: list[str]
    rest: str

    def called(self, attribute: str) -> str | None:
        """Returns the computation named by ``attribute=%...``."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    @property
    def body(self) -> str:
        """The computation that a fusion or a call runs."""
        return self.called("calls") or self.called("to_apply")

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional, in the order of its operands after the first."""
        listed = _BRANCHES.search(self.rest)
        if listed:
            return NAME.findall(listed[1])
        return [self.called("true_computation"), self.called("false_computation")]


class Computation(NamedTuple):
    """Instructions by name, and the last one's name."""

    name: str
    body: dict[str, Instruction]
    root: str


class Module(NamedTuple):
    """A program: its computations by name, the name of the entry, the devices it is partitioned for."""

    computations: dict[str, Computation]
    entry: str
    devices: int


def parse(text: str) -> Module:
    """Reads the text of a module.

    Raises:
      ValueError: there is no entry in it.
    """
    found, entry, name, body, root = {}, "", None, {}, ""
    for line in text.splitlines():
        if started := _COMPUTATION.match(line):
            name, body, root = started[2], {}, ""
            entry = name if started[1] else entry
        elif line.startswith("}") and name is not None:
            found[name] = Computation(name, body, root)
            name = None
        elif name is not None and (one := _INSTRUCTION.match(line)):
            inside, rest = _closed(one[5])
            # Constants and the numbers of parameters have no names; they are kept as they are written.
            operands = NAME.findall(inside) if "%" in inside else [inside]
            body[one[2]] = Instruction(one[2], one[3], one[4], operands, rest)
            root = one[2] if one[1] else root
    if not entry:
        raise ValueError("hlo: no ENTRY computation in this text.")
    partitions = _PARTITIONS.search(text[: text.find("\n")])
    return Module(found, entry, int(partitions[1]) if partitions else 1)


def _closed(text: str) -> tuple[str, str]:
    """Splits at the parenthesis that closes: (what is before it, the rest)."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:i], text[i + 1 :]
    return text, ""


def shape_bytes(shape: str) -> float:
    """Returns the bytes of an array or a tuple, such as "(bf16[2,512], u32[])".

    Raises:
      ValueError: an element type that is not in ``BITS``.
    """
    total = 0.0
    for dtype, dims in SHAPE.findall(shape):
        if dtype not in BITS:
            raise ValueError(f"hlo: element type {dtype!r} of {shape} is not in hlo.BITS; add its bits there.")
        total += math.prod(int(d) for d in dims.split(",") if d) * BITS[dtype] / 8
    return total
