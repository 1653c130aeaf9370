"""The two scores of stages that match distributions: their networks, and the part of a step that trains the critic."""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp

from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.config.settings import Settings, terms_of
from greedy_distill_jax.diffusion import guidance
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses import Term
from greedy_distill_jax.losses.pair import draw_pair
from greedy_distill_jax.models import flops
from greedy_distill_jax.models.flops import Flops
from greedy_distill_jax.models.students.base import ContextGrad, StreamingModel
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.training import nets, policy_gradient
from greedy_distill_jax.training.cost import Cost, Meter, draws, total
from greedy_distill_jax.training.stages.base import Inputs, Network, Part, always, optimizer_of
from greedy_distill_jax.training.stages.teacher_forcing import looking_back
from greedy_distill_jax.training.update import Update


def teacher_config(settings: Settings) -> WanConfig:
    """The DiT that is asked for the real score; precision, remat and text are those of ``config.model``."""
    shared = ("text_dim", "text_len", "dtype", "gradient_dtype", "remat")
    size = WAN_SIZES.get(settings.own["distill"].teacher_size, {})
    return dataclasses.replace(settings.wan, **{k: v for k, v in size.items() if k not in shared})


def critic_terms(settings: Settings) -> tuple[Term, ...]:
    """The critic's losses: bidirectional beside a bidirectional teacher score, teacher-forced beside the others."""
    joint, chunk = settings.own["distill"].real == "joint", settings.student_config.chunk
    return terms_of(
        settings.own["critic"].losses,
        "config.critic.losses",
        settings,
        offered=(),
        chunk_of=lambda loss: None if joint else chunk,
    )


def self_rollout(
    settings: Settings, student: StreamingModel, latent_shape, frames: int = 0
) -> policy_gradient.SelfRollout:
    """How the student makes its own videos, of ``frames`` where they are given."""
    d = settings.own["distill"]
    return policy_gradient.SelfRollout(
        make_streamer(unfused(student), settings.plan),
        tuple(latent_shape),
        frames or d.frames or latent_shape[0],
        d.exit,
        ContextGrad(d.context_grad_etm, d.context_grad_sdd),
        d.pg,
        d.segment,
        d.epochs,
        d.anchor,
    )


def unfused(student: StreamingModel) -> StreamingModel:
    """The student that is rolled out: context "fused" as "clean", whose numbers are the same."""
    fused = student.cfg.context == "fused"
    return make_student(dataclasses.replace(student.cfg, context="clean")) if fused else student


def critic_of(settings: Settings, student: StreamingModel):
    """(the separate fake score, its ``make_net(params)``), or (None, None)."""
    d = settings.own["distill"]
    if d.fake != "critic":
        return None, None
    if d.real == "joint":
        teacher = Teacher(student.cfg.base)
        return teacher, functools.partial(nets.teacher_net, teacher)
    return student, functools.partial(nets.student_net, student)


def score_nets(settings: Settings, student: StreamingModel, null_MC) -> Callable:
    """``make_scores(state, frozen) -> {"real": net, "fake": net}`` of ``config.distill``."""
    d = settings.own["distill"]
    own_net, (_, critic_net) = functools.partial(nets.student_net, student), critic_of(settings, student)
    teacher = Teacher(teacher_config(settings))
    real_net = {
        "joint": lambda frozen: nets.teacher_net(teacher, frozen["teacher"]),
        "per_frame": lambda frozen: nets.given_history_net(teacher, student.cfg.chunk, frozen["teacher"]),
        "autoregressive": lambda frozen: own_net(frozen["stage1"]),
    }[d.real]
    fake_net = {
        "critic": lambda state, frozen: critic_net(state.nets["critic"].params),
        "self_sg": lambda state, frozen: own_net(state.nets["student"].params),
        "self_fm": lambda state, frozen: own_net(state.nets["student"].params),
        "self_ema": lambda state, frozen: own_net(state.nets["student"].ema),
        "stage1": lambda state, frozen: own_net(frozen["stage1"]),
    }[d.fake]

    def make_scores(state, frozen):
        real = guidance.guided_score(real_net(frozen), null_MC, d.guidance)
        return {"real": real, "fake": fake_net(state, frozen)}

    return make_scores


def score_group(settings: Settings) -> int | None:
    """Latent frames that share a noise level when scores are asked: a bidirectional teacher has seen one per video."""
    return None if settings.own["distill"].real == "joint" else settings.student_config.chunk


def pair_of(settings: Settings) -> Callable:
    """``make_pair(key, video, real, fake, videos)`` of ``config.distill``, see ``losses.pair.draw_pair``."""
    d, group = settings.own["distill"], score_group(settings)
    keys = {name: getattr(d, name) for name in ("shift", "low", "high", "draws", "skip")}
    return functools.partial(draw_pair, **keys, group=group)


def generator_due(settings: Settings) -> Callable[[int], bool]:
    """``due(step)`` of the student's update, between those of the critic."""
    d = settings.own["distill"]
    return lambda step: step > d.critic_warmup and (step - d.critic_warmup - 1) % d.generator_every == 0


def shared_by_parts(settings: Settings, student: StreamingModel, inputs: Inputs, frames: int = 0) -> dict:
    """What the steps of generator and critic are given alike."""
    return dict(
        seed=settings.seed,
        null_MC=jnp.asarray(inputs.null_MC),
        own=self_rollout(settings, student, inputs.latent_shape, frames),
        prepare=looking_back(settings, student),
        text_dropout=settings.text_dropout,
        microbatches=settings.data.accumulate,
    )


def critic_part(
    settings: Settings, student: StreamingModel, inputs: Inputs, frames: int = 0
) -> tuple[Network, Part] | None:
    """(the critic, the part that trains it on the student's videos), None where the fake score is none.

    ``frames``: length of those videos, instead of that of ``config.distill``.
    """
    critic, critic_net = critic_of(settings, student)
    if critic is None:
        return None
    update = Update(optimizer_of(settings, settings.steps, "critic"))
    start = dict(start_from=("critic", "teacher")) if isinstance(critic, Teacher) else dict(copy_of="student")
    step = functools.partial(
        policy_gradient.critic_step,
        make_net=critic_net,
        terms=critic_terms(settings),
        update=update,
        **shared_by_parts(settings, student, inputs, frames),
    )
    part = Part("critic", always, handing_on(step), losses="config.critic.losses")
    return Network(critic, update, **start, part="critic"), part


def critic_cost(settings: Settings, student: StreamingModel, meter: Meter, rolled: Flops) -> Cost:
    """Of an update of the critic on videos whose rollout costs ``rolled``."""
    frames, tokens, calls = meter.frames, meter.tokens, draws(critic_terms(settings))
    if isinstance(critic_of(settings, student)[0], Teacher):
        learnt = [flops.teacher(settings.wan, frames * n, tokens) for n in calls]
    else:
        learnt = [flops.student(student.cfg, frames, tokens, n) for n in calls]
    return meter.cost(total(learnt), rolled)


def check_lists(settings: Settings, frames: int) -> None:
    """Raises UserError for step lists that no chunk of so many latent frames reaches."""
    lists, chunk = len(settings.plan.sigmas), settings.student.chunk
    if lists > frames // chunk:
        raise UserError(
            f"config.sample.steps has {lists} different lists, but a rollout of {frames} frames has {frames // chunk} "
            f"chunks of {chunk}: the last lists would never be trained; give one per chunk, or roll out more frames."
        )


def check_windows(codec: VideoCodec, key: str, frames: int, of_data: int) -> None:
    """A window of a longer stream is a video like any other only where all latent frames are alike."""
    if frames > of_data and codec.temporal_stride > 1:
        raise UserError(
            f"{key} is {frames}, beyond config.data.frames = {of_data}: the scores would see windows that begin with a "
            f"latent of {codec.temporal_stride} frames of video, where every video they were trained on begins with a "
            f"latent of one; leave {key} at {of_data}."
        )


def handing_on(step: Callable) -> Callable:
    def call(state, frozen, batch, carry):
        state, metrics, *more = step(state, frozen, batch)
        return state, metrics, {**carry, **(more[0] if more else {})}

    return call
