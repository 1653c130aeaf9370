"""Stage "dmd" (stage 2): the student on its own videos, matched to the teacher's distribution.

What it computes is in ``training.policy_gradient``; here are its keys, what they exclude, and its networks.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.config.keys import Losses, TransformerOptimizer, flow_matching_alone
from greedy_distill_jax.config.settings import Settings, check_student, terms_of
from greedy_distill_jax.diffusion import guidance
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses import Term, asked, motion, motion_head as motion_head_loss
from greedy_distill_jax.losses.pair import draw_pair
from greedy_distill_jax.models import flops
from greedy_distill_jax.models.students.base import ContextGrad, StreamingModel
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.ranges import Count, Natural, NoiseLevel, NotNegative, Positive, between, one_of
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.training import motion_head, nets, policy_gradient, rollout
from greedy_distill_jax.training.cost import Cost, Meter, draws, score_calls, total
from greedy_distill_jax.training.sources import Wanted
from greedy_distill_jax.training.stages.base import (
    Inputs,
    Network,
    Part,
    Stage,
    StageKind,
    always,
    compute_precision,
    optimizer_of,
    own_update,
    text_shape,
)
from greedy_distill_jax.training.stages.ode import check_trajectories, states_shape, with_levels
from greedy_distill_jax.training.stages.teacher_forcing import looking_back
from greedy_distill_jax.training.update import Update

REAL = ("joint", "autoregressive", "per_frame")
FAKE = ("critic", "self_sg", "self_fm", "self_ema", "stage1")


@dataclasses.dataclass(frozen=True)
class Distill:
    """Keys of stage "dmd"."""

    # Teacher score: joint (bidirectional) | autoregressive (stage 1, frozen) | per_frame.
    real: Annotated[str, one_of(*REAL)] = "joint"
    fake: Annotated[str, one_of(*FAKE)] = "critic"  # student score: critic, the student itself, or stage1 (frozen)
    # The teacher's, a name as in model.size (a 14B teacher of a 1.3B student); "" = model.
    teacher_size: Annotated[str, one_of("", *WAN_SIZES)] = ""
    guidance: NotNegative = 4.0  # CFG scale of the teacher score; 1 = off
    pg: Annotated[str, one_of(*policy_gradient.PG)] = "rollout_trunc"  # see training/policy_gradient.py
    segment: Natural = 0  # rollout_full: chunks through which later frames give credit to earlier ones, 0 = all
    epochs: Count = 1  # actor_critic: updates per rollout
    anchor: NotNegative = 0.0  # actor_critic: weight of (action - action of the rollout)^2
    # Length of a rollout; beyond data.frames the scores see random windows; 0 = data.frames.
    frames: Annotated[int, between(0, 2**16)] = 0
    # Of the noise levels at which both scores are asked, drawn uniformly before it; empty = config.shift.
    shift: Positive | None = None
    low: NoiseLevel = 0.02  # these levels are clipped to [low, high]
    high: NoiseLevel = 0.98
    draws: Count = 1  # noise draws per video, averaged
    skip: Natural = 0  # first latent frames of what the scores see that no loss counts
    # Denoising step that makes the frames of a rollout: random | last | random_but_first (the first list to its end).
    exit: Annotated[str, one_of(*rollout.EXITS)] = "random"
    context_grad_etm: Annotated[str, one_of("params", "none")] = "params"  # ETM learns through z
    context_grad_sdd: Annotated[str, one_of("params", "none")] = "none"  # SDD learns through its keys of earlier frames
    generator_every: Count = 5  # steps from one generator update to the next; the critic is updated in every step
    critic_warmup: Natural = 0  # steps before the first generator update


@dataclasses.dataclass(frozen=True)
class Critic:
    """Keys of the critic, the separate fake score of ``distill.fake = "critic"``."""

    losses: Losses = dataclasses.field(default_factory=flow_matching_alone)
    optimizer: TransformerOptimizer = dataclasses.field(default_factory=TransformerOptimizer)


class Dmd(StageKind):
    """See the module."""

    keys: ClassVar = {"distill": Distill, "critic": Critic, "motion_head": motion_head.MotionHeadKeys}
    kept = (
        *(f"distill.{key}" for key in ("real", "fake", "generator_every", "critic_warmup")),
        *(f"motion_head.{key}" for key in ("width", "layers")),
        *(f"critic.optimizer.lora.{key}" for key in ("rank", "alpha", "targets")),
    )
    offers = ("pair", "real", "fake", "head", "samples")

    def check(self, settings: Settings) -> None:
        """Raises UserError for keys that exclude each other."""
        check_student(settings)
        d: Distill = settings.own["distill"]
        _check_teacher(d)
        _check_critic(settings, d)
        _check_gradient(settings, d)
        _check_rollout(settings, d)
        _check_scores(settings, d)
        _check_motion(settings, d)

    def terms(self, settings: Settings) -> tuple[Term, ...]:
        """The student's losses; one that asks a bidirectional teacher for scores keeps one noise level per video."""
        chunk = score_group(settings)
        return terms_of(
            settings.losses,
            "config.losses",
            settings,
            offered=self.offers,
            chunk_of=lambda loss: chunk if _on_scores(loss) else settings.student_config.chunk,
        )

    def wanted(self, settings: Settings) -> dict[str, Wanted]:
        """The student to start from, the networks that only give scores, the critic's start."""
        d: Distill = settings.own["distill"]
        why = f"real {d.real!r} with fake {d.fake!r}"
        stage1, teacher = d.fake == "stage1" or d.real == "autoregressive", d.real != "autoregressive"
        student = Wanted("student_from", settings.student_config, why=why)
        out = {
            "student": student._replace(frozen="stage1", stage="teacher_forcing") if stage1 else student,
            "teacher": Wanted("teacher_from", teacher_config(settings), frozen="teacher" if teacher else "", why=why),
        }
        if (d.fake, d.real) == ("critic", "joint"):
            out["critic"] = Wanted("critic_from", settings.wan)
        return out

    def batch_shapes(self, settings: Settings, latent_shape, source: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Text rows alone: the student makes its own videos. With a loss that asks for samples, trajectories, too."""
        if not asks_for("samples", settings):
            return text_shape(settings)
        return super().batch_shapes(settings, latent_shape) | states_shape(settings, latent_shape, source)

    def check_source(self, settings: Settings, source: Any) -> None:
        """A loss that asks for samples needs data that holds trajectories."""
        if asks_for("samples", settings):
            check_trajectories(settings, source)

    def all_terms(self, settings: Settings) -> tuple[Term, ...]:
        """The student's losses, and the critic's where there is one."""
        return settings.terms + (critic_terms(settings) if settings.own["distill"].fake == "critic" else ())

    def costs(self, settings: Settings, stage: Stage, meter: Meter) -> dict[str, Cost]:
        """Floating-point operations of the generator's, the motion head's and the critic's part."""
        d: Distill = settings.own["distill"]
        cfg, frames, tokens, terms = stage.model.cfg, meter.frames, meter.tokens, settings.terms
        teacher, length = teacher_config(settings), d.frames or meter.frames

        def student(n: int = 1) -> flops.Flops:
            return flops.student(cfg, frames, tokens, n)

        own = flops.rollout(cfg, length, tokens, settings.plan, d.exit)
        real = {
            "joint": lambda: flops.teacher(teacher, frames, tokens),
            "autoregressive": student,
            "per_frame": lambda: flops.teacher(teacher, frames, tokens, frames) * (frames // cfg.chunk),
        }[d.real]() * (1 if d.guidance == 1.0 else 2)
        critic = stage.networks.get("critic")
        bidirectional = critic is not None and isinstance(critic.model, Teacher)
        fake = flops.teacher(settings.wan, frames, tokens) if bidirectional else student()
        fixed = own + real * score_calls(terms, "real", d.draws) + fake * score_calls(terms, "fake", d.draws)
        nets = total(map(student, draws(terms)))
        if d.pg == "rollout_full":
            act, epochs, repeated = flops.replay(cfg, length, tokens, d.exit), 1, 1  # every chunk is checkpointed
        else:
            act, epochs, repeated = flops.student(cfg, length, tokens), d.epochs if d.pg == "actor_critic" else 1, 0
        heads = sum("head" in asked(term.loss) for term in terms)
        fixed += motion_head.matched(settings.own["motion_head"], meter, d.draws) * heads
        judged = nets if d.pg == "actor_critic" else flops.Flops()  # once more for the loss, before the first epoch
        acting, losing = meter.cost(act * epochs, repeated=repeated), meter.cost(nets * epochs, fixed + judged)
        costs = {"dmd": Cost(*(a + b for a, b in zip(acting, losing, strict=True)))}
        if heads:
            costs["motion_head"] = motion_head.learnt(settings.own["motion_head"], meter, d.skip)
        if critic is not None:
            calls = draws(critic_terms(settings))
            learnt = [flops.teacher(settings.wan, frames * n, tokens) if bidirectional else student(n) for n in calls]
            costs["critic"] = meter.cost(total(learnt), own)
        return costs

    def sizes(self, settings: Settings) -> tuple[WanConfig, ...]:
        """Student and critic have one size, the teacher may have another."""
        return settings.wan, teacher_config(settings)

    def check_sources(self, settings: Settings, sources: Mapping[str, Any]) -> None:
        """A teacher that scores per frame was trained with a noise level per frame."""
        teacher = sources.get("teacher")
        if settings.own["distill"].real != "per_frame" or teacher is None or "source" in teacher.meta:
            return
        if not any(term.options.get("per_frame") for term in teacher.settings.terms):
            raise UserError(
                f"config.distill.real is 'per_frame', but the teacher {settings.teacher_from} was trained with one "
                f"noise level per video; train one with config.losses.flow_matching.options.per_frame=True or choose "
                f"another real."
            )

    def check_codec(self, settings: Settings, codec: VideoCodec) -> None:
        """A window of a longer rollout is a video like any other only where all latent frames are alike."""
        frames, of_data = settings.own["distill"].frames, settings.data.frames
        if frames > of_data and codec.temporal_stride > 1:
            raise UserError(
                f"config.distill.frames is {frames}, beyond config.data.frames = {of_data}: the scores would see "
                f"windows that begin with a latent of {codec.temporal_stride} frames of video, where every video they "
                f"were trained on begins with a latent of one; leave config.distill.frames at 0."
            )

    def build(self, settings: Settings, inputs: Inputs) -> Stage:
        """The student and, where they are asked for, the motion head and the critic, each with a part of its own."""
        d: Distill = settings.own["distill"]
        student = self.model(settings)
        critic, critic_net = critic_of(settings, student)
        shared = dict(
            seed=settings.seed,
            null_MC=jnp.asarray(inputs.null_MC),
            own=self_rollout(settings, student, inputs.latent_shape),
            prepare=looking_back(settings, student),
            text_dropout=settings.text_dropout,
            microbatches=settings.data.accumulate,
        )

        def due(step: int) -> bool:
            return step > d.critic_warmup and (step - d.critic_warmup - 1) % d.generator_every == 0

        updates = -(-(settings.steps - d.critic_warmup) // d.generator_every)
        update = own_update(settings, updates * (d.epochs if d.pg == "actor_critic" else 1))
        make_scores, heads = score_nets(settings, student, shared["null_MC"]), []
        networks = {"student": Network(student, update, start_from=("student", "teacher"))}
        if asks_for("head", settings):
            shape = (settings.data.batch, *inputs.latent_shape)
            head = motion_head.build(settings.own["motion_head"], shape, updates=updates, due=due, skip=d.skip)
            make_scores = motion_head.offered_by(head.network.model, make_scores)
            networks["motion_head"], heads = head.network, [head.part]
        generator = functools.partial(
            policy_gradient.generator_step,
            make_net=functools.partial(nets.student_net, student),
            make_scores=make_scores,
            make_pair=functools.partial(
                draw_pair,
                shift=d.shift,
                low=d.low,
                high=d.high,
                draws=d.draws,
                skip=d.skip,
                group=score_group(settings),
            ),
            terms=settings.terms,
            update=update,
            **shared,
        )
        call = _handing_on(generator)
        if asks_for("samples", settings):
            call = with_levels(call, settings, inputs.source)
        parts = [Part("dmd", due, call), *heads]
        if critic is not None:
            update = Update(optimizer_of(settings, settings.steps, "critic"))
            start = dict(start_from=("critic", "teacher")) if isinstance(critic, Teacher) else dict(copy_of="student")
            networks["critic"] = Network(critic, update, **start, part="critic")
            step = functools.partial(
                policy_gradient.critic_step, make_net=critic_net, terms=critic_terms(settings), update=update, **shared
            )
            # Each draws prompts of its own, as in Self-Forcing.
            parts = [part._replace(order="generator") for part in parts]
            parts.append(Part("critic", always, _handing_on(step), losses="config.critic.losses"))
        frozen = {name: compute_precision(tree, student.cfg.base.dtype) for name, tree in inputs.frozen.items()}
        return Stage(networks, frozen, tuple(parts))


def _handing_on(step: Callable) -> Callable:
    def call(state, frozen, batch, carry):
        state, metrics, *more = step(state, frozen, batch)
        return state, metrics, {**carry, **(more[0] if more else {})}

    return call


def asks_for(name: str, settings: Settings) -> bool:
    """Whether one of the student's losses asks the stage for it."""
    return any(name in asked(term.loss) for term in settings.terms)


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


def self_rollout(settings: Settings, student: StreamingModel, latent_shape) -> policy_gradient.SelfRollout:
    """How the student makes its own videos; context "fused" is rolled out as "clean", whose numbers are the same."""
    d: Distill = settings.own["distill"]
    fused = student.cfg.context == "fused"
    rolled = make_student(dataclasses.replace(student.cfg, context="clean")) if fused else student
    return policy_gradient.SelfRollout(
        make_streamer(rolled, settings.plan),
        tuple(latent_shape),
        d.frames or latent_shape[0],
        d.exit,
        ContextGrad(d.context_grad_etm, d.context_grad_sdd),
        d.pg,
        d.segment,
        d.epochs,
        d.anchor,
    )


def critic_of(settings: Settings, student: StreamingModel):
    """(the separate fake score, its ``make_net(params)``), or (None, None)."""
    d: Distill = settings.own["distill"]
    if d.fake != "critic":
        return None, None
    if d.real == "joint":
        teacher = Teacher(student.cfg.base)
        return teacher, functools.partial(nets.teacher_net, teacher)
    return student, functools.partial(nets.student_net, student)


def score_nets(settings: Settings, student: StreamingModel, null_MC) -> Callable:
    """``make_scores(state, frozen) -> {"real": net, "fake": net}`` of ``config.distill``."""
    d: Distill = settings.own["distill"]
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


def _check_teacher(d: Distill) -> None:
    if d.low > d.high:
        raise UserError(f"config.distill.low is {d.low}, above config.distill.high = {d.high}; exchange them.")
    if d.teacher_size and d.real == "autoregressive":
        raise UserError(
            f"config.distill.teacher_size is {d.teacher_size!r}, but real 'autoregressive' asks no teacher; leave it "
            f"empty."
        )


def _check_critic(settings: Settings, d: Distill) -> None:
    if not settings.student_from:
        raise UserError("config.student_from is empty; stage dmd starts from a stage-1 student, name its run.")
    if d.fake == "critic":
        critic_terms(settings)
    elif d.generator_every != 1 or d.critic_warmup:
        raise UserError(
            f"config.distill.fake is {d.fake!r}: there is no critic to update between generator updates; set "
            f"config.distill.generator_every=1 and config.distill.critic_warmup=0."
        )
    other_size = d.teacher_size and teacher_config(settings) != settings.wan
    if other_size and (d.fake, d.real) == ("critic", "joint") and not settings.critic_from:
        raise UserError(
            f"config.critic_from is empty, and the critic cannot start from a teacher of size {d.teacher_size!r}; name "
            f"the run of a teacher with the architecture of config.model."
        )
    if d.critic_warmup >= settings.steps:
        raise UserError(
            f"config.distill.critic_warmup is {d.critic_warmup}, config.steps {settings.steps}: the student would "
            f"never be updated; train longer or warm up less."
        )


def _check_gradient(settings: Settings, d: Distill) -> None:
    if d.pg == "actor_critic" and settings.data.accumulate > 1:
        raise UserError(
            "config.distill.pg is 'actor_critic', whose epochs need the gradient of the whole batch; set "
            "config.data.accumulate=1."
        )
    if d.pg == "rollout_full" and "none" in (d.context_grad_etm, d.context_grad_sdd):
        raise UserError(
            "config.distill.pg is 'rollout_full', which differentiates through the contexts; set "
            "config.distill.context_grad_etm=params and config.distill.context_grad_sdd=params."
        )
    if settings.student.context_weights == "own" and d.context_grad_sdd == "none":
        raise UserError(
            "config.student.context_weights is 'own', but with config.distill.context_grad_sdd = 'none' nothing trains "
            "the weights of the context pass; set config.distill.context_grad_sdd=params."
        )
    for key, pg in (("segment", "rollout_full"), ("epochs", "actor_critic"), ("anchor", "actor_critic")):
        value, default = getattr(d, key), getattr(Distill, key)
        if d.pg != pg and value != default:
            raise UserError(
                f"config.distill.{key} is {value}, but only config.distill.pg = {pg!r} uses it, not {d.pg!r}; leave it "
                f"at {default}."
            )
    if settings.student.kind == "causal" and d.context_grad_etm != "params":
        raise UserError(
            "config.distill.context_grad_etm is 'none', but a causal student has no ETM; leave it at 'params'."
        )


def _check_rollout(settings: Settings, d: Distill) -> None:
    chunk, of_data = settings.student.chunk, settings.data.frames
    frames = d.frames or of_data
    if frames < of_data or frames % chunk:
        raise UserError(
            f"config.distill.frames is {frames}; it must be 0 or a multiple of config.student.chunk = {chunk} from "
            f"config.data.frames = {of_data} on."
        )
    if frames > of_data and (d.real, d.fake) != ("joint", "critic"):
        raise UserError(
            f"config.distill.frames is {frames}, beyond config.data.frames = {of_data}: only real 'joint' and fake "
            f"'critic' can judge a window without what came before it."
        )
    if d.skip >= of_data:
        raise UserError(
            f"config.distill.skip is {d.skip}, which leaves none of the {of_data} frames that the scores see; use less."
        )
    if d.exit == "random_but_first" and len(settings.plan.sigmas) == 1:
        raise UserError(
            f"config.distill.exit is 'random_but_first', but config.sample.steps = {settings.sample.steps!r} is one "
            f"list, which the first chunk shares with all others; give the first a list of its own, such as "
            f"diagonal-4322222."
        )
    if len(settings.plan.sigmas) > frames // chunk:
        raise UserError(
            f"config.sample.steps has {len(settings.plan.sigmas)} different lists, but a rollout of {frames} frames "
            f"has {frames // chunk} chunks of {chunk}: the last lists would never be trained; give one per chunk, or "
            f"roll out more frames."
        )
    if d.segment and frames // chunk % d.segment:
        raise UserError(
            f"config.distill.segment is {d.segment}, which does not divide the {frames // chunk} chunks of a video."
        )


def _on_scores(loss: Callable) -> bool:
    """Whether a loss asks for what the scores say; others ask the student for velocities."""
    return any(name != "samples" for name in asked(loss))


def _check_motion(settings: Settings, d: Distill) -> None:
    each = max(settings.data.frames - d.skip - 1, 0)  # between frames that losses count
    compared = any(term.loss in (motion, motion_head_loss) for term in settings.terms)
    if (compared and not each) or (asks_for("head", settings) and settings.data.batch * each < 2):
        raise UserError(
            f"config.losses has a loss that compares motions, but a batch has {settings.data.batch * each}: "
            f"config.data.batch = {settings.data.batch}, config.data.frames = {settings.data.frames}, "
            f"config.distill.skip = {d.skip}; use more examples or more frames."
        )


def _check_scores(settings: Settings, d: Distill) -> None:
    on_scores = [_on_scores(term.loss) for term in settings.terms]
    if not any(on_scores):
        raise UserError("config.losses has no loss that asks for scores; stage dmd needs one, such as 'dmd'.")
    noise = settings.student.context_noise
    if noise and all(on_scores) and (d.real, d.fake) == ("joint", "critic"):
        raise UserError(
            f"config.student.context_noise is {noise}, but bidirectional scores see no history and no other loss asks "
            f"the student for a velocity; leave it at 0."
        )
    if d.fake == "self_fm" and all(asked(term.loss) for term in settings.terms):
        raise UserError(
            "config.distill.fake is 'self_fm', but nothing keeps the student a score of its own videos; add a term "
            "such as config.losses.own with the loss 'flow_matching'."
        )
    if d.fake == "stage1" and d.real == "autoregressive":
        raise UserError(
            "config.distill: real 'autoregressive' and fake 'stage1' are the same network: no gradient; change one."
        )


STAGE = Dmd()
