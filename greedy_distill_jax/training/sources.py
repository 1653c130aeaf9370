"""The runs that a training starts from or keeps frozen, checked against what its stage expects of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from greedy_distill_jax import cli
from greedy_distill_jax.config.settings import Settings
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students.config import CausalConfig, StudentConfig
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.runs.run import NOT_ARCHITECTURE, Run


class Wanted(NamedTuple):
    """A run that a stage may start from, or whose network it asks.

    key: of the configuration, which names the run's folder. architecture: the run's network must have it.
    frozen: the name under which the stage keeps the network as it is; "" = it is only started from. why: what needs a
    frozen one, for the error when it is not named. stage: the stage that the run must be of; "" = any of its kind.
    """

    key: str
    architecture: WanConfig | StudentConfig | CausalConfig
    frozen: str = ""
    why: str = ""
    stage: str = ""


def load_sources(
    settings: Settings, wanted: Mapping[str, Wanted], *, resumed: bool, sharding: Any = None
) -> dict[str, Run]:
    """{name: run} of what the configuration names, as far as it is still needed.

    Args:
      wanted: by name, see ``StageKind.wanted``.
      resumed: the run goes on from a checkpoint of its own: only frozen networks are needed.
      sharding: function from a tree of shapes to one of shardings, in which the parameters are read; the largest
        network need not fit into one device.
    """
    found = {}
    for name, want in wanted.items():
        directory = getattr(settings, want.key)
        if not directory:
            if want.frozen:
                raise UserError(f"config.{want.key} is empty, but {want.why} needs that network; name its run.")
            continue
        if resumed and not want.frozen:
            continue
        with cli.places(directory=f"config.{want.key}"):
            run = Run.load(directory, needs_codec=False, sharding=sharding)
        _check(want, directory, run)
        if not isinstance(want.architecture, WanConfig):  # a shared clean pass becomes one with weights of its own
            run.params = make_student(want.architecture).with_context(run.params)
        found[name] = run
    return found


def frozen_runs(wanted: Mapping[str, Wanted], sources: Mapping[str, Any]) -> dict[str, Any]:
    """{name of the frozen network: the run it comes from}."""
    return {want.frozen: sources[name] for name, want in wanted.items() if want.frozen}


def fingerprints(wanted: Mapping[str, Wanted], sources: Mapping[str, Run]) -> dict[str, str]:
    """What a resumed run must find again: the runs behind the frozen networks, by config key."""
    return {want.key: sources[name].fingerprint for name, want in sorted(wanted.items()) if want.frozen}


def _check(want: Wanted, directory: str, run: Run) -> None:
    stage, teacher = run.settings.stage, isinstance(want.architecture, WanConfig)
    if teacher and run.is_student:
        raise UserError(f"config.{want.key} {directory} holds stage {stage}, not a teacher.")
    if not teacher and not run.is_student:
        raise UserError(f"config.{want.key} {directory} holds a teacher, not a student.")
    if want.stage and stage != want.stage:
        raise UserError(
            f"config.{want.key} {directory} holds stage {stage}, but {want.why} takes its score for that of stage "
            f"{want.stage}; name a run of that stage."
        )
    but = () if want.frozen else ("context", "etm_input")  # what is trained further learns its new context
    check_same(want.key, directory, run.model.cfg, want.architecture, but)


def check_same(key: str, directory: str, stored, wanted, but: tuple[str, ...] = ()) -> None:
    """Raises UserError when two networks do not have the same parameters with the same meaning, but for some fields."""
    if type(stored) is not type(wanted):
        raise UserError(f"config.{key} {directory} holds another kind of student; set the same config.student.kind.")
    names = [f for f in stored.__dataclass_fields__ if f not in (*NOT_ARCHITECTURE, "base", *but)]
    different = [f for f in names if not _serves(f, getattr(stored, f), getattr(wanted, f))]
    if different:
        listed = ", ".join(f"{f} {getattr(stored, f)} against {getattr(wanted, f)}" for f in different)
        raise UserError(
            f"config.{key} {directory} has another architecture: {listed}; set the same config.model and "
            f"config.student in both (config.distill.teacher_size for a teacher of another size)."
        )
    if hasattr(stored, "base"):
        check_same(key, directory, stored.base, wanted.base)


def _serves(field: str, stored, wanted) -> bool:
    """Whether a network with ``stored`` is one with ``wanted``, or becomes one (``StreamingModel.with_context``)."""
    if (field, stored, wanted) == ("context_weights", "shared", "own"):
        return True
    return _meaning(field, stored) == _meaning(field, wanted)


def _meaning(field: str, value):
    """A field's value, equal where the same parameters give the same numbers."""
    if field in ("recache", "recache_of", "global_sink"):  # of streams alone
        return None
    return {("context", "fused"): "clean"}.get((field, value), value)
