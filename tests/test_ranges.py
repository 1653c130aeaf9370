"""What a setting may be: ranges in words, every numeric key of the configuration, options of commands and losses."""

import argparse
import dataclasses
import functools
import math
import types
import typing
from typing import Annotated

import pytest
from hypothesis import given, settings, strategies as st

from greedy_distill_jax import compile as compiling, convert, evaluate, prepare, ranges
from greedy_distill_jax.cli import number, prepare_options, sample_options
from greedy_distill_jax.config import keys, read_settings, stages
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses import check_options
from greedy_distill_jax.ranges import Count, Momentum, Positive, Range, complaint
from greedy_distill_jax.testing import tiny


@pytest.mark.parametrize(
    "hint, allowed, refused",
    [
        (Count, {1: "", 2**31 - 1: ""}, {0: "at least 1", 2**31: "at most 2147483647", True: "a whole number"}),
        (Positive, {1: "", 1e-9: ""}, {0.0: "above 0", math.nan: "a finite number", 1e39: "a finite number"}),
        (Momentum, {0.0: ""}, {1.0: "from 0 to below 1", -0.1: "from 0 to below 1", "a": "a number"}),
        (Annotated[int, ranges.at_least(1, also=-1)], {-1: "", 3: ""}, {0: "-1 or at least 1"}),
        (Annotated[float, Range(0, 1, False)], {1.0: ""}, {0.0: "above 0 and at most 1"}),
        (Count | None, {None: "", 1: ""}, {0: "at least 1", 1.5: "a whole number"}),
        (tuple[Momentum, Momentum], {(0.0, 0.9): ""}, {(0.9,): "2 values, each from 0", (0.1, 1.0): "2 values, each"}),
        (Annotated[str, ranges.one_of("a", "")], {"": ""}, {"b": "one of a, ''", 1: "text"}),
        (bool, {False: ""}, {1: "True or False", "no": "True or False"}),
        (typing.Mapping[str, int], {}, {"a": "a group of keys"}),
    ],
    ids=str,
)
def test_values_of_an_annotation(hint, allowed, refused):
    assert {value: complaint(value, hint) for value in allowed} == allowed
    for value, wanted in refused.items():
        assert complaint(value, hint).startswith(wanted), (value, complaint(value, hint))


# --- every numeric key of a configuration -----------------------------------------------------------------------------

STAGE_OF = {"distill": "dmd", "critic": "dmd", "rl": "rl"}


def numeric_keys(group: type, path: str = ""):
    """(dotted key, plain annotation, ranges) of every number, of pairs and of a loss's weight too."""
    for name, hint in typing.get_type_hints(group, include_extras=True).items():
        here = f"{path}.{name}".strip(".")
        if dataclasses.is_dataclass(hint):
            yield from numeric_keys(hint, here)
        elif hint == keys.Losses or typing.get_type_hints(group)[name] == keys.Losses:
            yield from numeric_keys(keys.Loss, f"{here}.flow_matching")
        else:
            pair = typing.get_origin(hint) is tuple
            some = [a for a in (typing.get_args(hint) if _open(hint) else (hint,)) if a is not types.NoneType]
            plain, *rules = typing.get_args(some[0]) if typing.get_origin(some[0]) is Annotated else (some[0],)
            if plain in (int, float):
                yield here, plain, rules, pair


def _open(hint) -> bool:
    return typing.get_origin(hint) in (tuple, typing.Union, types.UnionType)


@functools.cache
def every_key():
    shared = list(numeric_keys(keys.Keys))
    own = [found for name, group in stages.groups().items() for found in numeric_keys(group, name)]
    return shared + own


def test_the_keys_are_found():
    found = {name: rules for name, _, rules, _ in every_key()}
    assert len(found) > 70
    without = {name for name, rules in found.items() if not rules}
    assert without == {"model.gate_init", "student.gate_init"}, "any finite number; all others say their range"


def outside(plain: type, rules: list):
    """Values that a key cannot have."""
    out = [st.sampled_from([math.nan, math.inf, -math.inf])] if plain is float else [st.integers(2**32, 2**70)]
    for rule in rules:
        below = [x for x in (rule.low - 1, rule.low - 10**6) if x != rule.also]
        out.append(st.sampled_from([*below, *([] if rule.with_low else [rule.low])]))
        if rule.high != math.inf:
            out.append(st.sampled_from([rule.high + 1, rule.high + 10**6, *([] if rule.with_high else [rule.high])]))
    return st.one_of(out).map(plain)


def inside(plain: type, rules: list):
    """Values that it can have."""
    (rule,) = rules or [Range()]
    if plain is int:
        return st.integers(int(rule.low), int(min(rule.high, ranges.MOST)))
    bounds = (max(rule.low, -1e30), min(rule.high, 1e30))
    return st.floats(*bounds, exclude_min=not rule.with_low, exclude_max=not rule.with_high, allow_subnormal=False)


def settings_with(key: str, value, pair: bool):
    """Reads a configuration in which a key has the value."""
    config = tiny.train_config(STAGE_OF.get(key.split(".")[0], "teacher"))
    node = config
    *parents, last = key.split(".")
    with config.unlocked():
        for name in parents:
            node = node[name] if name in node else node["dmd"]  # stage dmd has another loss
        node[last] = (0.5, value) if pair else value
    return read_settings(config, imagine_runs=True)


@settings(max_examples=2)
@given(st.data())
def test_a_value_outside_its_range_is_refused_by_its_key(data):
    for key, plain, rules, pair in every_key():
        value = data.draw(outside(plain, rules), key)
        with pytest.raises(UserError) as error:
            settings_with(key, value, pair)
        said = str(error.value)
        assert said.startswith(f"config.{key} is ") and "; it must be " in said and "\n" not in said


@settings(max_examples=2)
@given(st.data())
def test_a_value_inside_its_range_is_refused_at_most_beside_others(data):
    read = 0
    for key, plain, rules, pair in every_key():
        value = data.draw(inside(plain, rules), key)
        try:
            settings_with(key, value, pair)
            read += 1
        except UserError as error:
            assert not str(error).endswith(tuple(f"must be {rule}." for rule in rules)), error
    assert read > len(every_key()) / 2


@pytest.mark.parametrize(
    "key, value", [("data.batch", 24), ("optimizer.clip", 0), ("mesh.data", -1), ("seed", 2**32 - 1)]
)
def test_a_usual_value_is_read(key, value):
    assert functools.reduce(getattr, key.split("."), settings_with(key, value, False)) == value


# --- options of commands and of losses --------------------------------------------------------------------------------


def parsers():
    """Every parser of a command."""
    found = [sample_options.parser("")]
    for add in (
        prepare_options.add_clips,
        prepare_options.add_latents,
        prepare_options.add_text,
        prepare_options.add_ode,
    ):
        parser = argparse.ArgumentParser()
        add(parser, negative="", text_len=4)
        prepare_options.add_share(parser)
        found.append(parser)
    (commands,) = (a for a in convert._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return [*found, *commands.choices.values()]


def test_every_number_of_a_command_has_a_range():
    options = {
        o
        for parser in parsers()
        for action in parser._actions
        if action.type in (int, float)
        for o in action.option_strings
    }
    assert not options


@pytest.mark.parametrize(
    "main, arguments, said",
    [
        (evaluate.main, ["--videos", "0"], "--videos: it is 0; it must be at least 1"),
        (evaluate.main, ["--seed", "-1"], "--seed: it is -1; it must be from 0 to 4294967295"),
        (compiling.main, ["vae", "--height", "x"], "--height: it is x; it must be a whole number, from 1 to 16384"),
        (convert.main, ["inspect", "a", "--heads", "0"], "--heads: it is 0; it must be at least 1"),
        (convert.main, ["export", "a", "b", "--shard-gb", "nan"], "--shard-gb: it is nan; it must be a finite number"),
        (convert.main, ["verify", "a", "b", "--atol", "-1"], "--atol: it is -1; it must be at least 0"),
        (prepare.main, ["ode", "--guidance", "inf"], "--guidance: it is inf; it must be a finite number, at least 0"),
        (prepare.main, ["clips", "--num-shards", "0"], "--num-shards: it is 0; it must be at least 1"),
    ],
)
def test_a_number_of_a_command_outside_its_range(main, arguments, said):
    with pytest.raises(UserError, match=f"^{said}.*; see "):
        main(arguments)


def test_numbers_are_read():
    assert number(Count)("3") == 3 and number(Positive)("1e-3") == 1e-3
    assert sample_options.parse_steps("4,2") == "4,2" and sample_options.parse_steps("4") == 4


def test_options_of_a_loss_are_checked_by_its_annotations():
    def mine(net, batch, key, *, margin: Positive = 1.0, note="", width: "Count" = 1):
        """One with annotations."""

    check_options("mine", mine, dict(margin=2, note=3, width=0))  # without a range, and as text, anything
    with pytest.raises(UserError, match="loss 'mine': option margin is -1; it must be above 0") as error:
        check_options("mine", mine, dict(margin=-1))
    assert error.value.field == "options"


@pytest.mark.parametrize(
    "term, said",
    [
        (dict(loss="flow_matching", weight="much"), r"weight is 'much'; it must be a number, at least 0"),
        (dict(loss="flow_matching", weight=1.0, options="shift"), "options is 'shift'; it must be a group of keys"),
        (dict(loss=3, weight=1.0), "loss is 3; it must be text"),
    ],
)
def test_a_term_of_the_wrong_types(term, said):
    config = tiny.train_config()
    config.losses.mine = term
    with pytest.raises(UserError, match=rf"config\.losses\.mine\.{said}"):
        read_settings(config)


def test_keys_of_another_stage_are_not_ignored():
    config = tiny.train_config()
    config.critic.losses.flow_matching.weight = 2.0
    with pytest.raises(UserError, match="config.critic.losses is .*, but stage teacher does not use it"):
        read_settings(config)
