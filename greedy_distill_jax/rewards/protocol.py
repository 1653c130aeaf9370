"""What a reward is: a function of videos with options, and where it runs."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float32, UInt8

from greedy_distill_jax.errors import UserError

KINDS = ("jax", "host", "http")


class View(NamedTuple):
    """What a reward of kind "jax" judges: values in [0, 1].

    video: the judged frames. first: the first frames of the same streams, as many as a training video has; drift is
    measured against them.
    """

    video_BTHWC: Float32[Array, "B T H W 3"]
    first_BSHWC: Float32[Array, "B S H W 3"]


class HostView(NamedTuple):
    """What the other kinds judge: the same frames as bytes, the prompts, and how many frames make a second."""

    video_BTHWC: UInt8[np.ndarray, "B T H W 3"]
    first_BSHWC: UInt8[np.ndarray, "B S H W 3"]
    captions: list[str]
    fps: float


class Judged(NamedTuple):
    """What a reward of kind "host" or "http" may return in place of its values: why some of them are NaN."""

    values: Any  # [B], or {name: [B]}
    faults: tuple[str, ...]  # one line each


@dataclasses.dataclass(frozen=True)
class Reward:
    """A function ``(view, **options) -> values [B]``, higher is better, and where it runs.

    name: in errors. kind: "jax" is pure and traced into a jitted program, and gets a ``View``; "host" is numpy between
    two of them and gets a ``HostView``; "http" is a host reward that waits for a server, beside the others.
    differentiable: whether its gradient in the frames means something. ready: called once with all options, before
    anything is trained; raises UserError where the reward cannot be asked.
    """

    name: str
    function: Callable
    kind: str
    differentiable: bool = False
    ready: Callable[[Mapping[str, Any]], None] | None = None

    def __post_init__(self):
        object.__setattr__(self, "__doc__", self.function.__doc__)  # what help() says of the reward

    def __call__(self, view: View | HostView, **options: Any) -> Any:
        return self.function(view, **options)


def reward(*, kind: str, differentiable: bool = False, ready: Callable | None = None) -> Callable[[Callable], Reward]:
    """Decorator that makes a ``Reward`` of a function; UserError for a kind that there is not."""
    if kind not in KINDS:
        raise UserError(f"a reward's kind is {kind!r}; it must be one of {', '.join(KINDS)}.", "kind")
    if differentiable and kind != "jax":
        raise UserError(f"a reward of kind {kind!r} has no gradient; leave out differentiable=True.", "differentiable")
    return lambda function: Reward(function.__name__, function, kind, differentiable, ready)


@dataclasses.dataclass(frozen=True)
class RewardTerm:
    """One reward of those that a stage asks.

    name: in the logs. weight: of its advantage; a negative one turns the reward round. judge: logged, never optimised.
    low, high: a value outside them is a fault. options: of the reward. place: where it was asked for, for errors.

    Raises:
      UserError: bounds without values between them, or a name that looks like one of several values.
    """

    name: str
    reward: Reward
    weight: float = 1.0
    judge: bool = False
    low: float = -math.inf
    high: float = math.inf
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: str = ""

    def __post_init__(self):
        if "/" in self.name:
            raise UserError(f"the reward's name {self.name!r} has a /; what several values are called begins with it.")
        if not self.low < self.high:
            raise UserError(f"{self.told}: low is {self.low} and high {self.high}; no value is between them.", "low")

    @property
    def told(self) -> str:
        """Where it is from, in errors."""
        return self.place or f"reward {self.name}"
