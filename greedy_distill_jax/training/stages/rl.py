"""Stage "rl" (stage 3): the student learns from rewards of its own long videos.

What it computes is in ``training.reinforce``; its keys and what they exclude are in ``rl_keys``, its networks and parts
here.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from greedy_distill_jax import cli, rewards
from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.config.settings import Settings, terms_of
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses import Term, asked, dpo_chunk, nft
from greedy_distill_jax.losses.rl.nft import check_gap
from greedy_distill_jax.models import flops
from greedy_distill_jax.models.students.base import ContextGrad
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.models.wan.linear import compute_precision
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.training import reinforce
from greedy_distill_jax.training.cost import Cost, Meter
from greedy_distill_jax.training.group import Group
from greedy_distill_jax.training.host_rewards import HostRewards
from greedy_distill_jax.training.sources import Wanted
from greedy_distill_jax.training.stages import dmd, scores
from greedy_distill_jax.training.stages.base import (
    Inputs,
    Network,
    Part,
    Stage,
    StageKind,
    always,
    own_update,
    text_shape,
)
from greedy_distill_jax.training.stages.rl_keys import (
    OFFERS,
    Rl,
    asks_of,
    check,
    clip_frames,
    needs_real,
    reward_terms,
    starts,
    stream_frames,
)
from greedy_distill_jax.training.update import Update

AT_REST = 8  # updates that may teach nothing before an average that is still the student is a mistake
DRAWN = (dpo_chunk, nft)  # losses that predict at inputs of their own, not at the recorded steps


class Reinforcement(StageKind):
    """See the module."""

    keys: ClassVar = {"rl": Rl, "distill": dmd.Distill, "critic": dmd.Critic}
    kept = (
        "rl.old_decay",
        *(f"distill.{key}" for key in ("real", "fake", "generator_every", "critic_warmup")),
        *(f"critic.optimizer.lora.{key}" for key in ("rank", "alpha", "targets")),
    )
    offers = OFFERS

    def check(self, settings: Settings) -> None:
        """Raises UserError for keys that exclude each other."""
        check(settings)

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
        """An averaged policy that is the current one teaches nothing; the first updates may have rate 0."""
        for term in settings.terms:
            if term.loss is nft and metrics.get(f"{term.name}/gap") == 0:
                updates = sum(_due(settings)(n) for n in range(1, step)) - settings.optimizer.warmup - AT_REST
                with cli.places(old_decay="config.rl.old_decay"):
                    check_gap(0.0, updates)

    def costs(self, settings: Settings, stage: Stage, meter: Meter) -> dict[str, Cost]:
        """Floating-point operations: of the longest stream's rollout, of the update, and of the critic's."""
        cfg, tokens, o, plan = stage.model.cfg, meter.tokens, settings.own["rl"], settings.plan
        asks, d = asks_of(settings), settings.own["distill"]
        length, clip, chunk = stream_frames(settings), clip_frames(settings), cfg.chunk
        before = length - clip - o.after
        whole = flops.rollout(cfg, length, tokens, plan, "last")
        past = flops.rollout(cfg, before, tokens, plan, "last") if before else flops.Flops()
        made = past + (whole + past * -1.0) * o.group
        # A pass over the clips: the caches of the past anew, once per prompt, then every chunk of every stream.
        etm, keys = flops.contexts(cfg, tokens)
        again, kept = flops.replay(cfg, clip, tokens, "random") * o.group, keys * (clip // chunk * o.group)
        behind = (flops.replay(cfg, 0, tokens, "random") + (etm + keys) * (before // chunk)) * (before > 0)
        learnt = again + kept * (-1.0 if d.context_grad_sdd == "none" else 0.0)
        calls = _passes(settings)
        others = sum(name in asked(term.loss) for term in settings.terms for name in ("old", "reference", "corrected"))
        fixed = (behind + again + learnt * -1.0) * calls + (behind + again) * others
        if "corrected" in asks:
            fixed += (etm + keys) * (o.keep * (clip // chunk) * o.group)
        if "pair" in asks:
            frames, teacher = meter.frames, scores.teacher_config(settings)
            real = flops.teacher(teacher, frames, tokens) * (1 if d.guidance == 1.0 else 2)
            fixed += (real + flops.teacher(settings.wan, frames, tokens)) * (d.draws * o.group)
        costs = {
            "rollout": meter.cost(flops.Flops(), made),
            "rl": meter.cost(learnt * (calls * o.epochs), fixed * o.epochs, repeated=1),
        }
        if "pair" in asks:
            costs["critic"] = scores.critic_cost(settings, stage.model, meter, whole)
        return costs

    def build(self, settings: Settings, inputs: Inputs) -> Stage:
        """A rollout, where they are asked rewards on the host, the update, and a critic's where scores are asked."""
        o: Rl = settings.own["rl"]
        student, asks, d = self.model(settings), asks_of(settings), settings.own["distill"]
        if "rewarded" in asks and inputs.codec is None:
            raise UserError(
                "a loss asks for 'rewarded', whose decoder is no part of a job that is only compiled; leave it out."
            )
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
            rewards.start(plan.terms)
            gives = {name: x for name, x in shapes.items() if name.startswith(reinforce.REWARD)}
            ask = HostRewards(plan.terms, o.group, o.failed, float(o.fps), o.staleness)
            parts.append(Part("rewards", due, ask, host=True, gives=gives))
        parts.append(Part("rl", due, learn, takes=shapes))
        if "pair" in asks:
            networks["critic"], critic = scores.critic_part(settings, student, inputs, stream_frames(settings))
            parts = [*(part._replace(order="generator") for part in parts), critic]  # each draws prompts of its own
        return Stage(networks, frozen, tuple(parts))


def episode_plan(settings: Settings, student, inputs: Inputs) -> reinforce.Plan:
    """How an episode is drawn and judged."""
    o: Rl = settings.own["rl"]
    clip, terms = clip_frames(settings), reward_terms(settings)
    own = Group(
        make_streamer(scores.unfused(student), settings.plan),
        stream_frames(settings),
        clip,
        o.after,
        o.given,
        o.group,
        o.spread,
    )
    (lowest, highest), window = starts(settings), o.window or clip + o.after
    if inputs.codec is not None and inputs.codec.temporal_stride > 1 and lowest < highest:  # room for its lead
        lowest = min(highest, max(lowest, -(-(reinforce.LEAD + window - clip - o.after) // settings.student.chunk)))
    return reinforce.Plan(
        own,
        tuple(inputs.latent_shape[1:]),
        lowest,
        highest,
        o.step,
        settings.data.frames,
        window,
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
    return shapes | {f"{reinforce.REWARD}{term.name}": numbers(streams) for term in plan.terms}


def _due(settings: Settings):
    """When the student is updated: in every step, or between the critic's as in stage dmd."""
    return scores.generator_due(settings) if "pair" in asks_of(settings) else always


def _passes(settings: Settings) -> int:
    """Differentiated passes over a clip: at the recorded steps, and at inputs that some losses draw for themselves."""
    drawn = [term.loss in DRAWN for term in settings.terms]
    return sum(drawn) + (not all(drawn))


STAGE = Reinforcement()
