"""Stage "rl" as pure step functions: groups of streams, what they are worth, the update (docs/method.md, section 10).

The rollout and the update are separate parts of a step (``stages/rl.py``): between them rewards on the host may judge
what was made. All losses of an update share its episode.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int32

from greedy_distill_jax import rewards
from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.distribution import parallel
from greedy_distill_jax.losses import Term, asked
from greedy_distill_jax.losses.rl.advantage import combine
from greedy_distill_jax.losses.rl.episode import Episode
from greedy_distill_jax.models.students.base import ContextGrad
from greedy_distill_jax.rewards import RewardTerm, View
from greedy_distill_jax.training import group
from greedy_distill_jax.training.group import CONSTANT, Group, Videos
from greedy_distill_jax.training.metrics import UNKNOWN
from greedy_distill_jax.training.state import TrainState
from greedy_distill_jax.training.update import (
    Update,
    accumulate,
    logged,
    norms,
    settle,
    total_loss,
    value_and_gradients,
)

LEAD = 4  # latent frames decoded before a window, for a decoder that looks back; then its frames are those of the whole
REWARD = "rewards/"  # before a reward's name in what parts hand on
STEPS = ("random", "stochastic", "last")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How an episode is drawn and judged.

    own: the groups. lowest, highest: chunks before a group's streams part, drawn between them once per update.
    step: which denoising step of every chunk is recorded, see ``draw_step``. first: latent frames that drift is
    measured against. window: last latent frames of a stream that are judged. codec: makes pixels of them; None where
    nothing is judged. terms: all rewards. how, scale, limit: see ``losses.rl.advantage.combine``.
    """

    own: Group
    latent_shape: tuple[int, int, int]
    lowest: int
    highest: int
    step: str
    first: int
    window: int
    codec: VideoCodec | None
    terms: tuple[RewardTerm, ...]
    how: str = "normalise_then_sum"
    scale: str = "std"
    limit: float = 5.0

    @property
    def on_host(self) -> bool:
        """Whether a reward needs the frames on the host."""
        return any(term.reward.kind != "jax" for term in self.terms)

    def views(self, codec_params: Any, frames_BFHWC: Float32[Array, "B F H W C"], start: Int32[Array, ""]) -> View:
        """Pixels of the window of every stream, and of its first frames."""
        apart, stride = self.own.clip + self.own.after, self.codec.temporal_stride
        end = start * self.own.chunk + apart
        lead = min(LEAD, self.lowest * self.own.chunk + apart - self.window) * (stride > 1)
        count = self.window + lead
        late = jax.lax.dynamic_slice_in_dim(frames_BFHWC, end - count, count, axis=1)
        video = self.codec.pixels(codec_params, late)[:, (1 + stride * (lead - 1)) if lead else 0 :]
        return View(video, self.codec.pixels(codec_params, frames_BFHWC[:, : self.first]))


def draw_step(key, steps: StepPlan, how: str):
    """Number of the denoising step that is recorded, per list of the plan; one draw for all chunks and streams.

    "random": uniform over each list; "stochastic": over those whose result is random, all but the last; "last".
    """
    lengths = jnp.asarray(steps.lengths)
    if how == "last":
        return lengths - 1
    return jax.random.randint(key, lengths.shape, 0, lengths - int(how == "stochastic"))


def rollout_step(
    state: TrainState,
    frozen: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    carry,
    *,
    seed: int,
    plan: Plan,
    microbatches: int = 1,
):
    """Makes an episode with the student as it is, and judges it as far as the device can.

    Args:
      state: donated by the caller; handed on as it is.
      frozen: "codec", the parameters of the decoder, where something is judged.
      batch: "text" [P, M, C], and "latents" [P, F, H, W, C] where streams take real frames.
      carry: handed on, with the episode.
      seed: randomness is a function of (seed, state.step).
      plan: of the episode.
      microbatches: parts of the batch that are made one after the other.

    Returns:
      (state, metrics, carry): the batch, "frames" [B, F, H, W, C] and what else ``group.Videos`` has, the recorded
      steps as "visited", "following", "sigma", "next_sigma", "start" (chunks), "rewards/NAME" [B], and for rewards on
      the host "video" and "first", uint8 [B, T, H, W, 3].
    """
    own, params = plan.own, state.nets["student"].params
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), 2), 3)
    start = jax.random.randint(keys[0], (), plan.lowest, plan.highest + 1)
    step = draw_step(keys[1], own.streamer.plan, plan.step)

    def part(batch, keys):
        videos, steps = group.record(
            own, params, batch["text"], keys[0], start, step, plan.latent_shape, batch.get("latents")
        )
        shared = {"sigma": steps.sigma_T, "next_sigma": steps.next_sigma_T, "kept_sigma": videos.kept_sigma}
        made = {"visited": steps.x_BTHWC, "following": steps.next_BTHWC}
        made |= {name: getattr(videos, name) for name in ("frames", "noise", "kept_input")}
        measured = {}
        if plan.codec is not None:
            view = plan.views(frozen["codec"], videos.frames, start)
            made |= {f"{REWARD}{name}": x for name, x in rewards.on_device(plan.terms, view).items()}
            measured = looks(view.video_BTHWC)
            if plan.on_host:
                made |= {"video": _bytes(view.video_BTHWC), "first": _bytes(view.first_BSHWC)}
        made = {name: rearrange(x, "(p n) ... -> p n ...", n=own.group) for name, x in made.items() if x is not None}
        return {"shared": {name: x for name, x in shared.items() if x is not None}, "looks": measured}, made

    found, made = accumulate(part, dict(batch), keys[2:], microbatches, keeps=True)
    made = {name: rearrange(x, "p n ... -> (p n) ...") for name, x in made.items()}
    for name in {"video", "first"} & made.keys():  # every process has its streams whole
        made[name] = parallel.constrain(made[name], "batch", None, None, None, None)
    metrics = {f"video/{name}": x for name, x in logged(found["looks"]).items()} | {"start": start * own.chunk}
    return state, metrics, {**carry, **batch, **made, **found["shared"], "start": start}


def looks(video_BTHWC: Float[Array, "B T H W 3"]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """What to watch beside rewards, in pixels of [0, 1]: (sum, count) over the videos that are finite.

    motion: mean change from frame to frame; it falls where a reward likes a still video. saturation: mean of the
    largest less the smallest channel; clipped: share of channels within 1/255 of black or white.
    """
    finite_B = jnp.all(jnp.isfinite(video_BTHWC), axis=(1, 2, 3, 4))
    video = jnp.where(finite_B[:, None, None, None, None], video_BTHWC, 0.0)
    before = video[:, : max(video.shape[1] - 1, 1)]
    found = {
        "motion": jnp.abs(video[:, -before.shape[1] :] - before),
        "saturation": jnp.max(video, axis=-1) - jnp.min(video, axis=-1),
        "clipped": ((video < 1 / 255) | (video > 254 / 255)).astype(jnp.float32),
    }
    count = jnp.sum(finite_B.astype(jnp.float32))
    means = {name: jnp.mean(x, axis=tuple(range(1, x.ndim))) for name, x in found.items()}
    return {name: (jnp.sum(jnp.where(finite_B, x, 0.0)), count) for name, x in means.items()}


def _bytes(video):
    return jnp.rint(255.0 * video).astype(jnp.uint8)


def learn_step(
    state: TrainState,
    frozen: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    carry: Mapping[str, jax.Array],
    *,
    seed: int,
    plan: Plan,
    grads: ContextGrad,
    terms: Sequence[Term],
    update: Update,
    make_scores: Callable | None = None,
    make_pair: Callable | None = None,
    scored: int = 0,
    keep: int = 1,
    growth: float = 1.0,
    epochs: int = 1,
    old_decay: float = 0.0,
    microbatches: int = 1,
):
    """Updates the student on an episode that is judged.

    Args:
      state: donated by the caller; its "old" network, where there is one, follows the student.
      frozen: parameters of networks that are not trained: "reference", "teacher", "codec".
      batch: unused; the episode may be that of another step.
      carry: of ``rollout_step``, with all "rewards/NAME".
      seed, plan, microbatches: as there.
      grads: what flows through the parameters that made the contexts of the clip.
      terms: the losses, see ``losses.rl.episode`` and ``stages.rl`` for what they may ask.
      update: of the student.
      make_scores, make_pair, scored: for losses that ask for "pair": ``make_scores(state, frozen)`` and
        ``make_pair(key, video, real, fake, batch)`` as in ``policy_gradient.generator_step``; the scores see the last
        ``scored`` frames of the clip.
      keep: own chunks behind which "corrected" has real frames.
      growth: of a frame's weight in the losses from chunk to chunk.
      epochs: updates per episode.
      old_decay: of the average "old".

    Returns:
      (state, metrics, an empty carry: nothing behind the update needs the episode).
    """
    del batch
    own, net = plan.own, state.nets["student"]
    asks = {name for term in terms for name in asked(term.loss)}
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), 3), 2)
    frozen_state = jax.lax.stop_gradient(state)
    weight_T = growth ** jnp.repeat(jnp.arange(own.clip // own.chunk, dtype=jnp.float32), own.chunk)
    start, level = carry["start"], (carry["sigma"], carry["next_sigma"])
    values = {name.removeprefix(REWARD): x for name, x in carry.items() if name.startswith(REWARD)}
    names = ("visited", "following", *Videos._fields[:3])
    made, sound_B = _sound({name: carry[name] for name in names if name in carry}, own.group)
    judged, metrics = _judged(plan, values, sound_B)
    of_prompts = judged | made
    of_prompts = {name: rearrange(x, "(p n) ... -> p n ...", n=own.group) for name, x in of_prompts.items()}
    examples = of_prompts | {name: carry[name] for name in ("text", "latents") if name in carry}

    def episode_of(part):
        at = {name: rearrange(part[name], "p n ... -> (p n) ...") for name in of_prompts}
        videos = Videos(*(at.get(name) for name in Videos._fields[:3]), carry.get("kept_sigma"))
        clip = jax.lax.dynamic_slice_in_dim(videos.frames, start * own.chunk, own.clip, axis=1)
        return at, videos, clip

    def predictor(params, part, videos, learns: bool = False):
        memo: dict[tuple[int, int], tuple] = {}

        def predict(x, sigma):
            at = id(x), id(sigma)
            if at not in memo:  # losses that look at the same inputs share the pass
                args = (params, part["text"], videos, start, x, sigma)
                found = group.predict(
                    own, *(args if learns else jax.lax.stop_gradient(args)), grads if learns else CONSTANT
                )
                memo[at] = x, sigma, found
            return memo[at][-1]

        return predict

    def objective_of(part, keys, predicted=None):
        key_pair, key_loss = keys
        at, videos, clip = episode_of(part)
        offered = {}
        if "old" in asks:
            offered["old"] = predictor(frozen_state.nets["old"].params, part, videos)
        if "reference" in asks:
            offered["reference"] = predictor(frozen["reference"], part, videos)
        if "corrected" in asks:

            def corrected(x, sigma):
                params = frozen_state.nets["student"].params
                return group.predict_corrected(
                    own, params, part["text"], videos, part["latents"], start, x, sigma, keep
                )

            offered["corrected"] = corrected
        if "rewarded" in asks:

            def rewarded(x0):
                frames = jax.lax.dynamic_update_slice_in_dim(videos.frames, x0, start * own.chunk, axis=1)
                found = rewards.on_device(plan.terms, plan.views(frozen["codec"], frames, start))
                weights = rewards.weights(plan.terms, found)
                worth = sum(weight * found[name] for name, weight in weights.items())
                return jnp.where(jnp.isfinite(worth), worth, 0.0)

            offered["rewarded"] = rewarded

        def objective(params):
            current = predictor(params, part, videos, learns=True)
            x0 = current(at["visited"], level[0])
            before = jax.lax.stop_gradient(x0 if predicted is None else predicted)
            episode = Episode(
                clip,
                at["visited"],
                level[0],
                at["following"],
                level[1],
                before,
                at["reward"],
                at["advantage"],
                at["counts"],
                at["judged"],
                weight_T / jnp.mean(weight_T),
                own.group,
            )
            given = {**offered, "episode": episode, "current": current}
            of_losses = {"text": own.members(part["text"])}
            if "pair" in asks:
                of_losses["action"] = x0[:, own.clip - scored :]
                scores = make_scores(frozen_state, frozen)
                given["pair"] = make_pair(key_pair, of_losses["action"], scores["real"], scores["fake"], of_losses)
            return total_loss(terms, None, of_losses, key_loss, given)

        return objective

    def behaviour(part, _):
        at, videos, _ = episode_of(part)
        x0 = predictor(net.params, part, videos)(at["visited"], level[0])
        return {}, {"predicted": rearrange(x0, "(p n) ... -> p n ...", n=own.group)}

    if epochs > 1:  # else the policy that is asked is the one that made the episode, or was when staleness began
        examples |= accumulate(behaviour, examples, keys, microbatches, keeps=True)[1]

    def epoch(i, carried):
        params, opt_state, _ = carried
        own_keys = keys if epochs == 1 else jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)

        def gradients(part, keys):
            predicted = part.get("predicted")
            predicted = None if predicted is None else rearrange(predicted, "p n ... -> (p n) ...")
            return value_and_gradients(objective_of(part, keys, predicted), params)

        (loss, found), grads = accumulate(gradients, examples, own_keys, microbatches)
        params, opt_state = update.params(params, opt_state, grads)
        return params, opt_state, (loss, found, norms(grads, params))

    start_of = (net.params, net.opt_state)
    if epochs == 1:
        params, opt_state, (loss, found, sizes) = epoch(0, (*start_of, None))
    else:
        shapes = jax.eval_shape(epoch, 0, (*start_of, None))[-1]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        params, opt_state, (loss, found, sizes) = jax.lax.fori_loop(0, epochs, epoch, (*start_of, zeros))
    state = settle(state, "student", update, params, opt_state)
    if "old" in state.nets:
        old = state.nets["old"]
        follow = functools.partial(jax.tree.map, lambda old, new: old + (1.0 - old_decay) * (new - old))
        state = state._replace(nets={**state.nets, "old": old._replace(params=follow(old.params, params))})
    return state, {"loss": loss, **logged(found), **metrics, **sizes}, {}


def _sound(made: Mapping[str, jax.Array], streams: int) -> tuple[dict[str, jax.Array], jax.Array]:
    """(the streams' arrays, zeros for a stream that is not finite somewhere; which streams count).

    The past of a group is read from its first stream: with that one the whole group goes.
    """
    finite = [jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim))) for x in made.values()]
    sound_B = functools.reduce(jnp.logical_and, finite)
    sound_B = sound_B & jnp.repeat(sound_B[::streams], streams)
    return {name: jnp.where(sound_B.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0) for name, x in made.items()}, sound_B


def _judged(plan: Plan, values: Mapping[str, jax.Array], sound_B):
    """({"reward", "advantage", "counts", "judged"} of every stream, metrics); where nothing is optimised all count."""
    weights = rewards.weights(plan.terms, values)
    metrics = {f"{UNKNOWN}{name}": x for name, x in rewards.statistics(values).items()}
    metrics["group/broken"] = 1.0 - jnp.mean(sound_B.astype(jnp.float32))
    if not weights:
        counts = sound_B.astype(jnp.float32)
        return {"reward": 0.0 * counts, "advantage": 0.0 * counts, "counts": counts, "judged": counts}, metrics
    values = {name: jnp.where(sound_B, x, jnp.nan) for name, x in values.items()}
    found = combine(values, weights, plan.own.group, plan.how, plan.scale, plan.limit)
    judged = {name: getattr(found, f"{name}_B") for name in ("reward", "advantage", "counts", "judged")}
    return judged, metrics | logged({f"group/{name}": x for name, x in found.metrics.items()})
