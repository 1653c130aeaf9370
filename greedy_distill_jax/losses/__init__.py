"""Losses as pure functions: ``loss(net, batch, key, **options) -> (loss_B, metrics)``.

``net(x_BTHWC, sigma_BT, batch) -> velocity`` hides model, parameters and precision; ``batch`` is a dict of arrays
("latents" and "text", and what a stage adds: stage "dmd" puts the student's own videos in "latents" and, with the
gradient into the student, in "action"). Keyword-only arguments with a default are options of the config; one without a
default asks the stage for what it has by that name, such as the scores ``real`` and ``fake``. A loss returns one value
per example and a dict for the logs of scalars, or of pairs (sum, count) where only some of the values count; the stage
takes the mean over the batch, applies the weight of the config and logs every term by its name.

``resolve`` finds a loss by name: a built-in one, one given to ``register``, "package.module:function", or
"path/to/file.py:function".
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from greedy_distill_jax.cli import extensions
from greedy_distill_jax.cli.extensions import FORMS, load
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses.dmd import dmd
from greedy_distill_jax.losses.flow_matching import flow_matching
from greedy_distill_jax.losses.motion import motion, motion_head
from greedy_distill_jax.losses.ode import ode
from greedy_distill_jax.losses.rl.cm_grpo import cm_grpo
from greedy_distill_jax.losses.rl.direct import direct
from greedy_distill_jax.losses.rl.dpo_chunk import dpo_chunk
from greedy_distill_jax.losses.rl.kl import kl
from greedy_distill_jax.losses.rl.neighbor import neighbor
from greedy_distill_jax.losses.rl.nft import nft
from greedy_distill_jax.losses.rl.re_dmd import re_dmd
from greedy_distill_jax.losses.rl.self_teacher import self_teacher


@dataclasses.dataclass(frozen=True)
class Term:
    """One weighted loss of the sum that a stage minimises.

    name: in the logs. options: keyword arguments of the loss. place: where it was asked for, for errors.
    """

    name: str
    loss: Callable
    weight: float
    options: Mapping[str, object]
    place: str = ""


_FORM = "write loss(net, batch, key, *, option=default), see docs/guides/add_a_loss.md"
_LOSSES: dict[str, Callable] = {
    "cm_grpo": cm_grpo,
    "direct": direct,
    "dmd": dmd,
    "dpo_chunk": dpo_chunk,
    "flow_matching": flow_matching,
    "kl": kl,
    "motion": motion,
    "motion_head": motion_head,
    "neighbor": neighbor,
    "nft": nft,
    "ode": ode,
    "re_dmd": re_dmd,
    "self_teacher": self_teacher,
}


def register(name: str, loss: Callable | None = None) -> Callable:
    """Makes a loss of your own available under ``name``; usable as a decorator."""
    if loss is None:
        return lambda function: register(name, function)
    _LOSSES[name] = loss
    return loss


def resolve(name: str) -> Callable:
    """The loss function behind a config's name; UserError (field "loss") where there is none that can be called so."""
    loss = _found(name)
    if not callable(loss):
        raise UserError(f"loss {name!r} is a {type(loss).__name__}, not a function; {_FORM}.", "loss")
    wrong = extensions.taken_instead(loss, 3)
    if wrong:
        raise UserError(f"loss {name!r} takes {wrong} by position; {_FORM}.", "loss")
    return loss


def _found(name: str) -> Any:
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
    return list(extensions.defaults(loss))


def asked(loss: Callable) -> list[str]:
    """What a loss asks its stage for, networks as a rule: keyword-only arguments without a default."""
    return extensions.needed(loss)


def check_options(name: str, loss: Callable, options: Mapping[str, object]) -> None:
    """Raises UserError for an option the loss does not take, naming those it does, or not with this value."""
    networks = sorted(set(options) & set(asked(loss)))
    if networks:
        raise UserError(
            f"loss {name!r} takes {networks[0]!r} from the stage, because it has no default; give it one to make it an "
            f"option.",
            "options",
        )
    extensions.check_options(f"loss {name!r}", loss, options)


def check_returned(term: Term, returned: Any, examples: int) -> tuple[Any, dict[str, Any]]:
    """(loss_B, metrics) of what a loss returned, both in float32.

    Args:
      term: whose loss it is.
      returned: by it.
      examples: B, of its batch.

    Raises:
      UserError: something else than one number per example and a dict of scalars or pairs (sum, count).
    """
    place = term.place or f"loss {term.name}"
    if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[1], Mapping):
        held = f" of {len(returned)}" if isinstance(returned, tuple) else ""
        raise UserError(
            f"{place}: the loss returned a {type(returned).__name__}{held}; return (loss_B, metrics), one value per "
            f"example and a dict, which may be empty."
        )
    loss_B, metrics = returned
    if not is_number(loss_B, (examples,)):
        raise UserError(
            f"{place}: the loss returned {_described(loss_B)} for {examples} examples; return one number per example, "
            f"shape [{examples}], without taking their mean."
        )
    kept = {}
    for name, value in metrics.items():
        scalars = value if isinstance(value, tuple) and len(value) == 2 else (value,)
        if not isinstance(name, str) or not all(is_number(x, ()) for x in scalars):
            raise UserError(
                f"{place}: the loss returned the metric {name!r} as {_described(value)}; a metric has a name and is a "
                f"scalar, or a pair (sum, count) of them."
            )
        floats = tuple(jnp.asarray(x).astype(jnp.float32) for x in scalars)
        kept[name] = floats if isinstance(value, tuple) else floats[0]
    return loss_B.astype(jnp.float32), kept


def is_number(value: Any, shape: tuple[int, ...]) -> bool:
    """Returns whether it is an array of real numbers of this shape, or a Python number where that is ()."""
    if isinstance(value, int | float):
        return shape == ()
    dtype = getattr(value, "dtype", None)
    real = dtype is not None and any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))
    return real and value.shape == shape


def _described(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return f"a {type(value).__name__}"
