"""Rewards: functions ``reward(view, *, option=default) -> values [B]`` that say how good videos are.

``resolve`` finds one by name: a built-in one, one given to ``register``, "package.module:function", or
"path/to/file.py:function"; a function in a file says its kind by the decorator ``reward(kind=...)``. Options are
keyword-only arguments with a default. ``on_device`` judges by the rewards of kind "jax", inside a jitted program,
``on_host`` by the others, between two of them. A value that is missing, not finite or out of its bounds is NaN, for
that video alone: whoever trains on it leaves the video out, and never takes the value for 0.
"""

from collections.abc import Callable, Mapping
from typing import Any

from greedy_distill_jax.cli import extensions
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.rewards.protocol import KINDS, HostView, Judged, Reward, RewardTerm, View, reward
from greedy_distill_jax.rewards.scoring import FAILED, on_device, on_host, start, statistics, weights

__all__ = [
    "FAILED",
    "KINDS",
    "HostView",
    "Judged",
    "Reward",
    "RewardTerm",
    "View",
    "check_options",
    "names",
    "on_device",
    "on_host",
    "option_names",
    "register",
    "resolve",
    "reward",
    "start",
    "statistics",
    "weights",
]

_FORM = "write reward(view, *, option=default) under @rewards.reward(kind=...), see docs/guides/add_a_reward.md"
_HERE = "greedy_distill_jax.rewards"
_ORACLE = "greedy_distill_jax.eval.oracle_rewards"  # of a higher room: imported when it is asked for
_REWARDS: dict[str, Reward | str] = {  # or "module:function"
    "anti_drift": f"{_HERE}.procedural:anti_drift",
    "colour_kept": f"{_HERE}.colour:colour_kept",
    "direction_kept": f"{_ORACLE}:direction_kept",
    "flicker": f"{_HERE}.procedural:flicker",
    "http": f"{_HERE}.http:http",
    "jpeg_size": f"{_HERE}.host:jpeg_size",
    "motion_band": f"{_HERE}.procedural:motion_band",
    "oracle_colour_kept": f"{_ORACLE}:oracle_colour_kept",
    "seam": f"{_HERE}.procedural:seam",
    "sharp_hold": f"{_HERE}.procedural:sharp_hold",
    "smooth2": f"{_HERE}.procedural:smooth2",
    "target_colour": f"{_HERE}.host:target_colour",
    "validity": f"{_ORACLE}:validity",
}


def names() -> list[str]:
    """The rewards that have a name of their own."""
    return sorted(_REWARDS)


def register(name: str, *, kind: str, differentiable: bool = False) -> Callable[[Callable], Reward]:
    """Decorator: ``reward(kind=...)``, and the reward is available under ``name``."""

    def of(function: Callable) -> Reward:
        _REWARDS[name] = reward(kind=kind, differentiable=differentiable)(function)
        return _REWARDS[name]

    return of


def resolve(name: str) -> Reward:
    """The reward behind a config's name; UserError (field "reward") where there is none that can be called so."""
    found = _REWARDS.get(name, name)
    if isinstance(found, str):
        if ":" not in found:
            raise UserError(
                f"reward {name!r} is not known; choose from {', '.join(names())}, register your own with "
                f"greedy_distill_jax.rewards.register, or give {extensions.FORMS}.",
                "reward",
            )
        found = extensions.load(found, kind="reward ", field="reward")
    if not isinstance(found, Reward):
        raise UserError(f"reward {name!r} is a {type(found).__name__} that does not say its kind; {_FORM}.", "reward")
    wrong = extensions.taken_instead(found.function, 1)
    if wrong:
        raise UserError(f"reward {name!r} takes {wrong} by position; {_FORM}.", "reward")
    needed = extensions.needed(found.function)
    if needed:
        raise UserError(f"reward {name!r} has no default for its option {needed[0]!r}; give it one.", "reward")
    return found


def option_names(of: Reward) -> list[str]:
    """The options of a reward."""
    return list(extensions.defaults(of.function))


def check_options(name: str, of: Reward, options: Mapping[str, Any]) -> None:
    """Raises UserError for an option the reward does not take, naming those it does, or not with this value."""
    extensions.check_options(f"reward {name!r}", of.function, options)
