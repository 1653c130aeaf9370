"""Stage "rl" (stage 3): the student learns from rewards of its own long videos.

What it computes is in ``training.reinforce``; here are its keys, what they exclude, and its networks.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from greedy_distill_jax import cli, rewards
from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.config.keys import Rewards
from greedy_distill_jax.config.settings import Settings, check_student, terms_of
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses import (
    Term,
    asked,
    cm_grpo,
    direct,
    dmd as dmd_loss,
    dpo_chunk,
    kl,
    motion,
    neighbor,
    nft,
    re_dmd,
    self_teacher,
)
from greedy_distill_jax.losses.rl.advantage import COMBINATIONS, MODES
from greedy_distill_jax.losses.rl.nft import check_gap
from greedy_distill_jax.models import flops
from greedy_distill_jax.models.students.base import ContextGrad
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.ranges import Count, Fraction, Momentum, Natural, Positive, one_of
from greedy_distill_jax.rewards import FAILED, RewardTerm
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.training import reinforce
from greedy_distill_jax.training.cost import Cost, Meter
from greedy_distill_jax.training.group import Group
from greedy_distill_jax.training.scoring import Scorer
from greedy_distill_jax.training.sources import Wanted
from greedy_distill_jax.training.stages import dmd, scores
from greedy_distill_jax.training.stages.base import (
    Inputs,
    Network,
    Part,
    Stage,
    StageKind,
    always,
    compute_precision,
    own_update,
    text_shape,
)
from greedy_distill_jax.training.update import Update

COMPARING = (cm_grpo, dpo_chunk, neighbor, nft)  # the streams of a group with one another
RANDOM = (cm_grpo,)  # losses that need the recorded step to be a random draw
REWARDED = (*COMPARING, re_dmd)
LOSSES = (*REWARDED, direct, dmd_loss, kl, motion, self_teacher)  # what they look at is known
DRAWN = (dpo_chunk, nft)  # losses that predict at inputs of their own, not at the recorded steps


@dataclasses.dataclass(frozen=True)
class Rl:
    """Keys of stage "rl"; lengths are latent frames."""

    rewards: Rewards = dataclasses.field(default_factory=dict)  # name in the logs -> a weighted reward, or a judge
    group: Count = 4  # streams per prompt: one past, each its own future; config.data.batch counts prompts
    frames: Natural = 0  # longest stream; 0 = four times data.frames
    clip: Natural = 0  # what a group's streams make apart and learn from; 0 = all: whole videos are compared
    after: Natural = 0  # frames behind the clip, which only rewards see
    window: Natural = 0  # last frames of the stream that rewards see; 0 = clip and after
    given: Natural = 0  # first frames of a stream that are taken from the data
    spread: Fraction = 1.0  # of a group's noise around that of its first stream; 1 = independent
    # Denoising step of every chunk that losses look at: random | stochastic (any but the last, whose result is not
    # random) | last.
    step: Annotated[str, one_of(*reinforce.STEPS)] = "random"
    epochs: Count = 1  # updates per episode
    growth: Positive = 1.0  # of a frame's weight in losses from chunk to chunk of the clip
    keep: Count = 1  # own chunks that stay behind every chunk where the rest of its history is replaced by real frames
    old_decay: Momentum = 0.9  # of the averaged policy, for losses that ask for "old"
    # What several rewards say together: normalise_then_sum | sum_then_normalise | advantage_sum.
    combine: Annotated[str, one_of(*COMBINATIONS)] = "normalise_then_sum"
    advantage: Annotated[str, one_of(*MODES)] = "std"  # what differences within a group are divided by
    limit: Positive = 5.0  # of an advantage's size
    failed: Annotated[str, one_of(*FAILED)] = "mask"  # a video that cannot be judged: mask (left out) | stop
    # Rewards on the host: 1 = an update learns from the episode before, whose judgement meanwhile ran beside the next
    # rollout; 0 = from the newest.
    staleness: Annotated[int, one_of(0, 1)] = 0


class Reinforcement(StageKind):
    """See the module."""

    keys: ClassVar = {"rl": Rl, "distill": dmd.Distill, "critic": dmd.Critic}
    kept = (
        "rl.old_decay",
        *(f"distill.{key}" for key in ("real", "fake", "generator_every", "critic_warmup")),
        *(f"critic.optimizer.lora.{key}" for key in ("rank", "alpha", "targets")),
    )
    offers = ("episode", "current", "old", "reference", "corrected", "rewarded", "pair")

    def check(self, settings: Settings) -> None:
        """Raises UserError for keys that exclude each other."""
        check_student(settings)
        _check_start(settings)
        _check_lengths(settings)
        _check_losses(settings)
        _check_rewards(settings)
        if "pair" in asks_of(settings):
            _check_scores(settings)
        else:
            _check_unused(settings)

    def terms(self, settings: Settings) -> tuple[Term, ...]:
        """The student's losses."""
        return terms_of(settings.losses, "config.losses", settings, offered=self.offers, chunk_of=lambda loss: None)

    def all_terms(self, settings: Settings) -> tuple[Term, ...]:
        """The student's losses, and the critic's where there is one."""
        return settings.terms + (scores.critic_terms(settings) if "pair" in asks_of(settings) else ())

    def wanted(self, settings: Settings) -> dict[str, Wanted]:
        """The student to start from, frozen where a loss asks for the reference; with scores their networks."""
        asks = asks_of(settings)
        frozen = "reference" if "reference" in asks else ""
        out = {"student": Wanted("student_from", settings.student_config, frozen, "a loss that asks for 'reference'")}
        if "pair" in asks:
            why = "a loss that asks for scores"
            out["teacher"] = Wanted("teacher_from", scores.teacher_config(settings), frozen="teacher", why=why)
            out["critic"] = Wanted("critic_from", settings.wan)
        return out

    def batch_shapes(self, settings: Settings, latent_shape, source: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Text rows alone, and whole real streams where those are looked at."""
        shape = (settings.data.batch, stream_frames(settings), *latent_shape[1:])
        real = {"latents": jax.ShapeDtypeStruct(shape, jnp.float32)} if needs_real(settings) else {}
        return text_shape(settings) | real

    def example_frames(self, settings: Settings) -> int:
        """Those of a stream, where real ones are looked at."""
        return stream_frames(settings) if needs_real(settings) else settings.data.frames

    def sizes(self, settings: Settings) -> tuple[WanConfig, ...]:
        """Student and critic have one size, the teacher may have another."""
        return (settings.wan, scores.teacher_config(settings)) if "pair" in asks_of(settings) else (settings.wan,)

    def check_codec(self, settings: Settings, codec: VideoCodec) -> None:
        """Scores judge windows of long streams, which are videos like any other only where all latents are alike."""
        if "pair" in asks_of(settings) and stream_frames(settings) > settings.data.frames:
            scores.check_windows(codec, "config.rl.frames", stream_frames(settings), settings.data.frames)

    def check_metrics(self, settings: Settings, step: int, metrics: Mapping[str, float]) -> None:
        """An averaged policy that is the current one teaches nothing; a first update may be at rate 0."""
        updates = sum(_due(settings)(n) for n in range(1, step)) - (settings.optimizer.warmup > 0)
        for term in settings.terms:
            if term.loss is nft and f"{term.name}/gap" in metrics:
                with cli.places(old_decay="config.rl.old_decay"):
                    check_gap(metrics[f"{term.name}/gap"], updates)

    def costs(self, settings: Settings, stage: Stage, meter: Meter) -> dict[str, Cost]:
        """Floating-point operations: of the longest stream's rollout, of the update, and of the critic's."""
        cfg, tokens, o, plan = stage.model.cfg, meter.tokens, settings.own["rl"], settings.plan
        asks, calls = asks_of(settings), _passes(settings)
        length, clip = stream_frames(settings), clip_frames(settings)
        whole = flops.rollout(cfg, length, tokens, plan, "last")
        past = flops.rollout(cfg, length - clip - o.after, tokens, plan, "last") if length > clip + o.after else None
        made = whole * o.group if past is None else past + (whole + past * -1.0) * o.group
        again = flops.replay(cfg, clip, tokens, "last") * o.group
        fixed = again * len(asks & {"old", "reference", "corrected"})
        if "pair" in asks:
            frames = meter.frames * o.group
            teacher, d = scores.teacher_config(settings), settings.own["distill"]
            fixed += flops.teacher(teacher, frames, tokens) * (d.draws * (1 if d.guidance == 1.0 else 2))
            fixed += flops.teacher(settings.wan, frames, tokens) * d.draws
        costs = {
            "rollout": meter.cost(flops.Flops(), made),
            "rl": meter.cost(again * (calls * o.epochs), fixed * o.epochs, repeated=1),
        }
        if "pair" in asks:
            costs["critic"] = scores.critic_cost(settings, stage.model, meter, whole)
        return costs

    def build(self, settings: Settings, inputs: Inputs) -> Stage:
        """A rollout, where they are asked rewards on the host, the update, and a critic's where scores are asked."""
        o: Rl = settings.own["rl"]
        student, asks, d = self.model(settings), asks_of(settings), settings.own["distill"]
        plan = episode_plan(settings, student, inputs)
        due, null_MC = _due(settings), jnp.asarray(inputs.null_MC)
        updates = sum(due(step) for step in range(1, settings.steps + 1)) * o.epochs
        update = own_update(settings, updates)
        networks = {"student": Network(student, update, start_from=("student",), part="rl")}
        frozen = {name: compute_precision(tree, student.cfg.base.dtype) for name, tree in inputs.frozen.items()}
        if "old" in asks:
            networks["old"] = Network(student, Update(optax.set_to_zero()), copy_of="student", part="rl")
        if plan.codec is not None:
            frozen["codec"] = jax.tree.map(jnp.asarray, inputs.codec.params)
        shared = dict(seed=settings.seed, plan=plan, microbatches=settings.data.accumulate)
        judging = {}
        if "pair" in asks:
            judging = dict(
                make_scores=scores.score_nets(settings, student, null_MC),
                make_pair=scores.pair_of(settings),
                scored=settings.data.frames,
            )
        learn = functools.partial(
            reinforce.learn_step,
            grads=ContextGrad(d.context_grad_etm, d.context_grad_sdd),
            terms=settings.terms,
            update=update,
            keep=o.keep,
            growth=o.growth,
            epochs=o.epochs,
            old_decay=o.old_decay,
            **judging,
            **shared,
        )
        parts = [Part("rollout", due, functools.partial(reinforce.rollout_step, **shared))]
        shapes = episode_shapes(settings, plan)
        if plan.on_host:
            terms = tuple(term for term in plan.terms if term.reward.kind != "jax")
            rewards.start(terms)
            gives = {name: x for name, x in shapes.items() if name.startswith("rewards/")}
            scorer = Scorer(terms, o.group, o.failed, float(settings.log.fps), o.staleness)
            parts.append(Part("rewards", due, scorer, host=True, gives=gives))
        parts.append(Part("rl", due, learn, takes=shapes))
        if "pair" in asks:
            networks["critic"], critic = scores.critic_part(settings, student, inputs, stream_frames(settings))
            parts = [*(part._replace(order="generator") for part in parts), critic]  # each draws prompts of its own
        return Stage(networks, frozen, tuple(parts))


def asks_of(settings: Settings) -> set[str]:
    """What the losses ask the stage for."""
    return {name for term in settings.terms for name in asked(term.loss)}


def stream_frames(settings: Settings) -> int:
    """Latent frames of the longest stream."""
    return settings.own["rl"].frames or 4 * settings.data.frames


def clip_frames(settings: Settings) -> int:
    """Latent frames that streams of a group make apart."""
    o: Rl = settings.own["rl"]
    return o.clip or stream_frames(settings) - o.after


def needs_real(settings: Settings) -> bool:
    """Whether it looks at real videos as long as its streams."""
    return settings.own["rl"].given > 0 or "corrected" in asks_of(settings)


def reward_terms(settings: Settings) -> tuple[RewardTerm, ...]:
    """The rewards that the configuration names."""
    out = []
    for name, given in settings.own["rl"].rewards.items():
        path = f"config.rl.rewards.{name}"
        with cli.places(**{field: f"{path}.{field}" for field in ("reward", "options", "low")}):
            found = rewards.resolve(given.reward)
            rewards.check_options(given.reward, found, given.options)
            low, high = -math.inf if given.low is None else given.low, math.inf if given.high is None else given.high
            out.append(RewardTerm(name, found, given.weight, given.judge, low, high, given.options, path))
    return tuple(out)


def episode_plan(settings: Settings, student, inputs: Inputs) -> reinforce.Plan:
    """How an episode is drawn and judged; context "fused" is rolled out as "clean", whose numbers are the same."""
    o: Rl = settings.own["rl"]
    if student.cfg.context == "fused":
        student = make_student(dataclasses.replace(student.cfg, context="clean"))
    clip, terms = clip_frames(settings), reward_terms(settings)
    own = Group(
        make_streamer(student, settings.plan), stream_frames(settings), clip, o.after, o.given, o.group, o.spread
    )
    lowest, highest = _starts(settings)
    return reinforce.Plan(
        own,
        tuple(inputs.latent_shape[1:]),
        lowest,
        highest,
        o.step,
        settings.data.frames,
        o.window or clip + o.after,
        inputs.codec if terms else None,
        terms,
        o.combine,
        o.advantage,
        o.limit,
    )


def episode_shapes(settings: Settings, plan: reinforce.Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """What the rollout and the rewards hand on to the update, as shapes."""
    own, streams = plan.own, settings.data.batch * plan.own.group

    def video(frames: int):
        return jax.ShapeDtypeStruct((streams, frames, *plan.latent_shape), jnp.float32)

    def numbers(*shape: int):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    text = text_shape(settings)
    if needs_real(settings):
        shape = (settings.data.batch, own.frames, *plan.latent_shape)
        text |= {"latents": jax.ShapeDtypeStruct(shape, jnp.float32)}
    shapes = text | {"frames": video(own.frames), "visited": video(own.clip), "following": video(own.clip)}
    shapes |= {
        "sigma": numbers(own.clip),
        "next_sigma": numbers(own.clip),
        "start": jax.ShapeDtypeStruct((), jnp.int32),
    }
    if not own.streamer.plan.keeps_clean:
        shapes["noise"] = video(own.frames)
    if own.streamer.cfg.context == "last_step_kv":
        shapes |= {"kept_input": video(own.frames), "kept_sigma": numbers(own.frames)}
    return shapes | {f"rewards/{term.name}": numbers(streams) for term in plan.terms}


def _due(settings: Settings):
    """When the student is updated: in every step, or between the critic's as in stage dmd."""
    return scores.generator_due(settings) if "pair" in asks_of(settings) else always


def _passes(settings: Settings) -> int:
    """Differentiated passes over a clip: at the recorded steps, and at inputs that some losses draw for themselves."""
    drawn = [term.loss in DRAWN for term in settings.terms]
    return sum(drawn) + (not all(drawn))


def _starts(settings: Settings) -> tuple[int, int]:
    """Fewest and most chunks before the streams of a group part."""
    o, chunk = settings.own["rl"], settings.student.chunk
    made = clip_frames(settings) + o.after
    kept = o.keep * chunk if "corrected" in asks_of(settings) else 0
    lowest = max(o.given, kept, settings.data.frames - made, o.window - made)
    return -(-lowest // chunk), (stream_frames(settings) - made) // chunk


def _check_start(settings: Settings) -> None:
    if not settings.student_from:
        raise UserError("config.student_from is empty; stage rl starts from a trained student, name its run.")
    if settings.text_dropout:
        raise UserError(
            f"config.text_dropout is {settings.text_dropout}, but rewards judge what a prompt asks for; set "
            f"config.text_dropout=0."
        )
    dmd.check_contexts(settings)


def _check_lengths(settings: Settings) -> None:
    o, chunk, frames, clip = settings.own["rl"], settings.student.chunk, stream_frames(settings), clip_frames(settings)
    for name in ("frames", "clip", "after", "window", "given"):
        if getattr(o, name) % chunk:
            raise UserError(
                f"config.rl.{name} is {getattr(o, name)}, which does not divide into chunks of config.student.chunk = "
                f"{chunk}; choose a multiple."
            )
    if frames < settings.data.frames:
        raise UserError(
            f"config.rl.frames is {frames}, less than config.data.frames = {settings.data.frames}; learn from streams "
            f"that are at least as long as the videos of training."
        )
    lowest, highest = _starts(settings)
    if clip < chunk or lowest > highest:
        raise UserError(
            f"a stream of {frames} frames (config.rl.frames) has no room for config.rl.given = {o.given}, "
            f"config.rl.clip = {clip}, config.rl.after = {o.after} and config.rl.window = {o.window}; make it longer, "
            f"or these shorter."
        )
    if len(settings.plan.sigmas) > frames // chunk:
        raise UserError(
            f"config.sample.steps has {len(settings.plan.sigmas)} different lists, but a stream of {frames} frames has "
            f"{frames // chunk} chunks of {chunk}; give one per chunk, or make longer streams."
        )


def _check_losses(settings: Settings) -> None:
    o, asks = settings.own["rl"], asks_of(settings)
    for term in settings.terms:
        if not asked(term.loss):
            raise UserError(
                f"{term.place}: the loss asks the stage for nothing, and stage rl has no velocity to give it; use one "
                f"that asks for {', '.join(Reinforcement.offers)}."
            )
        if term.loss in COMPARING and o.group < 2:
            raise UserError(f"config.rl.group is {o.group}, but {term.place} compares streams; use 2 or more.")
        if term.loss in RANDOM and (settings.sample.sampler != "renoise" or o.step != "stochastic"):
            raise UserError(
                f"{term.place} takes a denoising step for a random draw; set config.sample.sampler=renoise and "
                f"config.rl.step=stochastic (they are {settings.sample.sampler!r} and {o.step!r})."
            )
        if term.loss is neighbor and o.spread == 1.0:
            raise UserError(
                f"config.rl.spread is 1, but {term.place} learns from streams around that of its group's noise; use "
                f"less, such as 0.3."
            )
        if term.loss is nft and o.old_decay == 0.0:
            raise UserError(
                f"config.rl.old_decay is 0: the averaged policy would be the student itself, and {term.place} "
                f"compares them; use more, such as 0.9."
            )
    if o.step == "stochastic" and min(settings.plan.lengths) < 2:
        raise UserError(
            f"config.rl.step is 'stochastic', but config.sample.steps = {settings.sample.steps!r} has a list of a "
            f"single step, whose result is not random; use more steps."
        )
    if "corrected" in asks and not o.given:
        raise UserError(
            "config.rl.given is 0, but a loss asks for 'corrected': real videos can stand in place of a stream's own "
            "frames only where both begin alike; set config.rl.given to one chunk or more."
        )
    if "corrected" not in asks and o.keep != Rl.keep:
        raise UserError(
            f"config.rl.keep is {o.keep}, but no loss asks for 'corrected', which alone uses it; leave it at {Rl.keep}."
        )


def _check_rewards(settings: Settings) -> None:
    o, asks, terms = settings.own["rl"], asks_of(settings), reward_terms(settings)
    optimised = [term for term in terms if not term.judge]
    by_reward = [term for term in settings.terms if term.loss in REWARDED or "rewarded" in asked(term.loss)]
    if by_reward and not optimised:
        raise UserError(
            f"config.rl.rewards has nothing that {by_reward[0].place} could raise; name a reward that is no judge."
        )
    known = all(term.loss in LOSSES for term in settings.terms)  # what a user's own loss looks at is not known
    if optimised and known and not by_reward:
        raise UserError(
            f"{optimised[0].place} is optimised by no loss of config.losses; set {optimised[0].place}.judge=True."
        )
    for term in optimised if "rewarded" in asks else ():
        if not term.reward.differentiable:
            raise UserError(
                f"{term.place}: {term.reward.name!r} has no gradient, but a loss asks for one ('rewarded'); make it a "
                f"judge, or learn by another loss."
            )
    host = any(term.reward.kind != "jax" for term in terms)
    for key in ("staleness", "failed"):
        if not host and getattr(o, key) != getattr(Rl, key):
            raise UserError(
                f"config.rl.{key} is {getattr(o, key)!r}, but no reward runs on the host, which alone uses it; leave "
                f"it at {getattr(Rl, key)!r}."
            )


def _check_scores(settings: Settings) -> None:
    d, o = settings.own["distill"], settings.own["rl"]
    if (d.real, d.fake) != ("joint", "critic"):
        raise UserError(
            f"config.distill: real {d.real!r} and fake {d.fake!r} are of stage dmd; stage rl has 'joint' and 'critic', "
            f"which can judge a window without what came before it."
        )
    if clip_frames(settings) < settings.data.frames:
        raise UserError(
            f"config.rl.clip is {o.clip}, but the scores see the last config.data.frames = {settings.data.frames} "
            f"frames of it; make it as long, or leave out the loss that asks for scores."
        )
    for name in ("frames", "pg", "segment", "epochs", "anchor"):
        if getattr(d, name) != getattr(dmd.Distill, name):
            raise UserError(
                f"config.distill.{name} is {getattr(d, name)!r}, but stage rl does not use it; leave it at "
                f"{getattr(dmd.Distill, name)!r}."
            )
    dmd.check_critic(settings)


def _check_unused(settings: Settings) -> None:
    """Without a loss that asks for scores, only the context gradients of their keys are used."""
    for group, default in (("distill", dmd.Distill()), ("critic", dmd.Critic())):
        for field in dataclasses.fields(default):
            value, unset = getattr(settings.own[group], field.name), getattr(default, field.name)
            if value != unset and not field.name.startswith("context_grad") and field.name != "shift":
                raise UserError(
                    f"config.{group}.{field.name} is changed, but no loss asks for 'pair', which alone uses it; leave "
                    f"it as it is."
                )


STAGE = Reinforcement()
