"""The registry of stages: one row each. A stage of your own joins with ``register``, before ``base()`` is called.

What a stage is stands in ``training.stages.base.StageKind``; modules are imported when they are asked for, because
stages are built of much that itself reads settings.
"""

import importlib
from typing import Any

from greedy_distill_jax.errors import UserError

_STAGES: dict[str, Any] = {  # name -> "module:attribute", or the StageKind itself
    "teacher": "greedy_distill_jax.training.stages.teacher:STAGE",
    "teacher_forcing": "greedy_distill_jax.training.stages.teacher_forcing:STAGE",  # stage 1 of the student
    "ode": "greedy_distill_jax.training.stages.ode:STAGE",  # the student on a teacher's trajectories
    "dmd": "greedy_distill_jax.training.stages.dmd:STAGE",  # stage 2: on its own videos
    "rl": "greedy_distill_jax.training.stages.rl:STAGE",  # stage 3: from rewards of its own long videos
}

_CONTRACT = ("trains", "keys", "check", "terms", "wanted", "build")  # of a StageKind


def register(name: str, kind: Any) -> None:
    """Makes a stage of your own available as ``config.stage``; ``kind``: a StageKind or "module:attribute"."""
    _STAGES[name] = kind


def names() -> tuple[str, ...]:
    """What ``config.stage`` may be."""
    return tuple(_STAGES)


def kind_of(name: str) -> Any:
    """The StageKind behind a name."""
    if name not in _STAGES:
        raise UserError(f"config.stage is {name!r}; choose from {', '.join(_STAGES)}.")
    kind = _STAGES[name]
    if isinstance(kind, str):
        module, _, attribute = kind.partition(":")
        kind = getattr(importlib.import_module(module), attribute)
    if isinstance(kind, type) or not all(hasattr(kind, part) for part in _CONTRACT):
        what = f"the class {kind.__name__}" if isinstance(kind, type) else f"a {type(kind).__name__}"
        raise UserError(f"stage {name!r} is {what}; register an instance of a training.stages.base.StageKind.")
    return kind


def groups() -> dict[str, type]:
    """{name: dataclass} of the groups of keys that belong to one stage."""
    return {name: group for stage in _STAGES for name, group in kind_of(stage).keys.items()}
