"""How often the loops of a program run, which libtpu does not state.

XLA's ``known_trip_count`` is gone from what libtpu writes, so it is found again as the compiler found it: a loop runs
from the constant that its counter starts at, in constant steps, to the constant that its condition compares it with.
For that, integers are followed through tuples, copies, fusions and calls: ``Integers`` says what the result of an
instruction is in terms of the parameters of its computation, and whoever called that computation knows those.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from greedy_distill_jax.pods.hlo.parse import Computation, Instruction

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NOTHING_MOVES = ("copy", "bitcast", "convert", "reshape", "optimization-barrier")
_TURNED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}


class At(NamedTuple):
    """The integer in element ``path`` of a computation's parameter ``number``, plus ``offset``."""

    number: int
    path: tuple[int, ...]
    offset: int = 0


Value = int | At | None  # None: not known
Known = Callable[[Value], int | None]  # the integer behind a value, for who knows a computation's parameters


def add(a: Value, b: Value) -> Value:
    """Returns a + b where it is known in terms of at most one parameter."""
    if a is None or b is None or (isinstance(a, At) and isinstance(b, At)):
        return None
    if isinstance(a, At):
        return a._replace(offset=a.offset + b)
    return b._replace(offset=b.offset + a) if isinstance(b, At) else a + b


class Integers:
    """The integers of a program, and the trips of its loops."""

    def __init__(self, computations: dict[str, Computation]):
        self.computations = computations
        self._values: dict[tuple, Value] = {}  # else fusions within loops within loops are followed again and again

    def value(self, computation: Computation, name: str, path: tuple[int, ...] = ()) -> Value:
        """Returns element ``path`` of an instruction's result, in terms of the computation's parameters."""
        key = computation.name, name, path
        if key not in self._values:
            self._values[key] = self._value(computation, name, path)
        return self._values[key]

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
            return add(a, b) if one.op == "add" else add(a, -b if isinstance(b, int) else None)
        if one.op in ("fusion", "call"):
            inner = self.computations[one.body]
            return self.outside(computation, one.operands, self.value(inner, inner.root, path))
        # What a loop leaves alone is the same after it: so the bound of an inner loop, carried through the state of the
        # outer one, is still seen as the constant it started as.
        if one.op == "while" and self.unchanged(one, path):
            return self.value(computation, one.operands[0], path)
        return None

    def outside(self, computation: Computation, arguments: list[str], value: Value) -> Value:
        """Translates a value of a called computation into the parameters of the computation that calls it.

        Args:
          computation: that calls.
          arguments: names of the instructions whose results it hands over.
          value: in terms of the called computation's parameters.
        """
        if not isinstance(value, At):
            return value
        return add(self.value(computation, arguments[value.number], value.path), value.offset)

    def unchanged(self, loop: Instruction, path: tuple[int, ...]) -> bool:
        """Whether a loop leaves an element of its state as it was."""
        body = self.computations[loop.called("body")]
        return self.value(body, body.root, path) == At(0, path)

    def trips(self, computation: Computation, loop: Instruction, known: Known) -> int | None:
        """Returns how often a loop runs; None if its bound is not a constant.

        Args:
          computation: where the loop is.
          loop: the ``while``.
          known: the integer behind a value in terms of the computation's parameters.
        """
        if stated := _TRIPS.search(loop.rest):
            return int(stated[1])
        condition, body = (self.computations[loop.called(part)] for part in ("condition", "body"))
        found = self._comparison(condition, condition.root)
        if not found:
            return None
        direction, left, right = found

        def at_start(value: Value) -> int | None:
            return known(self.outside(computation, loop.operands, value))

        def bound(value: Value) -> int | None:
            # The condition reads the state as it is then; only an element that the body hands on as it is has the
            # value it started with.
            return at_start(value) if isinstance(value, int) or (value and self.unchanged(loop, value.path)) else None

        if bound(left) is not None:  # "7 > i": turn it round
            left, right, direction = right, left, _TURNED.get(direction, direction)
        last, first = bound(right), at_start(left)
        if not isinstance(left, At) or last is None or first is None:
            return None
        # The body must add a constant to the counter: the same element of its state, plus an offset that is the step.
        after = self.value(body, body.root, left.path)
        if not isinstance(after, At) or (after.number, after.path) != (0, left.path) or not after.offset:
            return None
        return _steps(direction, first, last, after.offset)

    def _comparison(self, computation: Computation, name: str) -> tuple[str, Value, Value] | None:
        """(direction, left, right) of a condition's result, in terms of the computation's parameters."""
        one = computation.body[name]
        if one.op == "compare":
            direction = re.search(r"direction=(\w+)", one.rest)[1]
            return direction, *(self.value(computation, operand) for operand in one.operands)
        if one.op in _NOTHING_MOVES:
            return self._comparison(computation, one.operands[0])
        if one.op in ("fusion", "call"):
            inner = self.computations[one.body]
            found = self._comparison(inner, inner.root)
            return found and (found[0], *(self.outside(computation, one.operands, side) for side in found[1:]))
        return None


def _steps(direction: str, first: int, last: int, step: int) -> int | None:
    """How often ``first + n step`` compares to ``last``; None where it never stops, or by an overflow only."""
    up, down = direction in ("LT", "LE"), direction in ("GT", "GE")
    if not (up or down or direction == "NE") or (up and step < 0) or (down and step > 0):
        return None
    # "i <= last" is "i < last + 1"; the quotient is rounded up, as the last step may pass the bound.
    distance = last - first + {"LE": 1, "GE": -1}.get(direction, 0)
    return max(0, -(-distance // step))
