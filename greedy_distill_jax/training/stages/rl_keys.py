"""Keys of stage "rl": what they are, what follows from them, and what they exclude."""

import dataclasses
import math
from typing import Annotated

from greedy_distill_jax import cli, rewards
from greedy_distill_jax.cli import extensions
from greedy_distill_jax.config.keys import Rewards
from greedy_distill_jax.config.settings import Settings, check_student
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses import (
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
from greedy_distill_jax.ranges import Count, FrameRate, Momentum, Natural, NoiseLevel, Positive, between, one_of
from greedy_distill_jax.rewards import FAILED, RewardTerm
from greedy_distill_jax.training import reinforce
from greedy_distill_jax.training.stages import dmd, scores

COMPARING = (cm_grpo, dpo_chunk, neighbor, nft)  # the streams of a group with one another
RANDOM = (cm_grpo,)  # losses that need the recorded step to be a random draw
OF_RATIO = (cm_grpo, neighbor)  # losses of a ratio to the policy that made the episode
REWARDED = (*COMPARING, re_dmd)
LOSSES = (*REWARDED, direct, dmd_loss, kl, motion, self_teacher)  # what they look at is known
OFFERS = ("episode", "current", "old", "reference", "corrected", "rewarded", "pair")


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
    spread: NoiseLevel = 1.0  # of a group's noise around that of its first stream; 1 = independent
    # Denoising step of every chunk that losses look at: random | stochastic (any but the last, whose result is not
    # random) | last.
    step: Annotated[str, one_of(*reinforce.STEPS)] = "random"
    epochs: Count = 1  # updates per episode
    growth: Positive = 1.0  # of a frame's weight in losses from chunk to chunk of the clip
    keep: Count = 1  # own chunks that stay behind every chunk where the rest of its history is replaced by real frames
    old_decay: Momentum = 0.9  # of the averaged policy, for losses that ask for "old"
    fps: FrameRate = 16.0  # frames of video per second, which rewards on the host are told
    # What several rewards say together: normalise_then_sum | sum_then_normalise | advantage_sum.
    combine: Annotated[str, one_of(*COMBINATIONS)] = "normalise_then_sum"
    advantage: Annotated[str, one_of(*MODES)] = "std"  # what differences within a group are divided by
    limit: Positive = 5.0  # of an advantage's size
    failed: Annotated[str, one_of(*FAILED)] = "mask"  # a video that cannot be judged: mask (left out) | stop
    # Rewards on the host: 1 = an update learns from the episode before, whose judgement meanwhile ran beside the next
    # rollout; 0 = from the newest.
    staleness: Annotated[int, between(0, 1)] = 0


def check(settings: Settings) -> None:
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


def starts(settings: Settings) -> tuple[int, int]:
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
    lowest, highest = starts(settings)
    if clip < chunk or lowest > highest:
        raise UserError(
            f"a stream of {frames} frames (config.rl.frames) has no room for config.rl.given = {o.given}, "
            f"config.rl.clip = {clip}, config.rl.after = {o.after} and config.rl.window = {o.window}; make it longer, "
            f"or these shorter."
        )
    scores.check_lists(settings, frames)


def _check_losses(settings: Settings) -> None:
    o, asks = settings.own["rl"], asks_of(settings)
    for term in settings.terms:
        if not asked(term.loss):
            raise UserError(
                f"{term.place}: the loss asks the stage for nothing, and stage rl has no velocity to give it; use one "
                f"that asks for {', '.join(OFFERS)}."
            )
        if term.loss in COMPARING and o.group < 2:
            raise UserError(f"config.rl.group is {o.group}, but {term.place} compares streams; use 2 or more.")
        if term.loss in RANDOM and (settings.sample.sampler != "renoise" or o.step != "stochastic"):
            raise UserError(
                f"{term.place} takes a denoising step for a random draw; set config.sample.sampler=renoise and "
                f"config.rl.step=stochastic (they are {settings.sample.sampler!r} and {o.step!r})."
            )
        ratio = term.loss in OF_RATIO and (extensions.defaults(term.loss) | term.options)["clip"]
        if ratio and o.staleness:
            raise UserError(
                f"config.rl.staleness is 1, but {term.place} takes the student for the policy that made its episode; "
                f"leave it at 0."
            )
        if term.loss is cm_grpo and ratio and o.epochs == 1:
            raise UserError(
                f"{term.place}.options.clip is {ratio}, but with config.rl.epochs = 1 an episode is learnt from once, "
                f"by the policy that made it; leave it at 0, or raise config.rl.epochs."
            )
        if term.loss is kl and settings.sample.sampler != "renoise":
            raise UserError(
                f"{term.place} compares steps as random draws, but config.sample.sampler is "
                f"{settings.sample.sampler!r}, which draws nothing; set it to renoise."
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
    dmd.check_motion(settings)


def _check_unused(settings: Settings) -> None:
    """Without a loss that asks for scores, only the context gradients of their keys are used."""
    for group, default in (("distill", dmd.Distill()), ("critic", dmd.Critic())):
        for field in dataclasses.fields(default):
            value, unset = getattr(settings.own[group], field.name), getattr(default, field.name)
            unset = settings.shift if field.name == "shift" else unset
            if value != unset and not field.name.startswith("context_grad"):
                raise UserError(
                    f"config.{group}.{field.name} is changed, but no loss asks for 'pair', which alone uses it; leave "
                    f"it as it is."
                )
