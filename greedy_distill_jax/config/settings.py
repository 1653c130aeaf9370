"""A configuration, read: the frozen tree that everything below the commands sees.

``Settings`` has the keys' own dataclasses under the keys' names (``settings.data.frames`` is ``config.data.frames``),
and beside them what follows from several keys: the networks' sizes, the student's step plan, the losses as functions.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from greedy_distill_jax import cli
from greedy_distill_jax.config import keys, stages, tree
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses import Term, asked, check_options, option_names, resolve
from greedy_distill_jax.models.students.config import CausalConfig, StudentConfig, split_layers
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig

# The other keys of config.student are of one kind.
SHARED_BY_STUDENTS = ("kind", "chunk", "context", "context_noise", "context_weights")


@dataclasses.dataclass(frozen=True)
class Settings(keys.Keys):
    """A run's configuration.

    own: the groups of keys of its stage, by name. text: the configuration as JSON, for checkpoints.
    """

    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text: str = ""

    @functools.cached_property
    def kind(self) -> Any:
        """The stage, a ``training.stages.base.StageKind``."""
        return stages.kind_of(self.stage)

    @functools.cached_property
    def wan(self) -> WanConfig:
        """The DiT: the named size with the non-empty keys of ``config.model`` on top."""
        return named_wan(self.model)

    @property
    def is_student(self) -> bool:
        """The stage trains a student, not a teacher."""
        return self.kind.trains == "student"

    @functools.cached_property
    def student_config(self) -> StudentConfig | CausalConfig:
        """The student made from that DiT."""
        return _student(self.student, self.wan, self.data.frames)

    @functools.cached_property
    def plan(self) -> StepPlan:
        """How the student denoises its chunks, and the level at which it keeps them."""
        return self.plan_with()

    def plan_with(self, steps: Any = None, context_sigma: Any = None) -> StepPlan:
        """``plan`` with other steps and context, see ``StepPlan.parse``, whose names are the fields of errors."""
        s, given = self.sample, {"steps": steps, "context_sigma": context_sigma}
        own = {name: getattr(s, name) for name, value in given.items() if value is None}
        try:
            plan = StepPlan.parse(**given | own, shift=s.shift, sampler=s.sampler)
            plan.check_context(self.student.context)
        except UserError as error:
            fields = {"sampler", *own}
            raise error.at({field: f"config.sample.{field}" for field in fields}) from error
        return plan

    @functools.cached_property
    def terms(self) -> tuple[Term, ...]:
        """The weighted losses of the network that the stage is named for."""
        return self.kind.terms(self)

    def replace(self, **changes: Any) -> "Settings":
        """The same with other values: ``settings.replace(sample=dataclasses.replace(settings.sample, steps=4))``."""
        return dataclasses.replace(self, **changes)


class placed:
    """A plain ValueError in here is the mistake of a value below this key: a UserError that says so."""

    def __init__(self, key: str):
        self._key = key

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, UserError) and error.field:
            raise error.at({error.field: f"{self._key}.{error.field}"}) from error
        if isinstance(error, ValueError | TypeError | ZeroDivisionError) and not isinstance(error, UserError):
            raise UserError(f"{self._key}: {error}") from error


def read_settings(config: ConfigDict, *, imagine_runs: bool = False) -> Settings:
    """The settings of a configuration, checked.

    Args:
      config: started from ``base``.
      imagine_runs: runs that the stage needs and the configuration does not name get a name, for jobs that are only
        compiled.

    Raises:
      UserError: a key that is unknown, missing or of another stage or kind, or a value that no stage can run with.
    """
    settings = _read(config)
    stage, own = stages.kind_of(settings.stage), stages.groups()
    for name in own.keys() - stage.keys.keys():
        given = tree.read(own[name], config[name], f"config.{name}")
        _refuse_changes(given, own[name](), f"config.{name}", settings.stage)
    if imagine_runs:
        wanted = {want.key for want in settings.kind.wanted(settings).values()}
        settings = settings.replace(**{key: "not loaded" for key in wanted if not getattr(settings, key)})
    check(settings)
    return settings


def stored_settings(text: str) -> Settings:
    """The settings of a run, from the JSON in its checkpoint; they were checked when it ran."""
    return _read(tree.loads(text), check=False)


def _read(config: ConfigDict, *, check: bool = True) -> Settings:
    stage = config.get("stage", "teacher")
    kind, groups = stages.kind_of(stage), stages.groups()
    values = tree.read(keys.Keys, config, "config", besides=groups, check=check)
    own = {}
    for name, group in groups.items():
        if name not in config:
            raise UserError(f"config.{name} is missing; start your config from greedy_distill_jax.config.base().")
        if name in kind.keys:
            own[name] = tree.read(group, config[name], f"config.{name}", check=check)
    fields = {f.name: getattr(values, f.name) for f in dataclasses.fields(keys.Keys)}
    fields["sample"] = _with_shift(values.sample, values.shift)
    own = {name: _with_shift(group, values.shift) for name, group in own.items()}
    return Settings(**fields, own=own, text=config.to_json_best_effort())


def _with_shift(group: Any, shift: float) -> Any:
    """A group of keys; one whose ``shift`` is empty has that of the configuration."""
    return dataclasses.replace(group, shift=shift) if getattr(group, "shift", 0) is None else group


def _refuse_changes(read: Any, default: Any, path: str, stage: str) -> None:
    for field in dataclasses.fields(default):
        value, unset = getattr(read, field.name), getattr(default, field.name)
        if dataclasses.is_dataclass(unset):
            _refuse_changes(value, unset, f"{path}.{field.name}", stage)
        elif value != unset:
            raise UserError(
                f"{path}.{field.name} is {value!r}, but stage {stage} does not use it; leave it at {unset!r} or choose "
                f"another config.stage."
            )


def named_wan(model: keys.Model) -> WanConfig:
    """The DiT that ``config.model`` describes."""
    changes = {k: v for k, v in dataclasses.asdict(model).items() if k != "size" and v is not None}
    with placed("config.model"):
        return WanConfig(**{**WAN_SIZES[model.size], **changes})


def _student(student: keys.Student, wan: WanConfig, frames: int) -> StudentConfig | CausalConfig:
    _refuse_keys_of_another_kind(student)
    if student.kind == "causal":
        with placed("config.student.causal"):
            own = dataclasses.asdict(student.causal)
            own["max_frames"] = own["max_frames"] or frames
            own |= {name: getattr(student, name) for name in ("chunk", "context", "context_weights")}
            return CausalConfig(base=wan, **own)
    with placed("config.student"):
        fields = {f.name: getattr(student, f.name) for f in dataclasses.fields(student)}
        for name in ("kind", "split", "context_noise", "causal"):
            del fields[name]
        fields["rope_frames"] = fields["rope_frames"] or frames
        etm, sdd = split_layers(student.split, wan.num_layers)
        return StudentConfig(base=wan, etm_layers=etm, sdd_layers=sdd, **fields)


def _refuse_keys_of_another_kind(student: keys.Student) -> None:
    def flat(student: keys.Student) -> dict[str, Any]:
        own = {f"causal.{name}": value for name, value in dataclasses.asdict(student.causal).items()}
        kept = (f.name for f in dataclasses.fields(student) if f.name not in ("causal", *SHARED_BY_STUDENTS))
        return own | {name: getattr(student, name) for name in kept}

    values = flat(student)
    for name, default in flat(keys.Student()).items():
        if name.startswith("causal.") != (student.kind == "causal") and values[name] != default:
            raise UserError(
                f"config.student.{name} is {values[name]!r}, but config.student.kind = {student.kind!r} does not use "
                f"it; leave it at {default!r} or choose another kind."
            )


def terms_of(
    losses: keys.Losses,
    path: str,
    settings: Settings,
    *,
    offered: tuple[str, ...],
    chunk_of: Callable[[Any], int | None],
) -> tuple[Term, ...]:
    """The losses that a configuration names, as functions with their options.

    Args:
      losses: name in the logs -> key group.
      path: of the group, for errors.
      settings: of the stage; a loss with the option "shift" takes ``config.shift`` as its default.
      offered: what the stage has for losses that ask, networks as a rule.
      chunk_of: latent frames that share a noise level, given the loss: its options "per_frame" and "group" take them
        as defaults, as when streaming. None: one level per video, so that a video is drawn once.

    Raises:
      UserError: a loss that cannot be found, an option it does not take, something that the stage does not have.
    """
    out = []
    for name, term in losses.items():
        with cli.places(loss=f"{path}.{name}.loss", options=f"{path}.{name}.options"):
            loss, options = resolve(term.loss), dict(term.options)
            check_options(term.loss, loss, options)
        takes, asks = option_names(loss), asked(loss)
        missing = [network for network in asks if network not in offered]
        if missing:
            has = f"which has {', '.join(offered)}" if offered else "which has none"
            raise UserError(
                f"{path}.{name}: {term.loss!r} asks for {missing[0]!r} of stage {settings.stage}, {has}; "
                f"use it in another stage, or give {missing[0]!r} a default if it is an option."
            )
        if "shift" in takes:
            options = {"shift": settings.shift} | options
        chunk = chunk_of(loss)
        if chunk is not None:
            options = {k: v for k, v in (("group", chunk), ("per_frame", True)) if k in takes} | options
        elif not asks and options.get("draws", 1) != 1:
            raise UserError(f"{path}.{name}.options.draws: a bidirectional network sees every frame it gets; use 1.")
        out.append(Term(name, loss, term.weight, options, f"{path}.{name}"))
    if not out:
        raise UserError(f"{path} is empty; name at least one loss.")
    return tuple(out)


def check(settings: Settings) -> None:
    """Raises UserError for values that no run of the stage can have together."""
    data = settings.data
    if data.batch % data.accumulate:
        raise UserError(
            f"config.data.accumulate is {data.accumulate}, which does not divide config.data.batch = {data.batch}; "
            f"choose a divisor."
        )
    _ = settings.wan
    _check_lora(settings)
    settings.kind.check(settings)
    _ = settings.terms
    used = {want.key for want in settings.kind.wanted(settings).values()}
    for key in ("teacher_from", "student_from", "critic_from"):
        if getattr(settings, key) and key not in used:
            raise UserError(
                f"config.{key} is {getattr(settings, key)!r}, but stage {settings.stage} with these keys neither "
                f"starts from such a run nor asks it; leave it empty."
            )


def _check_lora(settings: Settings) -> None:
    own = {f"config.{name}": getattr(group, "optimizer", None) for name, group in settings.own.items()}
    for path, optimizer in {"config": settings.optimizer, **own}.items():
        lora = getattr(optimizer, "lora", keys.Lora())
        if not lora.rank and lora != keys.Lora():
            raise UserError(
                f"{path}.optimizer.lora has alpha {lora.alpha} and targets {lora.targets!r}, but rank 0, which is off; "
                f"set {path}.optimizer.lora.rank, or leave the others as they are."
            )
    if settings.optimizer.lora.rank and settings.optimizer.new_scale != 1:
        raise UserError(
            f"config.optimizer.new_scale is {settings.optimizer.new_scale}, but config.optimizer.lora trains factors "
            f"of linears alone; set config.optimizer.new_scale=1, or config.optimizer.lora.rank=0."
        )


def check_student(settings: Settings) -> None:
    """The same for what every stage of a student reads."""
    chunk = settings.student_config.chunk
    if settings.data.frames % chunk:
        raise UserError(
            f"config.data.frames is {settings.data.frames}, which does not divide into chunks of "
            f"config.student.chunk = {chunk}; choose a multiple of {chunk}."
        )
    if settings.plan.keeps_clean and settings.student.etm_input != "kept":
        raise UserError(
            f"config.student.etm_input is {settings.student.etm_input!r}, but with config.sample.context_sigma = "
            f"{settings.sample.context_sigma} chunks are kept clean; leave it at 'kept', or give a level."
        )
    if not settings.plan.keeps_clean and settings.student.context_noise:
        raise UserError(
            f"config.student.context_noise is {settings.student.context_noise}, but config.sample.context_sigma = "
            f"{settings.sample.context_sigma} says the history's noise level; set one of them to 0."
        )
