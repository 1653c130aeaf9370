"""Dataclasses of keys to ConfigDicts and back: the one place where a ConfigDict is taken apart."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from greedy_distill_jax import ranges
from greedy_distill_jax.config import stages
from greedy_distill_jax.config.keys import TERMS, Keys
from greedy_distill_jax.errors import UserError

GONE = {
    "config.sample.first_steps": "write config.sample.steps=4,2 for four steps in the first chunk and two in others."
}
RESERVED = ("loss", "grad_norm", "param_norm")  # names in the logs that no loss can have


def base() -> ConfigDict:
    """Every key with its default, the groups of all stages included; a key that is absent here is an error."""
    config = config_of(Keys())
    for name, group in stages.groups().items():
        config[name] = config_of(group())
    config.lock()
    for terms in _open_in(config):
        terms.unlock()  # names and options are open; ``read`` checks them
    return config


def default_text() -> str:
    """``base()`` as JSON."""
    return base().to_json_best_effort()


def config_of(keys: Any) -> ConfigDict:
    """The ConfigDict of a dataclass of keys; a field without a value is a typed placeholder."""
    config, hints = ConfigDict(), typing.get_type_hints(type(keys))
    for field in dataclasses.fields(keys):
        value = getattr(keys, field.name)
        if hints[field.name] in TERMS:
            value = ConfigDict({name: config_of(term) for name, term in value.items()})
        elif dataclasses.is_dataclass(value):
            value = config_of(value)
        elif isinstance(value, Mapping):
            value = ConfigDict(dict(value))
        elif value is None:
            (kind,) = (t for t in typing.get_args(hints[field.name]) if t is not types.NoneType)
            value = placeholder(kind)
        elif hints[field.name] is Any:
            value = FieldReference(value, field_type=object)
        config[field.name] = value
    return config


def open_keys() -> tuple[str, ...]:
    """Dotted paths below which keys may be added."""
    groups = {"": Keys, **stages.groups()}
    return tuple(
        f"{group}.{field}".strip(".")
        for group, cls in groups.items()
        for field, hint in typing.get_type_hints(cls).items()
        if hint in TERMS
    )


def _open_in(config: ConfigDict) -> Iterator[ConfigDict]:
    for path in open_keys():
        node = config
        for key in path.split("."):
            node = node[key]
        yield node


def read(cls: type, config: ConfigDict, path: str, besides: Collection[str] = (), *, check: bool = True) -> Any:
    """An instance of ``cls`` from its ConfigDict.

    Args:
      cls: dataclass of keys.
      config: with its fields.
      path: of the group, for errors.
      besides: keys that somebody else reads.
      check: every value must be one that its key's annotation allows; False for what was checked before.

    Raises:
      UserError: keys that are unknown, missing, ill-formed or out of their range.
    """
    hints, rules = typing.get_type_hints(cls), typing.get_type_hints(cls, include_extras=True)
    _same_keys([key for key in config if key not in besides], hints, path)
    values = {}
    for name, hint in hints.items():
        value = config[name]
        if hint in TERMS:
            value = {
                term: _read_term(TERMS[hint], node, f"{path}.{name}.{term}", check) for term, node in value.items()
            }
        elif dataclasses.is_dataclass(hint):
            value = read(hint, value, f"{path}.{name}", check=check)
        elif check:
            _check(value, rules[name], f"{path}.{name}")
        if typing.get_origin(hint) is tuple:
            value = tuple(value)
        values[name] = value
    return cls(**values)


def _read_term(cls: type, term: ConfigDict, path: str, check: bool) -> Any:
    """A loss or a reward: what it is and its weight must be given."""
    name, fields = path.rsplit(".", 1)[1], {field.name: field for field in dataclasses.fields(cls)}
    if name in RESERVED:
        raise UserError(f"{path}: this name is taken in the logs; choose another.")
    *most, last = fields
    if not isinstance(term, ConfigDict | Mapping):
        raise UserError(f"{path} is {term!r}; it must be a group of the keys {', '.join(most)} and {last}.")
    given = term.to_dict() if isinstance(term, ConfigDict) else dict(term)
    if set(given) - set(fields) or not set(most[:2]) <= set(given):
        more = ", ".join([*most[2:], last])
        raise UserError(f"{path} needs the keys {' and '.join(most[:2])}, {more} may join; it has {sorted(given)}.")
    hints = typing.get_type_hints(cls, include_extras=True)
    if check:
        for name, value in given.items():
            _check(value, hints[name], f"{path}.{name}")
    return cls(**{**given, "weight": float(given["weight"])})


def _check(value: Any, hint: Any, key: str) -> None:
    wrong = ranges.complaint(value, hint)
    if wrong:
        raise UserError(f"{key} is {value!r}; it must be {wrong}.")


def _same_keys(config: Collection[str], known: Mapping[str, Any], path: str) -> None:
    unknown = [key for key in config if key not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], list(known), 1)
        hint = f"did you mean {path}.{close[0]}?" if close else f"known keys: {', '.join(known)}."
        hint = GONE.get(f"{path}.{unknown[0]}", hint)
        raise UserError(f"{path}.{unknown[0]} is not a configuration key; {hint}")
    missing = [key for key in known if key not in config]
    if missing:
        raise UserError(f"{path}.{missing[0]} is missing; start your config from greedy_distill_jax.config.base().")


def loads(text: str) -> ConfigDict:
    """A configuration that a run stored as JSON, with today's defaults for keys that it does not have."""
    config = base()
    with config.unlocked():
        for terms in _open_in(config):
            for name in list(terms):
                del terms[name]  # the run's alone, not beside the defaults
        stored = json.loads(text)
        config.update(ConfigDict({key: value for key, value in stored.items() if key in config}))  # groups of others go
    return config
