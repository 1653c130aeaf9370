"""Which values a setting may have, said once, beside it: ``rate: Annotated[float, above(0)] = 1e-3``.

Configuration keys, options of losses, fields of settings and options of commands say it so. A plain annotation is
checked too: a number is finite in float32, a whole number fits into 32 bits, a tuple has its length.
"""

import dataclasses
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from greedy_distill_jax.errors import UserError

MOST = 2**31 - 1  # of whole numbers: devices count in 32 bits
Number = float | int
_LARGEST = (2 - 2**-23) * 2.0**127  # that float32 holds


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers between two bounds, each of which belongs to them or not; ``also`` is a value besides them."""

    low: Number = -math.inf
    high: Number = math.inf
    with_low: bool = True
    with_high: bool = True
    also: Number | None = None

    def __contains__(self, value: Any) -> bool:
        above = self.low <= value if self.with_low else self.low < value
        below = value <= self.high if self.with_high else value < self.high
        return value == self.also or (above and below)

    def __str__(self) -> str:
        besides = "" if self.also is None else f"{self.also} or "
        if self.high == math.inf:
            return f"{besides}{'at least' if self.with_low else 'above'} {self.low}"
        if self.low == -math.inf:
            return f"{besides}{'at most' if self.with_high else 'below'} {self.high}"
        if self.with_low:
            return f"{besides}from {self.low} to {'' if self.with_high else 'below '}{self.high}"
        return f"{besides}above {self.low} and {'at most' if self.with_high else 'below'} {self.high}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def __contains__(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return f"one of {', '.join(str(value) or repr(value) for value in self.values)}"


def at_least(low: Number, also: Number | None = None) -> Range:
    """Returns the numbers from ``low`` on, and ``also``."""
    return Range(low, also=also)


def above(low: Number) -> Range:
    """Returns the numbers greater than ``low``."""
    return Range(low, with_low=False)


def between(low: Number, high: Number) -> Range:
    """Returns the numbers from ``low`` to ``high``, both among them."""
    return Range(low, high)


def one_of(*values: Any) -> Choice:
    """Returns the choice among these values."""
    return Choice(values)


Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
Positive = Annotated[float, above(0)]
NotNegative = Annotated[float, at_least(0)]
Fraction = Annotated[float, between(0, 1)]
Momentum = Annotated[float, Range(0, 1, with_high=False)]  # or another share that is not the whole
NoiseLevel = Annotated[float, Range(0, 1, with_low=False)]
Steps = Annotated[int, between(1, 1000)]  # of denoising: the training table has 1000 noise levels
Seed = Annotated[int, between(0, 2**32 - 1)]
FrameRate = Annotated[float | int, between(0.1, 240)]  # frames per second
Frames = Annotated[int, between(1, 2**16)]  # of a video that is held whole: over an hour of it


def complaint(value: Any, hint: Any) -> str:
    """Returns what a value must be instead, such as "at least 1"; "" for one that its annotation allows.

    Args:
      value: of a setting.
      hint: its annotation. What is neither a number, a text, a truth value, a mapping, a tuple of these nor optional is
        allowed everything.
    """
    if typing.get_origin(hint) is Annotated:
        plain, *rules = typing.get_args(hint)
        return _complaint(value, plain, [rule for rule in rules if isinstance(rule, Range | Choice)])
    return _complaint(value, hint, [])


def allowed(hint: Any) -> str:
    """Returns the values that an annotation names a range for in words, "" where it names none."""
    if typing.get_origin(hint) is Annotated:
        return ", ".join(str(rule) for rule in typing.get_args(hint)[1:] if isinstance(rule, Range | Choice))
    found = dict.fromkeys(filter(None, map(allowed, typing.get_args(hint))))
    return ", ".join(found)


def check(value: Any, hint: Any, field: str) -> None:
    """Raises UserError, about ``field``, unless the annotation allows the value."""
    wrong = complaint(value, hint)
    if wrong:
        raise UserError(f"{field} is {value!r}; it must be {wrong}.", field)


def check_fields(owner: Any) -> None:
    """Does it for every field of a dataclass."""
    for name, hint in typing.get_type_hints(type(owner), include_extras=True).items():
        check(getattr(owner, name), hint, name)


def check_arguments(function: Callable, values: Mapping[str, Any], describe: str, field: str) -> None:
    """Raises UserError for arguments that a function's annotations do not allow; annotations as text are not read.

    Args:
      function: whose signature counts.
      values: arguments by name; those that it does not name are not looked at.
      describe: in front of the argument's name.
      field: of the error.
    """
    parameters = inspect.signature(function).parameters
    for name, value in values.items():
        hint = parameters[name].annotation if name in parameters else inspect.Parameter.empty
        wrong = "" if hint is inspect.Parameter.empty or isinstance(hint, str) else complaint(value, hint)
        if wrong:
            raise UserError(f"{describe} {name} is {value!r}; it must be {wrong}.", field)


def _complaint(value: Any, plain: Any, rules: list[Range | Choice]) -> str:
    origin, inner = typing.get_origin(plain), typing.get_args(plain)
    if origin in (typing.Union, types.UnionType):
        return _of_any(value, inner, rules)
    if origin is tuple and Ellipsis not in inner:
        return _of_tuple(value, inner)
    said = " and ".join(map(str, rules))
    if plain is int:
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            return f"a whole number{said and f', {said}'}"
        if value > MOST and all(isinstance(rule, Range) and rule.high == math.inf for rule in rules):
            return f"at most {MOST}"
        if value < -MOST and all(isinstance(rule, Range) and rule.low == -math.inf for rule in rules):
            return f"at least {-MOST}"
    elif plain is float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return f"a number{said and f', {said}'}"
        if not abs(value) <= _LARGEST:
            return f"a finite number{said and f', {said}'}"
    elif plain in (str, bool):
        if not isinstance(value, plain):
            return "text" if plain is str else "True or False"
    elif origin is Mapping and not isinstance(value, Mapping):
        return "a group of keys"
    return said if any(value not in rule for rule in rules) else ""


def _of_any(value: Any, hints: tuple[Any, ...], rules: list[Range | Choice]) -> str:
    """A complaint about a value that none of several annotations allows; the first one's."""
    if value is None and types.NoneType in hints:
        return ""
    found = [complaint(value, Annotated[hint, *rules] if rules else hint) for hint in hints if hint is not type(None)]
    return "" if "" in found else found[0]


def _of_tuple(value: Any, hints: tuple[Any, ...]) -> str:
    if not isinstance(value, tuple | list) or len(value) != len(hints):
        return f"{len(hints)} values, each {allowed(hints[0]) or 'a number'}"
    wrong = [found for entry, hint in zip(value, hints, strict=True) if (found := complaint(entry, hint))]
    return f"{len(hints)} values, each {wrong[0]}" if wrong else ""
