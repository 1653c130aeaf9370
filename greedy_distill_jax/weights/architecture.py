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
from greedy_distill_jax.models.students.config import CausalConfig, StudentConfig
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.models.wan.dit import Teacher

_KINDS = ("teacher", "student", "causalstudent")
Config = WanConfig | StudentConfig | CausalConfig


def wan_of(cfg: Config) -> WanConfig:
    """The sizes of the blocks."""
    return cfg if isinstance(cfg, WanConfig) else cfg.base


@functools.lru_cache(maxsize=16)
def parameter_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter, in the order of the tree."""
    wan = wan_of(cfg)
    model = Student(cfg) if isinstance(cfg, StudentConfig) else Teacher(wan)  # a causal student has its parameters
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
    if kind not in _KINDS:
        raise ValueError(f"an architecture of kind {kind!r}; known are {', '.join(_KINDS)}")
    if kind == "teacher":
        known = {f.name for f in dataclasses.fields(WanConfig)}
        return _checked(WanConfig, **{**{k: v for k, v in fields.items() if k in known}, **wan_changes})
    if kind == "causalstudent" and fields.get("context_weights") == "own":
        raise ValueError("a causal student with weights of its own for the context pass; train one with 'shared'")
    fields["base"] = _checked(WanConfig, **{**fields["base"], **wan_changes})
    if kind == "causalstudent":
        return _checked(CausalConfig, **fields)
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
    sizes = f"{wan.num_layers} layers, {sizes}"
    if isinstance(cfg, CausalConfig):
        seen = f"window {cfg.window}" if cfg.window else f"all of {cfg.max_frames} frames"
        return f"a causal student ({sizes}, chunk {cfg.chunk}, {seen}, sink {cfg.sink})"
    return f"a Wan DiT ({sizes})"


def architecture_json(cfg: Config) -> dict[str, Any]:
    """Returns the architecture as JSON, with its kind."""
    kinds = {WanConfig: "teacher", StudentConfig: "student", CausalConfig: "causalstudent"}
    kind = kinds[type(cfg)]
    return {"kind": kind, **dataclasses.asdict(cfg)}
