"""Losses as pure functions: ``loss(net, batch, key, **options) -> (loss_B, metrics)``.

``net(x_BTHWC, sigma_BT, batch) -> velocity`` hides model, parameters and precision; ``batch`` is a dict of arrays
("latents" and "text", and what a stage adds: stage "dmd" puts the student's own videos in "latents" and, with the
gradient into the student, in "action"; there a loss may also ask for the scores ``real`` and ``fake`` by keyword-only
arguments of these names). A loss returns one value per example and a dict for the logs of scalars, or of pairs (sum,
count) where only some of the values count; ``train.py`` takes the mean over the batch, applies the weight of the config
and logs every term by its name.

``resolve`` finds a loss by name: a built-in one, one given to ``register``, "package.module:function", or
"path/to/file.py:function".
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses.dmd import dmd
from greedy_distill_jax.losses.flow_matching import flow_matching

_LOSSES: dict[str, Callable] = {"dmd": dmd, "flow_matching": flow_matching}


def register(name: str, loss: Callable | None = None):
    """Makes a loss of your own available under ``name``; usable as a decorator."""
    if loss is None:
        return lambda function: register(name, function)
    _LOSSES[name] = loss
    return loss


def resolve(name: str) -> Callable:
    """The loss function behind a config's name."""
    if name in _LOSSES:
        return _LOSSES[name]
    where, _, attribute = name.rpartition(":")
    if not where:
        raise UserError(
            f"loss {name!r} is not known; choose from {', '.join(sorted(_LOSSES))}, register your own with "
            f"greedy_distill_jax.losses.register, or give 'package.module:function' or 'file.py:function'."
        )
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        return getattr(module, attribute)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise UserError(f"loss {name!r} cannot be loaded: {error}. Check the path and the function's name.") from error


SCORES = ("real", "fake")  # keyword-only arguments that the stage supplies, not the config


def option_names(loss: Callable) -> list[str]:
    """The keyword-only arguments of a loss."""
    parameters = inspect.signature(loss).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def asks_scores(loss: Callable) -> list[str]:
    """The score networks that a loss asks for."""
    return [name for name in option_names(loss) if name in SCORES]


def check_options(name: str, loss: Callable, options: dict) -> None:
    """Raises UserError for an option the loss does not take, naming those it does."""
    parameters = inspect.signature(loss).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return
    known = [name for name in option_names(loss) if name not in SCORES]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(
            f"loss {name!r} has no option {unknown[0]!r}; keyword-only options it takes: {', '.join(known) or 'none'}."
        )
