"""The stages of training: what is trained, what it starts from, which frozen networks it asks, its step functions.

``train.py`` runs any of them in the same loop.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from greedy_distill_jax.config import keys as configuration
from greedy_distill_jax.diffusion import guidance
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students.base import ContextGrad, StreamingModel
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.runs.run import NOT_ARCHITECTURE, Run
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.training import nets, policy_gradient, update
from greedy_distill_jax.training.optimizer import make_optimizer
from greedy_distill_jax.training.state import TrainState


class Part(NamedTuple):
    """One jitted function of a step: ``call(state, frozen, batch) -> (state, metrics)``, on steps where ``due(step)``.

    Steps count from 1; the last part that is due ends the step.
    """

    name: str
    due: Callable[[int], bool]
    call: Callable


class Stage(NamedTuple):
    """What ``train.py`` needs to know. ``frozen``: parameters of networks that are not trained, by name."""

    model: Teacher | StreamingModel
    optimizer: optax.GradientTransformation
    critic: Teacher | StreamingModel | None
    critic_optimizer: optax.GradientTransformation | None
    frozen: Mapping[str, Any]
    parts: tuple[Part, ...]

    def state(self, params, critic=None) -> TrainState:
        """Step 0."""
        state = TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), self.optimizer.init(params))
        if self.critic is None:
            return state
        return state._replace(critic=critic, critic_opt=self.critic_optimizer.init(critic))


class Sources(NamedTuple):
    """The runs a stage starts from, or asks for scores; ``critic`` only where it is not ``teacher``."""

    teacher: Run | None
    student: Run | None
    critic: Run | None = None


def build_model(config: ConfigDict) -> Teacher | StreamingModel:
    """The network that the config's stage trains."""
    if config.stage == "teacher":
        return Teacher(configuration.wan_config(config))
    return make_student(configuration.student_config(config))


def load_sources(config: ConfigDict, model: Teacher | StreamingModel, *, resumed: bool, sharding=None) -> Sources:
    """Loads what ``config.teacher_from``, ``.student_from`` and ``.critic_from`` name, if it is still needed.

    ``sharding``: function from a tree of shapes to one of shardings, in which the parameters are read; the largest
    network need not fit into one device.
    """
    teacher = student = critic = None
    asked = configuration.frozen_networks(config)
    if config.teacher_from and isinstance(model, StreamingModel) and ("teacher" in asked or not resumed):
        wanted = configuration.teacher_config(config) if config.stage == "dmd" else model.cfg.base
        teacher = _load_teacher("teacher_from", config.teacher_from, wanted, sharding)
        if "teacher" in asked and config.distill.real == "per_frame":
            _check_per_frame(config.teacher_from, teacher)
    if config.critic_from and config.stage == "dmd" and not resumed:
        critic = _load_teacher("critic_from", config.critic_from, model.cfg.base, sharding)
    if config.student_from and isinstance(model, StreamingModel) and ("stage1" in asked or not resumed):
        student = Run.load(config.student_from, needs_codec=False, sharding=sharding)
        if student.config.stage == "teacher":
            raise UserError(f"config.student_from {config.student_from} holds a teacher, not a student.")
        if "stage1" in asked and student.config.stage != "teacher_forcing":
            raise UserError(
                f"config.student_from {config.student_from} holds stage {student.config.stage}, but real "
                f"{config.distill.real!r} with fake {config.distill.fake!r} takes its score for stage 1's; name a run "
                f"of stage teacher_forcing."
            )
        _check_same("student_from", config.student_from, student.model.cfg, model.cfg)
    return Sources(teacher, student, critic)


def _load_teacher(key: str, directory: str, wanted, sharding) -> Run:
    run = Run.load(directory, needs_codec=False, sharding=sharding)
    if run.config.stage != "teacher":
        raise UserError(f"config.{key} {directory} holds stage {run.config.stage}, not a teacher.")
    _check_same(key, directory, run.model.cfg, wanted)
    return run


def source_fingerprints(config: ConfigDict, sources: Sources) -> dict[str, str]:
    """What a resumed run must find again: the runs behind the frozen networks, by config key."""
    asked = configuration.frozen_networks(config)
    runs = {"teacher": ("teacher_from", sources.teacher), "stage1": ("student_from", sources.student)}
    return {runs[name][0]: runs[name][1].fingerprint for name in sorted(asked)}


def _check_per_frame(directory: str, teacher: Run) -> None:
    losses = configuration.terms(teacher.config)
    if "source" not in teacher.meta and not any(term.options.get("per_frame") for term in losses):
        raise UserError(
            f"config.distill.real is 'per_frame', but the teacher {directory} was trained with one noise level per "
            f"video; train one with config.losses.flow_matching.options.per_frame=True or choose another real."
        )


def _check_same(key: str, directory: str, stored, wanted) -> None:
    if type(stored) is not type(wanted):
        raise UserError(f"config.{key} {directory} holds another kind of student; set the same config.student.kind.")
    names = [f for f in stored.__dataclass_fields__ if f not in NOT_ARCHITECTURE and f != "base"]
    different = [f for f in names if _meaning(f, getattr(stored, f)) != _meaning(f, getattr(wanted, f))]
    if different:
        listed = ", ".join(f"{f} {getattr(stored, f)} against {getattr(wanted, f)}" for f in different)
        raise UserError(
            f"config.{key} {directory} has another architecture: {listed}; set the same config.model and "
            f"config.student in both (config.distill.teacher_size for a teacher of another size)."
        )
    if hasattr(stored, "base"):
        _check_same(key, directory, stored.base, wanted.base)


def _meaning(field: str, value):
    """A field's value, equal where the same parameters give the same numbers."""
    return {("context", "fused"): "clean", ("recache", True): False}.get((field, value), value)


def build_stage(config: ConfigDict, model: Teacher | StreamingModel, sources: Sources, null_MC, latent_shape) -> Stage:
    """Step functions and optimisers of the config's stage.

    Args:
      model: ``build_model(config)``.
      sources: ``load_sources(config, model)``.
      null_MC: the unconditional text rows.
      latent_shape: (T, H, W, C) of an example.
    """
    shared = dict(
        seed=config.seed, null_MC=jnp.asarray(null_MC), text_dropout=config.text_dropout,
        microbatches=config.data.accumulate,
    )  # fmt: skip
    if config.stage == "dmd":
        return _distillation(config, model, sources, shared, latent_shape)
    make_net = functools.partial(nets.teacher_net, model) if config.stage == "teacher" else _student_net(config, model)
    optimizer = _optimizer(config.optimizer, config.steps)
    call = functools.partial(
        update.train_step, make_net=make_net, terms=configuration.terms(config), **shared,
        update=update.Update(optimizer, config.ema.decay, config.ema.start, _rate_scale(config)),
    )  # fmt: skip

    def on_data(state, frozen, batch):
        del frozen
        return call(state, batch)

    return Stage(model, optimizer, None, None, {}, (Part("", lambda step: True, on_data),))


def _distillation(config: ConfigDict, student: StreamingModel, sources: Sources, shared, latent_shape) -> Stage:
    """Stage 2: the generator step and, with a separate fake score, the critic step."""
    d = config.distill
    fused = student.cfg.context == "fused"
    rolled = make_student(dataclasses.replace(student.cfg, context="clean")) if fused else student
    own = policy_gradient.SelfRollout(
        make_streamer(rolled, configuration.step_plan(config)), tuple(latent_shape), d.frames or latent_shape[0],
        d.exit, ContextGrad(d.context_grad_etm, d.context_grad_sdd), d.pg, d.segment, d.epochs, d.anchor,
    )  # fmt: skip
    asked = configuration.frozen_networks(config)
    loaded = {"teacher": sources.teacher, "stage1": sources.student}
    for name, key in (("teacher", "teacher_from"), ("stage1", "student_from")):
        if name in asked and loaded[name] is None:
            raise UserError(
                f"config.{key} is empty, but real {d.real!r} with fake {d.fake!r} needs that network; name its run."
            )
    frozen = {name: _compute_precision(loaded[name].params, student.cfg.base.dtype) for name in sorted(asked)}
    critic, critic_net = _critic(config, student)

    def due(step):
        return step > d.critic_warmup and (step - d.critic_warmup - 1) % d.generator_every == 0

    updates = -(-(config.steps - d.critic_warmup) // d.generator_every)
    updates *= d.epochs if d.pg == "actor_critic" else 1
    optimizer = _optimizer(config.optimizer, updates)
    generator = functools.partial(
        policy_gradient.generator_step, own=own, make_net=_student_net(config, student),
        make_scores=score_nets(config, student, shared["null_MC"]),
        terms=configuration.terms(config), counts=critic is None, **shared,
        update=update.Update(optimizer, config.ema.decay, config.ema.start, _rate_scale(config)),
    )  # fmt: skip
    parts = [Part("", due, generator)]
    critic_optimizer = None
    if critic:
        critic_optimizer = _optimizer(config.critic.optimizer, config.steps)
        parts.append(Part("critic", lambda step: True, functools.partial(
            policy_gradient.critic_step, own=own, make_net=critic_net, terms=configuration.critic_terms(config),
            update=update.Update(critic_optimizer, 0.0, 0), **shared,
        )))  # fmt: skip
    return Stage(student, optimizer, critic, critic_optimizer, frozen, tuple(parts))


def given_params(stage: Stage, sources: Sources) -> dict[str, Any]:
    """Parameters of the runs that ``initial_params`` makes use of: a teacher that only scores is not among them."""
    given = {name: run.params for name, run in sources._asdict().items() if run is not None}
    critic_from_teacher = isinstance(stage.critic, Teacher) and "critic" not in given
    if "student" in given and not critic_from_teacher:
        given.pop("teacher", None)
    return given


def _critic(config: ConfigDict, student: StreamingModel):
    """(the separate fake score, its ``make_net(params, key)``), or (None, None)."""
    if config.distill.fake != "critic":
        return None, None
    if config.distill.real == "joint":
        teacher = Teacher(student.cfg.base)
        return teacher, functools.partial(nets.teacher_net, teacher)
    return student, _student_net(config, student)


def score_nets(config: ConfigDict, student: StreamingModel, null_MC) -> Callable:
    """``make_scores(state, frozen, key) -> {"real": net, "fake": net}`` of ``config.distill``."""
    d, student_net = config.distill, _student_net(config, student)
    teacher = Teacher(configuration.teacher_config(config))
    _, critic_net = _critic(config, student)
    real_net = {
        "joint": lambda frozen, key: nets.teacher_net(teacher, frozen["teacher"], key),
        "per_frame": lambda frozen, key: nets.clean_history_net(teacher, student.cfg.chunk, frozen["teacher"], key),
        "autoregressive": lambda frozen, key: student_net(frozen["stage1"], key),
    }[d.real]
    fake_net = {
        "critic": lambda state, frozen, key: critic_net(state.critic, key),
        "self_sg": lambda state, frozen, key: student_net(state.params, key),
        "self_fm": lambda state, frozen, key: student_net(state.params, key),
        "self_ema": lambda state, frozen, key: student_net(state.ema, key),
        "stage1": lambda state, frozen, key: student_net(frozen["stage1"], key),
    }[d.fake]

    def make_scores(state, frozen, key):
        key_real, key_fake = jax.random.split(key)
        real = guidance.guided_score(real_net(frozen, key_real), null_MC, d.guidance)
        return {"real": real, "fake": fake_net(state, frozen, key_fake)}

    return make_scores


def initial_params(stage: Stage, key, latent_shape, given: Mapping[str, Any]):
    """(parameters, critic's parameters or None) of step 0.

    Args:
      given: parameters of the sources' runs, "teacher", "student" and "critic", as far as there are any. Shapes do not
        depend on it: with none of them everything is random.
      key: of a random start, and of what the sources do not have.
    """
    given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), given)  # converted weights may be stored in bfloat16
    if "student" in given:
        params = given["student"]
    elif "teacher" in given and isinstance(stage.model, StreamingModel):
        params = stage.model.from_teacher(key, given["teacher"], latent_shape)
    else:
        params = stage.model.init(key, latent_shape)
    if stage.critic is None:
        return params, None
    if isinstance(stage.critic, Teacher):
        names = [name for name in ("critic", "teacher") if name in given]
        return params, given[names[0]] if names else stage.critic.init(key, latent_shape)
    return params, jax.tree.map(jnp.copy, params)


def _student_net(config: ConfigDict, student: StreamingModel):
    plan = configuration.step_plan(config)
    return functools.partial(nets.student_net, student, plan=plan, context_noise=config.student.context_noise)


def _compute_precision(params, dtype: str):
    """Frozen networks keep kernels in the precision they compute in: half the memory with bfloat16."""

    def cast(path, leaf):
        kernel = getattr(path[-1], "key", None) == "kernel"
        wanted = jnp.dtype(dtype) if kernel else leaf.dtype
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, wanted)
        return leaf.astype(wanted)  # where it is

    return jax.tree_util.tree_map_with_path(cast, params)


def _optimizer(config: ConfigDict, steps_: int) -> optax.GradientTransformation:
    o = {k: v for k, v in config.items() if k != "new_scale"}
    return make_optimizer(o.pop("name"), steps=steps_, **{**o, "betas": tuple(o["betas"])})


def _rate_scale(config: ConfigDict):
    scale = config.optimizer.new_scale
    return None if scale == 1.0 else new_parameter_scale(scale)


def new_parameter_scale(scale: float):
    """Factors on updates: ``scale`` for student parameters that no teacher has, 1 for the rest."""

    def factors(params):
        def factor(path, leaf):
            names = {getattr(k, "key", "") for k in path}
            norm_of_etm = {"etm", "norm"} <= names and "blocks" not in names
            fresh = norm_of_etm or names & {"z_k", "z_v", "norm_z", "z_in", "z_gate", "bos"}
            return jnp.asarray(scale if fresh else 1.0, leaf.dtype).reshape((1,) * leaf.ndim)

        return jax.tree_util.tree_map_with_path(factor, params)

    return factors
