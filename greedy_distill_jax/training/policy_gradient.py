"""Stage 2 as pure step functions: self-rollout, distribution matching, and the critic (docs/method.md, section 7).

Generator and critic are separate parts of a step (``stages/dmd.py``). Both roll the student out afresh. The
generator's gradient comes in three ways ("pg"), which share the rollout and the losses:

- "rollout_trunc": through the last denoising call of every frame only, in one parallel pass;
- "rollout_full": through the contexts too, so that later frames give credit to earlier ones, chunk by chunk;
- "actor_critic": dloss/daction is computed once, then the actor follows it for several epochs.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from greedy_distill_jax.losses import Term, asked
from greedy_distill_jax.models.students.base import ContextGrad
from greedy_distill_jax.streaming.causal import CausalStreamer
from greedy_distill_jax.streaming.etm_sdd import Streamer
from greedy_distill_jax.training import audit, rollout as rollouts
from greedy_distill_jax.training.state import TrainState
from greedy_distill_jax.training.update import (
    Update,
    accumulate,
    drop_text,
    logged,
    norms,
    settle,
    total_loss,
    update_net,
    value_and_gradients,
)

STOP_AT_KEYS = ContextGrad("params", "none")  # Self-Forcing's choice
PG = ("rollout_trunc", "rollout_full", "actor_critic")


@dataclasses.dataclass(frozen=True)
class SelfRollout:
    """How the student makes its own videos and how gradients pass through them.

    streamer: the student with the few-step sampling it is trained for.
    latent_shape: (T, H, W, C) of what the losses see.
    frames: length of a rollout; beyond T the losses see a window of it that starts at a random chunk.
    exit: see ``rollout.draw_exits``.
    grads: see ``models.students.base.ContextGrad``.
    pg: one of ``PG``.
    segment: "rollout_full": chunks after which the flow through the state is cut, 0 for never.
    epochs, anchor: "actor_critic": updates per rollout, and the weight of mean (action - old action)^2 that keeps the
      later ones near the rollout the gradient belongs to.
    """

    streamer: Streamer | CausalStreamer
    latent_shape: tuple[int, int, int, int]
    frames: int
    exit: str = "random"
    grads: ContextGrad = STOP_AT_KEYS
    pg: str = "rollout_trunc"
    segment: int = 0
    epochs: int = 1
    anchor: float = 0.0

    def exits(self, key):
        """What all rollouts of one update share, see ``rollout.draw_exits``."""
        return rollouts.draw_exits(key, self.streamer.plan.lengths, self.exit)

    def draw(self, params, text_BMC, key, exits) -> "Drawn":
        """A rollout without gradient, and the window of it that the losses see."""
        key_roll, key_start = jax.random.split(key)
        shape, chunk = (self.frames, *self.latent_shape[1:]), self.streamer.cfg.chunk
        drawn = rollouts.roll_out(self.streamer, params, text_BMC, key_roll, shape, exits)
        starts = (self.frames - self.latent_shape[0]) // chunk + 1
        start = chunk * jax.random.randint(key_start, (), 0, starts)
        return Drawn(drawn, start, self._window(drawn.x0_BTHWC, start))

    def _window(self, x_BTHWC, start):
        return jax.lax.dynamic_slice_in_dim(x_BTHWC, start, self.latent_shape[0], axis=1)

    def act(self, params, text_BMC, drawn: "Drawn"):
        """The window's frames again, differentiable in ``params``."""
        if self.pg == "rollout_full":
            frames = rollouts.replay(
                self.streamer, params, text_BMC, drawn.rollout, self.grads, frames=True, segment=self.segment
            )
        else:
            frames = rollouts.recompute(self.streamer.student, params, text_BMC, drawn.rollout, self.grads)
        return self._window(frames, drawn.start)


class Drawn(NamedTuple):
    """A rollout and the part of it that the losses see."""

    rollout: rollouts.Rollout
    start: jax.Array  # int32, first frame of the window
    video_BTHWC: jax.Array


def _keys(seed: int, step, stream: int, count: int):
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), stream), count)


def generator_step(
    state: TrainState,
    frozen: Mapping[str, object],
    batch: Mapping[str, jax.Array],
    *,
    seed: int,
    null_MC,
    own: SelfRollout,
    prepare: Callable,
    make_net: Callable,
    make_scores: Callable,
    make_pair: Callable,
    terms: Sequence[Term],
    update: Update,
    text_dropout: float,
    microbatches: int = 1,
) -> tuple[TrainState, dict[str, jax.Array], dict[str, jax.Array]]:
    """One update of the student on its own videos.

    Args:
      state: donated by the caller.
      frozen: parameters of networks that are not trained.
      batch: "text" [B, M, C]; the rest of the data, where there is some, reaches losses that ask for "samples", with a
        history of its own.
      seed, null_MC, terms, update, text_dropout, microbatches: as for ``update.data_step``; the losses get "action"
        (the generated video, through which they act on the student) and "latents" (the same without gradient).
      own: the rollout.
      prepare: ``prepare(videos, key) -> videos`` with the history that all networks of the update look back on.
      make_net: ``make_net(params) -> net``, the student teacher-forced on its own video.
      make_scores: ``make_scores(state, frozen) -> {"real": net, "fake": net}``, and what else losses may ask for.
      make_pair: ``make_pair(key, video, real, fake, videos)``, see ``losses.pair.draw_pair``; once for all losses.
      microbatches: 1 with "actor_critic", whose epochs need the whole batch's gradient.

    Returns:
      (state, metrics) as ``update.data_step``, with the number of the step that every list was left at, "exit/LIST";
      and, where a loss asks for "head", what the head learns from: the videos "latents" [B, T, H, W, C] and "x0_real",
      the real score's answer to the first of the pair's draws.
    """
    asks = {name for term in terms for name in asked(term.loss)}
    keys = _keys(seed, state.step, 0, 6)
    exits = own.exits(keys[-1])  # one draw for all microbatches
    text = drop_text(batch["text"], null_MC, keys[0], text_dropout)
    frozen_state, net = jax.lax.stop_gradient(state), state.nets["student"]

    def episode(batch, keys):
        key_roll, key_history, key_pair, key_loss = keys
        drawn, learnt = own.draw(net.params, batch["text"], key_roll, exits), {}
        videos = prepare({"text": batch["text"], "latents": drawn.video_BTHWC}, key_history)
        offered = make_scores(frozen_state, frozen)
        if asks & {"pair", "head"}:
            pair = make_pair(key_pair, drawn.video_BTHWC, offered["real"], offered["fake"], videos)
            offered["pair"] = pair
            learnt = {"latents": drawn.video_BTHWC, "x0_real": pair.x0_real[0]} if "head" in asks else {}
        if "samples" in asks:
            offered["samples"] = prepare(batch, jax.random.fold_in(key_history, 1))

        def objective(action, params):
            return total_loss(terms, make_net(params), {**videos, "action": action}, key_loss, offered)

        return drawn, learnt, objective

    batch = {**batch, "text": text}
    if own.pg == "actor_critic":
        drawn, learnt, objective = episode(batch, keys[1:-1])
        audit.note(lambda both: objective(*both), (drawn.video_BTHWC, net.params))
        (loss, metrics), towards = jax.value_and_grad(objective, has_aux=True)(drawn.video_BTHWC, net.params)

        def actor(params):
            action = own.act(params, text, drawn)
            near = own.anchor * jnp.mean(jnp.square(action - drawn.video_BTHWC))
            return jnp.sum(towards * action) + near + objective(drawn.video_BTHWC, params)[0]

        def epoch(_, carry):
            params, opt_state, _ = carry
            grads = value_and_gradients(lambda p: (actor(p), None), params)[1]
            params, opt_state = update.params(params, opt_state, grads)
            return params, opt_state, norms(grads, params)

        start = (net.params, net.opt_state, norms(net.params, net.params))  # norms: replaced in the first epoch
        params, opt_state, sizes = jax.lax.fori_loop(0, own.epochs, epoch, start)
        state = settle(state, "student", update, params, opt_state)
    else:

        def gradients(batch, keys):
            drawn, learnt, objective = episode(batch, keys)

            def of_actions(params):
                return objective(own.act(params, batch["text"], drawn), params)

            return value_and_gradients(of_actions, net.params), learnt

        ((loss, metrics), grads), learnt = accumulate(gradients, batch, keys[1:-1], microbatches, keeps=True)
        state, sizes = update_net(state, "student", update, grads)
    left = {} if exits is None else {f"exit/{i}": exits[i] for i in range(len(own.streamer.plan.sigmas))}
    return state, {"loss": loss, **logged(metrics), **left, **sizes}, learnt


def critic_step(
    state: TrainState,
    frozen: Mapping[str, object],
    batch: Mapping[str, jax.Array],
    *,
    seed: int,
    null_MC,
    own: SelfRollout,
    prepare: Callable,
    make_net: Callable,
    terms: Sequence[Term],
    update: Update,
    text_dropout: float,
    microbatches: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the fake score on fresh videos of the student.

    Arguments as for ``generator_step``; ``make_net`` is the critic's, and its losses get the generated videos as
    "latents".
    """
    del frozen
    keys = _keys(seed, state.step, 1, 5)
    exits = own.exits(keys[-1])
    text = drop_text(batch["text"], null_MC, keys[0], text_dropout)

    def gradients(batch, keys):
        key_roll, key_history, key_loss = keys
        drawn = own.draw(state.nets["student"].params, batch["text"], key_roll, exits)
        videos = prepare({"text": batch["text"], "latents": drawn.video_BTHWC}, key_history)

        def objective(params):
            return total_loss(terms, make_net(params), videos, key_loss)

        return value_and_gradients(objective, state.nets["critic"].params)

    (loss, metrics), grads = accumulate(gradients, {"text": text}, keys[1:-1], microbatches)
    state, sizes = update_net(state, "critic", update, grads)
    return state, {f"critic/{name}": x for name, x in {"loss": loss, **logged(metrics), **sizes}.items()}
