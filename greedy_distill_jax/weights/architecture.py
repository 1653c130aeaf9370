"""The architecture of a model in any format: its sizes, its parameters, one line about it."""

import dataclasses
import functools
import json
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax

from greedy_distill_jax import ranges
from greedy_distill_jax.distribution.sharding import leaf_paths
from greedy_distill_jax.models.students.config import StudentConfig
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.models.wan.dit import Teacher

Config = WanConfig | StudentConfig


def wan_of(cfg: Config) -> WanConfig:
    """The sizes of the blocks."""
    return cfg.base if isinstance(cfg, StudentConfig) else cfg


@functools.lru_cache(maxsize=16)
def parameter_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter, in the order of the tree."""
    model, wan = (Student(cfg) if isinstance(cfg, StudentConfig) else Teacher(cfg)), wan_of(cfg)
    latent = (1, wan.patch, wan.patch, wan.channels)
    tree = jax.eval_shape(lambda key: model.init(key, latent), jax.random.key(0))
    return {path: tuple(leaf.shape) for path, leaf in leaf_paths(tree)}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return root


def as_config(fields: Mapping[str, Any], wan_changes: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """A configuration from the JSON of an architecture, the blocks' fields ``wan_changes`` on top.

    Raises:
      ValueError, TypeError, KeyError: it is none.
    """
    fields = dict(fields)
    kind = fields.pop("kind", "student" if "etm_layers" in fields else "teacher")
    if kind != "student":
        if fields.get("context_weights") == "own":
            raise ValueError("a causal student with weights of its own for the context pass; train one with 'shared'")
        fields = fields.get("base", fields)
        known = {f.name for f in dataclasses.fields(WanConfig)}
        return _checked(WanConfig, **{**{k: v for k, v in fields.items() if k in known}, **wan_changes})
    fields["base"] = _checked(WanConfig, **{**fields["base"], **wan_changes})
    return _checked(StudentConfig, **{k: tuple(v) if k.endswith("_layers") else v for k, v in fields.items()})


def _checked(kind: type[Config], **fields: Any) -> Any:
    """The configuration of these fields, once every one has its type."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for name in fields.keys() & hints.keys():
        ranges.check(fields[name], hints[name], name)
    return kind(**fields)


def precision_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's configuration says of its DiT beyond the architecture: dtype, remat, initialisation."""
    model = json.loads(meta.get("config", "{}")).get("model", {})
    chosen = {k: v for k, v in model.items() if v is not None}
    known = {f.name for f in dataclasses.fields(WanConfig)}
    return {k: v for k, v in {**WAN_SIZES.get(chosen.get("size"), {}), **chosen}.items() if k in known}


def describe(cfg: Config) -> str:
    """One line: kind and sizes."""
    wan = wan_of(cfg)
    sizes = f"dim {wan.dim}, ffn {wan.ffn_dim}, {wan.num_heads} heads"
    if isinstance(cfg, StudentConfig):
        return f"a student (ETM {len(cfg.etm_layers)} + SDD {len(cfg.sdd_layers)} layers, {sizes}, {cfg.fusion})"
    return f"a Wan DiT ({wan.num_layers} layers, {sizes})"


def architecture_json(cfg: Config) -> dict[str, Any]:
    """Returns the architecture as JSON, with its kind."""
    kind = "student" if isinstance(cfg, StudentConfig) else "teacher"
    return {"kind": kind, **dataclasses.asdict(cfg)}
