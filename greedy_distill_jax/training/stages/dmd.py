"""Stage "dmd" (stage 2): the student on its own videos, matched to the teacher's distribution.

What it computes is in ``training.policy_gradient``; here are its keys, what they exclude, and its networks.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import jax

from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.config.keys import Losses, TransformerOptimizer, flow_matching_alone
from greedy_distill_jax.config.settings import Settings, check_student, terms_of
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses import Term, asked, motion, motion_head as motion_head_loss
from greedy_distill_jax.models import flops
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.models.wan.linear import compute_precision
from greedy_distill_jax.ranges import Count, Natural, NoiseLevel, NotNegative, Positive, between, one_of
from greedy_distill_jax.training import motion_head, nets, policy_gradient, rollout
from greedy_distill_jax.training.cost import Cost, Meter, draws, score_calls, total
from greedy_distill_jax.training.sources import Wanted
from greedy_distill_jax.training.stages import scores
from greedy_distill_jax.training.stages.base import (
    Inputs,
    Network,
    Part,
    Stage,
    StageKind,
    own_update,
    text_shape,
)
from greedy_distill_jax.training.stages.ode import check_trajectories, states_shape, with_levels

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
        if not settings.student_from:
            raise UserError("config.student_from is empty; stage dmd starts from a stage-1 student, name its run.")
        check_critic(settings)
        _check_gradient(settings, d)
        _check_rollout(settings, d)
        _check_scores(settings, d)
        check_motion(settings)

    def terms(self, settings: Settings) -> tuple[Term, ...]:
        """The student's losses; one that asks a bidirectional teacher for scores keeps one noise level per video."""
        chunk = scores.score_group(settings)
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
            "teacher": Wanted(
                "teacher_from", scores.teacher_config(settings), frozen="teacher" if teacher else "", why=why
            ),
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
        return settings.terms + (scores.critic_terms(settings) if settings.own["distill"].fake == "critic" else ())

    def costs(self, settings: Settings, stage: Stage, meter: Meter) -> dict[str, Cost]:
        """Floating-point operations of the generator's, the motion head's and the critic's part."""
        d: Distill = settings.own["distill"]
        cfg, frames, tokens, terms = stage.model.cfg, meter.frames, meter.tokens, settings.terms
        teacher, length = scores.teacher_config(settings), d.frames or meter.frames

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
            costs["critic"] = scores.critic_cost(settings, stage.model, meter, own)
        return costs

    def sizes(self, settings: Settings) -> tuple[WanConfig, ...]:
        """Student and critic have one size, the teacher may have another."""
        return settings.wan, scores.teacher_config(settings)

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
        """Longer rollouts are judged by windows."""
        scores.check_windows(codec, "config.distill.frames", settings.own["distill"].frames, settings.data.frames)

    def build(self, settings: Settings, inputs: Inputs) -> Stage:
        """The student and, where they are asked for, the motion head and the critic, each with a part of its own."""
        d: Distill = settings.own["distill"]
        student = self.model(settings)
        shared, due = scores.shared_by_parts(settings, student, inputs), scores.generator_due(settings)
        updates = sum(due(step) for step in range(1, settings.steps + 1))
        update = own_update(settings, updates * (d.epochs if d.pg == "actor_critic" else 1))
        make_scores, heads = scores.score_nets(settings, student, shared["null_MC"]), []
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
            make_pair=scores.pair_of(settings),
            terms=settings.terms,
            update=update,
            **shared,
        )
        call = scores.handing_on(generator)
        if asks_for("samples", settings):
            call = with_levels(call, settings, inputs.source)
        parts, critic = [Part("dmd", due, call), *heads], scores.critic_part(settings, student, inputs)
        if critic is not None:
            networks["critic"], part = critic
            parts = [*(each._replace(order="generator") for each in parts), part]  # each draws prompts of its own
        frozen = {name: compute_precision(tree, student.cfg.base.dtype) for name, tree in inputs.frozen.items()}
        return Stage(networks, frozen, tuple(parts))


def asks_for(name: str, settings: Settings) -> bool:
    """Whether one of the student's losses asks the stage for it."""
    return any(name in asked(term.loss) for term in settings.terms)


def check_critic(settings: Settings) -> None:
    """Raises UserError for scores, and a critic, that cannot be."""
    d: Distill = settings.own["distill"]
    if d.low > d.high:
        raise UserError(f"config.distill.low is {d.low}, above config.distill.high = {d.high}; exchange them.")
    if d.teacher_size and d.real == "autoregressive":
        raise UserError(
            f"config.distill.teacher_size is {d.teacher_size!r}, but real 'autoregressive' asks no teacher; leave it "
            f"empty."
        )
    if d.fake == "critic":
        scores.critic_terms(settings)
    elif d.generator_every != 1 or d.critic_warmup:
        raise UserError(
            f"config.distill.fake is {d.fake!r}: there is no critic to update between generator updates; set "
            f"config.distill.generator_every=1 and config.distill.critic_warmup=0."
        )
    other_size = d.teacher_size and scores.teacher_config(settings) != settings.wan
    if other_size and (d.fake, d.real) == ("critic", "joint") and not settings.critic_from:
        raise UserError(
            f"config.critic_from is empty, and the critic cannot start from a teacher of size {d.teacher_size!r}; name "
            f"the run of a teacher with the architecture of config.model."
        )
    if d.skip >= settings.data.frames:
        raise UserError(
            f"config.distill.skip is {d.skip}, which leaves none of the {settings.data.frames} frames that the scores "
            f"see; use less."
        )
    if d.exit == "random_but_first" and len(settings.plan.sigmas) == 1:
        raise UserError(
            f"config.distill.exit is 'random_but_first', but config.sample.steps = {settings.sample.steps!r} is one "
            f"list, which the first chunk shares with all others; give the first a list of its own, such as "
            f"diagonal-4322222."
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
    check_contexts(settings)
    for key, pg in (("segment", "rollout_full"), ("epochs", "actor_critic"), ("anchor", "actor_critic")):
        value, default = getattr(d, key), getattr(Distill, key)
        if d.pg != pg and value != default:
            raise UserError(
                f"config.distill.{key} is {value}, but only config.distill.pg = {pg!r} uses it, not {d.pg!r}; leave it "
                f"at {default}."
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
    scores.check_lists(settings, frames)
    if d.segment and frames // chunk % d.segment:
        raise UserError(
            f"config.distill.segment is {d.segment}, which does not divide the {frames // chunk} chunks of a video."
        )


def _on_scores(loss: Callable) -> bool:
    """Whether a loss asks for what the scores say; others ask the student for velocities."""
    return any(name != "samples" for name in asked(loss))


def check_motion(settings: Settings) -> None:
    """Raises UserError for a loss that compares motions where a batch has none to compare."""
    d: Distill = settings.own["distill"]
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


def check_contexts(settings: Settings) -> None:
    """Raises UserError for context gradients that the student has no use for, or cannot do without."""
    d: Distill = settings.own["distill"]
    if settings.student.context_weights == "own" and d.context_grad_sdd == "none":
        raise UserError(
            "config.student.context_weights is 'own', but with config.distill.context_grad_sdd = 'none' nothing trains "
            "the weights of the context pass; set config.distill.context_grad_sdd=params."
        )
    if settings.student.kind == "causal" and d.context_grad_etm != "params":
        raise UserError(
            "config.distill.context_grad_etm is 'none', but a causal student has no ETM; leave it at 'params'."
        )


STAGE = Dmd()
