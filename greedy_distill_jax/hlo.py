"""What a compiled program does beyond computing: its collectives and kernel calls, with how often they run.

Reads the text of an optimised HLO module. A ``while`` loop carries its trip count if the compiler knows it; one whose
count is decided at run time (the denoising steps of a rollout) counts ``unknown`` times, as the caller says.
"""

import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32, "u32": 32,
    "f32": 32, "s64": 64, "u64": 64, "f64": 64,
}  # fmt: skip
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(")
_SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation|condition|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\])")
_KERNEL = re.compile(r'custom_call_target="tpu_custom_call"')


@dataclasses.dataclass
class Count:
    """Of one kind of operation: instructions in the program, how often they run, and the bytes a device sends."""

    instructions: int = 0
    runs: float = 0.0
    bytes: float = 0.0


def _size(shape: str) -> float:
    total = 0.0
    for dtype, dims in _SHAPE.findall(shape):
        if dtype in BITS:
            total += math.prod(int(d) for d in dims.split(",") if d) * BITS[dtype] / 8
    return total


def _sent(kind: str, line: str, shape: str) -> float:
    """Bytes one device sends in a ring algorithm, from the shape of the result."""
    if "-start(" in line and shape.startswith("("):  # (operands, results, ...) of an asynchronous form
        parts = [p for p in _SHAPE.findall(shape) if p[0] in BITS and p[1]]
        sizes = [_size(f"{d}[{n}]") for d, n in parts]
        whole = sum(sizes) - sum(sizes) / 2 if kind in ("all-reduce", "collective-permute") else max(sizes, default=0.0)
    else:
        whole = _size(shape)
    found = _GROUP.search(line)
    if kind == "collective-permute":
        return whole
    group = 1
    if found:
        group = int(found[3]) if found[3] else len([d for d in (found[1] or "").split(",") if d])
    if group <= 1:
        return 0.0
    share = (group - 1) / group
    if kind == "all-reduce":
        return 2 * whole * share
    return whole * (group - 1) if kind == "reduce-scatter" else whole * share


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """(lines of every computation, name of the entry)."""
    found, entry, name = {}, "", None
    for line in text.splitlines():
        started = _COMPUTATION.match(line)
        if started:
            name = started[1]
            found[name] = []
            if line.startswith("ENTRY"):
                entry = name
        elif line.startswith("}"):
            name = None
        elif name is not None:
            found[name].append(line)
    return found, entry


def counts(text: str, unknown: float = 1.0) -> dict[str, Count]:
    """{kind: Count} of the collectives, and under "kernels" of the Pallas kernels.

    Args:
      text: ``compiled.as_text()``.
      unknown: runs of a loop whose trip count the compiler does not know.
    """
    computations, entry = _computations(text)
    out = {kind: Count() for kind in (*KINDS, "kernels")}

    def visit(name: str, times: float) -> None:
        for line in computations.get(name, ()):
            found = _INSTRUCTION.match(line)
            if not found:
                continue
            shape, op = found.groups()
            kind = op.removesuffix("-start")
            if kind in KINDS:
                count = out[kind]
                count.instructions, count.runs = count.instructions + 1, count.runs + times
                count.bytes += times * _sent(kind, line, shape)
            elif op == "custom-call" and _KERNEL.search(line):
                out["kernels"].instructions += 1
                out["kernels"].runs += times
            trips = _TRIPS.search(line)
            inside = times * (float(trips[1]) if trips else unknown) if op == "while" else times
            ends = kind in KINDS or op in ("async-update", "async-done")  # what these call was counted at its start
            called = [] if ends else _CALLED.findall(line)
            called += [b.strip().lstrip("%") for group in _BRANCHES.findall(line) for b in group.split(",")]
            for other in called:
                visit(other, inside)

    visit(entry, 1.0)
    return out
