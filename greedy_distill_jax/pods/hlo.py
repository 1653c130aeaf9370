"""What a compiled program does beyond computing: its collectives and kernel calls, with how often they run.

Reads the text of an optimised HLO module. libtpu states no trip counts, so they are found as it finds them itself: a
loop runs from the constant that its counter starts at, in constant steps, to the constant that its condition compares
it with. A loop without such a bound (the denoising steps of a rollout, up to a random exit) counts ``unknown`` times,
as the caller says.

Bytes are what one device sends in a ring algorithm, from the shapes of the operands: (g - 1) x operand for all-gather
over groups of g devices, (g - 1) / g for reduce-scatter and all-to-all, twice that for all-reduce, and the whole
operand for collective-permute. What is not understood is an error: counting it as nothing would be an answer, too.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
UNREAD = ("ragged-all-to-all", "collective-broadcast")
BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32, "u32": 32,
    "f32": 32, "s64": 64, "u64": 64, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "token": 0,
}  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_PARTITIONS = re.compile(r"num_partitions=(\d+)")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_UNDER_WAY = re.compile(r'"async_collective_fusion_config":\{"flag_start":"\d')
_NOTHING_MOVES = ("copy", "bitcast", "convert", "reshape", "optimization-barrier")


@dataclasses.dataclass
class Count:
    """Of one kind of operation: instructions in the program, how often they run, and the bytes a device sends.

    sources: the bytes by the operation of the library that they come from, as far as XLA has kept its name.
    """

    instructions: int = 0
    runs: float = 0.0
    bytes: float = 0.0
    sources: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, other: "Count", times: float | int = 1) -> None:
        """Includes ``times`` runs of ``other``."""
        self.instructions += other.instructions
        self.runs += times * other.runs
        self.bytes += times * other.bytes
        for source, sent in other.sources.items():
            self.sources[source] = self.sources.get(source, 0.0) + times * sent


class Instruction(NamedTuple):
    """One line: ``%name = shape op(operands), rest``."""

    name: str
    shape: str
    op: str
    operands: list[str]
    rest: str

    def called(self, attribute: str) -> str | None:
        """The computation named by ``attribute=%...``."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


class Computation(NamedTuple):
    """Instructions by name, and the last one's name."""

    name: str
    body: dict[str, Instruction]
    root: str


class At(NamedTuple):
    """The integer in element ``path`` of a computation's parameter ``number``, plus ``offset``."""

    number: int
    path: tuple[int, ...]
    offset: int = 0


Value = int | At | None  # None: not known


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    """(computations by name, name of the entry)."""
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
            operands = _NAME.findall(inside) if "%" in inside else [inside]
            body[one[2]] = Instruction(one[2], one[3], one[4], operands, rest)
            root = one[2] if one[1] else root
    if not entry:
        raise ValueError("hlo: no ENTRY computation in this text.")
    return found, entry


def _closed(text: str) -> tuple[str, str]:
    """(what is before the parenthesis that closes, the rest)."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:i], text[i + 1 :]
    return text, ""


def _size(shape: str) -> float:
    total = 0.0
    for dtype, dims in _SHAPE.findall(shape):
        if dtype not in BITS:
            raise ValueError(f"hlo: element type {dtype!r} of {shape} is not in hlo.BITS; add its bits there.")
        total += math.prod(int(d) for d in dims.split(",") if d) * BITS[dtype] / 8
    return total


def group_size(attributes: str, devices: int) -> int:
    """Devices that take part in one collective.

    Args:
      attributes: what follows an instruction's operands, with ``replica_groups=`` in one of XLA's three forms:
        "{{0,1},{2,3}}", "[2,2]<=[4]", or "mesh['a'=2,'b'=4] {'a'}".
      devices: of the program: an empty list of groups means all.
    """
    if "replica_groups=" not in attributes:
        raise ValueError(f"hlo: no replica_groups in {attributes[:120]!r}.")
    groups = attributes.split("replica_groups=", 1)[1]
    if groups.startswith("{}"):
        return devices
    if found := re.match(r"\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", groups):
        return max(len(group.split(",")) for group in found[1].strip("{}").split("},{"))
    if found := re.match(r"\[\d+,(\d+)\]<=\[", groups):
        return int(found[1])
    if found := re.match(r"mesh\[([^\]]*)\] ?(?:, ?device_ids=\S+ )?\{([^}]*)\}", groups):
        sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", found[1])}
        size = 1
        for axis in filter(None, (part.strip() for part in found[2].split(","))):
            part = re.fullmatch(r"'?(\w+)'?(?::\(\d+\)(\d+))?", axis)
            if not part or part[1] not in sizes:
                raise ValueError(f"hlo: the axis {axis} of replica_groups={groups[:120]!r} is not understood.")
            size *= int(part[2] or sizes[part[1]])
        return size
    raise ValueError(f"hlo: replica_groups={groups[:120]!r} is in no form that hlo.group_size reads.")


class _Program:
    """The computations of one program, and what their loops and collectives come to."""

    def __init__(self, text: str, unknown: float | int | None):
        self.computations, self.entry = _parse(text)
        self.unknown, self.visited = unknown, set()
        partitions = _PARTITIONS.search(text[: text.find("\n")])
        self.devices = int(partitions[1]) if partitions else 1
        self.started, self.continued = set(), set()  # (kind, channel) of asynchronous fusions
        self.values: dict[tuple, Value] = {}

    def value(self, computation: Computation, name: str, path: tuple[int, ...] = ()) -> Value:
        """Element ``path`` of an instruction's result, in terms of the computation's parameters."""
        key = computation.name, name, path
        if key not in self.values:
            self.values[key] = self._value(computation, name, path)
        return self.values[key]

    def _value(self, computation: Computation, name: str, path: tuple[int, ...]) -> Value:
        one = computation.body.get(name)
        if one is None:
            return None
        if one.op == "constant":
            return int(one.operands[0]) if not path and re.fullmatch(r"-?\d+", one.operands[0]) else None
        if one.op == "parameter":
            return At(int(one.operands[0]), path)
        if one.op in _NOTHING_MOVES:
            return self.value(computation, one.operands[0], path)
        if one.op == "get-tuple-element":
            index = re.search(r"index=(\d+)", one.rest)
            return self.value(computation, one.operands[0], (int(index[1]), *path))
        if one.op == "copy-done":
            return self.value(computation, one.operands[0], (0, *path))
        if one.op == "copy-start":  # (copy, original, context)
            return self.value(computation, one.operands[0], path[1:]) if path and path[0] < 2 else None
        if one.op == "tuple":
            return self.value(computation, one.operands[path[0]], path[1:]) if path else None
        if one.op in ("add", "subtract"):
            a, b = (self.value(computation, operand) for operand in one.operands)
            return _add(a, b) if one.op == "add" else _add(a, -b if isinstance(b, int) else None)
        if one.op in ("fusion", "call"):
            inner = self.computations[one.called("calls") or one.called("to_apply")]
            return self.outside(computation, one, self.value(inner, inner.root, path))
        if one.op == "while" and self.unchanged(one, path):
            return self.value(computation, one.operands[0], path)
        return None

    def outside(self, computation: Computation, caller: Instruction, value: Value) -> Value:
        """A value in terms of ``caller``'s parameters, in those of the computation that calls it."""
        if not isinstance(value, At):
            return value
        return _add(self.value(computation, caller.operands[value.number], value.path), value.offset)

    def unchanged(self, loop: Instruction, path: tuple[int, ...]) -> bool:
        """Whether a loop leaves an element of its state as it was."""
        body = self.computations[loop.called("body")]
        return self.value(body, body.root, path) == At(0, path)

    def comparison(self, computation: Computation, name: str) -> tuple[str, Value, Value] | None:
        """(direction, left, right) of a condition's result."""
        one = computation.body[name]
        if one.op == "compare":
            direction = re.search(r"direction=(\w+)", one.rest)[1]
            return direction, *(self.value(computation, operand) for operand in one.operands)
        if one.op in _NOTHING_MOVES:
            return self.comparison(computation, one.operands[0])
        if one.op in ("fusion", "call"):
            inner = self.computations[one.called("calls") or one.called("to_apply")]
            found = self.comparison(inner, inner.root)
            return found and (found[0], *(self.outside(computation, one, side) for side in found[1:]))
        return None

    def trips(self, computation: Computation, loop: Instruction, known: Callable[[Value], int | None]) -> int | None:
        """How often a loop runs; None if its bound is not a constant.

        Args:
          computation: where the loop is.
          loop: the ``while``.
          known: the integer behind a value in terms of the computation's parameters.
        """
        if stated := _TRIPS.search(loop.rest):
            return int(stated[1])
        condition, body = (self.computations[loop.called(part)] for part in ("condition", "body"))
        found = self.comparison(condition, condition.root)
        if not found:
            return None
        direction, left, right = found

        def before(value: Value) -> int | None:  # of the element when the loop starts
            if isinstance(value, At):
                value = _add(self.value(computation, loop.operands[0], value.path), value.offset)
            return known(value)

        def bound(value: Value) -> int | None:
            return before(value) if isinstance(value, int) or (value and self.unchanged(loop, value.path)) else None

        if bound(left) is not None:  # constant on the left: turn it round
            left, right = right, left
            direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
        last, first = bound(right), before(left)
        if not isinstance(left, At) or last is None or first is None:
            return None
        after = self.value(body, body.root, left.path)
        if not isinstance(after, At) or (after.number, after.path) != (0, left.path) or not after.offset:
            return None
        step = after.offset
        distance = {"LT": last - first, "LE": last - first + 1, "GT": last - first, "GE": last - first - 1,
                    "NE": last - first}.get(direction)  # fmt: skip
        if distance is None or (direction in ("LT", "LE") and step < 0) or (direction in ("GT", "GE") and step > 0):
            return None
        return max(0, -(-distance // step))

    def counts(self, name: str, known: Callable[[Value], int | None]) -> dict[str, Count]:
        """Of one run of a computation; ``known`` gives the integers behind its parameters."""
        computation, out = self.computations[name], {kind: Count() for kind in (*KINDS, "kernels")}
        self.visited.add(name)

        def include(other: dict[str, Count], times: float | int = 1) -> None:
            for kind, count in other.items():
                out[kind].add(count, times)

        def inside(one: Instruction) -> Callable[[Value], int | None]:
            return lambda value: known(self.outside(computation, one, value))

        for one in computation.body.values():
            kind = one.op.removesuffix("-start")
            if kind in UNREAD:
                raise ValueError(f"hlo: {one.op} is not among hlo.KINDS.")
            if kind in KINDS:
                include(self.collective(computation, one, kind))
            elif one.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in one.rest:
                include({"kernels": Count(1, 1.0)})
            elif one.op == "while":
                trips = self.trips(computation, one, known)
                if trips is None:
                    if self.unknown is None:
                        raise ValueError(f"hlo: how often the loop {one.name} runs is decided at run time.")
                    trips = self.unknown

                def carried(value: Value, one=one) -> int | None:
                    if isinstance(value, At):
                        if not self.unchanged(one, value.path):
                            return None
                        value = _add(self.value(computation, one.operands[0], value.path), value.offset)
                    return known(value)

                include(self.counts(one.called("body"), carried), trips)
                include(self.counts(one.called("condition"), carried), trips)
            elif one.op == "conditional":
                include(self.largest(computation, one, known))
            elif one.op in ("fusion", "call", "async-start"):
                include(self.counts(one.called("calls") or one.called("to_apply"), inside(one)))
        return out

    def largest(self, computation: Computation, one: Instruction, known) -> dict[str, Count]:
        """Of a conditional: the branch that sends most, for a bound from above."""
        listed = _BRANCHES.search(one.rest)
        branches = _NAME.findall(listed[1]) if listed else [
            one.called(f"{flag}_computation") for flag in ("true", "false")]  # fmt: skip
        found = []
        for name, operand in zip(branches, one.operands[1:], strict=True):

            def inside(value: Value, operand=operand) -> int | None:
                if isinstance(value, At):
                    value = _add(self.value(computation, operand, value.path), value.offset)
                return known(value)

            found.append(self.counts(name, inside))
        return max(found, key=lambda branch: (sum(c.bytes for c in branch.values()), branch["kernels"].runs))

    def collective(self, computation: Computation, one: Instruction, kind: str) -> dict[str, Count]:
        """One run of a collective.

        libtpu runs some beside other work: the same collective then stands in a fusion that starts it, in those that
        compute meanwhile, and in one that waits for it. It is counted where it starts. And libtpu writes a
        reduce-scatter as an all-reduce of which a fusion keeps one slice.
        """
        users = [other for other in computation.body.values() if one.name in other.operands]
        targets = [m[1] for user in users if (m := re.search(r'custom_call_target="(\w+)"', user.rest))]
        channel = re.search(r"channel_id=(\d+)", one.rest)
        identity = (kind, channel[1] if channel else one.name)
        if "AsyncCollectiveStart" in targets:
            self.started.add(identity)
        elif (
            "AsyncCollectiveDone" in targets
            or computation.name.startswith("async_collective_fusion")
            or _UNDER_WAY.search(one.rest)
        ):
            self.continued.add(identity)
            return {}
        if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
            kind = "reduce-scatter"
        whole = sum(_size(computation.body[operand].shape) for operand in one.operands)
        if kind != "collective-permute":
            group = group_size(one.rest, self.devices)
            whole *= {"all-gather": group - 1, "all-reduce": 2 * (group - 1) / group}.get(kind, (group - 1) / group)
        named = _SOURCE.search(one.rest)
        source = "/".join(named[1].split("/")[-2:]) if named else "unnamed"
        return {kind: Count(1, 1.0, whole, {f"{source} {_SHAPE.search(one.shape)[0]}": whole})}

    def check(self) -> None:
        """Raises ValueError when a collective would have been left out."""
        lost = self.continued - self.started
        if lost:
            raise ValueError(f"hlo: collectives that go on but never start (kind, channel): {sorted(lost)}.")
        for name, computation in self.computations.items():
            ops = [one.op for one in computation.body.values() if one.op.removesuffix("-start") in (*KINDS, *UNREAD)]
            if ops and name not in self.visited:
                raise ValueError(f"hlo: {ops[0]} in the computation {name}, which is called in no way that is read.")


def _add(a: Value, b: Value) -> Value:
    if a is None or b is None or (isinstance(a, At) and isinstance(b, At)):
        return None
    if isinstance(a, At):
        return a._replace(offset=a.offset + b)
    return b._replace(offset=b.offset + a) if isinstance(b, At) else a + b


def counts(text: str, unknown: float | int | None = None) -> dict[str, Count]:
    """{kind: Count} of the collectives, and under "kernels" of the Pallas kernels.

    Of a conditional the branch that sends most is counted.

    Args:
      text: ``compiled.as_text()``.
      unknown: runs of a loop whose bound is decided at run time; None takes such a loop for an error.

    Raises:
      ValueError: something in the program is not understood, or a loop has no constant bound and ``unknown`` is None.
    """
    program = _Program(text, unknown)
    out = program.counts(program.entry, lambda value: value if isinstance(value, int) else None)
    program.check()
    return out
