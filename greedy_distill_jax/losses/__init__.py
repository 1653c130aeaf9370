"""Losses as pure functions: ``loss(net, batch, key, **options) -> (loss_B, metrics)``.

``net(x_BTHWC, sigma_BT, batch) -> velocity`` hides model, parameters and precision; ``batch`` is a dict of arrays
("latents" and "text", and what a stage adds: stage "dmd" puts the student's own videos in "latents" and, with the
gradient into the student, in "action"). Keyword-only arguments with a default are options of the config; one without a
default asks the stage for a network by that name, such as the scores ``real`` and ``fake``. A loss returns one value
per example and a dict for the logs of scalars, or of pairs (sum, count) where only some of the values count; the stage
takes the mean over the batch, applies the weight of the config and logs every term by its name.

``resolve`` finds a loss by name: a built-in one, one given to ``register``, "package.module:function", or
"path/to/file.py:function".
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.extensions import FORMS, load
from greedy_distill_jax.losses.dmd import dmd
from greedy_distill_jax.losses.flow_matching import flow_matching
from greedy_distill_jax.losses.ode import ode


@dataclasses.dataclass(frozen=True)
class Term:
    """One weighted loss of the sum that a stage minimises.

    name: in the logs. options: keyword arguments of the loss.
    """

    name: str
    loss: Callable
    weight: float
    options: Mapping[str, object]


_LOSSES: dict[str, Callable] = {"dmd": dmd, "flow_matching": flow_matching, "ode": ode}


def register(name: str, loss: Callable | None = None) -> Callable:
    """Makes a loss of your own available under ``name``; usable as a decorator."""
    if loss is None:
        return lambda function: register(name, function)
    _LOSSES[name] = loss
    return loss


def resolve(name: str) -> Callable:
    """The loss function behind a config's name."""
    if name in _LOSSES:
        return _LOSSES[name]
    if ":" not in name:
        raise UserError(
            f"loss {name!r} is not known; choose from {', '.join(sorted(_LOSSES))}, register your own with "
            f"greedy_distill_jax.losses.register, or give {FORMS}.",
            "loss",
        )
    return load(name, kind="loss ", field="loss")


def option_names(loss: Callable) -> list[str]:
    """The options of a loss: its keyword-only arguments with a default."""
    parameters = inspect.signature(loss).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty]


def asked(loss: Callable) -> list[str]:
    """The networks that a loss asks its stage for: keyword-only arguments without a default."""
    parameters = inspect.signature(loss).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def check_options(name: str, loss: Callable, options: dict) -> None:
    """Raises UserError for an option the loss does not take, naming those it does."""
    parameters = inspect.signature(loss).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return
    known = option_names(loss)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(
            f"loss {name!r} has no option {unknown[0]!r}; keyword-only options it takes: {', '.join(known) or 'none'}.",
            "options",
        )
