"""Pure step functions; ``training.job`` jits them with shardings."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from greedy_distill_jax.distribution import parallel
from greedy_distill_jax.losses import Term, asked, check_returned
from greedy_distill_jax.training import audit
from greedy_distill_jax.training.state import Net, TrainState


def drop_text(text_BMC, null_MC, key, rate: float):
    """Replaces the text of a fraction ``rate`` of the examples by the unconditional rows."""
    drop = jax.random.uniform(key, (text_BMC.shape[0], 1, 1)) < rate
    return jnp.where(drop, null_MC[None], text_BMC)


def total_loss(terms: Sequence[Term], net, batch, key, offered: Mapping[str, Any] | None = None):
    """(sum of weight * mean(loss_B), metrics by term, see ``logged``); ``net`` is called with x, sigma, batch.

    ``offered``: what losses may ask for by name, see ``losses.asked``. UserError for a loss that returns something else
    than ``losses.check_returned`` allows.
    """
    total, metrics = jnp.float32(0.0), {}
    for i, term in enumerate(terms):
        given = {name: offered[name] for name in asked(term.loss)}
        returned = term.loss(net, batch, jax.random.fold_in(key, i), **given, **term.options)
        loss_B, extra = check_returned(term, returned, len(batch["text"]))
        value = jnp.mean(loss_B)
        total = total + term.weight * value
        metrics[term.name] = value
        metrics.update({f"{term.name}/{name}": x for name, x in extra.items()})
    return total, metrics


@dataclasses.dataclass(frozen=True)
class Update:
    """How gradients become parameters.

    optimizer: of the trained parameters.
    ema_decay, ema_start: the average follows the parameters exactly until step ``ema_start``; decay None keeps none.
    rate_scale: ``rate_scale(params) -> tree`` of factors on the update of each leaf (new parameters learn faster).
    """

    optimizer: optax.GradientTransformation
    ema_decay: float | None = None
    ema_start: int = 0
    rate_scale: Callable | None = None

    def params(self, params, opt_state, grads):
        """(new parameters, new optimiser state)."""
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes dtypes and ranks
            updates, opt_state = self.optimizer.update(grads, opt_state, params)
        if self.rate_scale is not None:
            updates = jax.tree.map(lambda u, s: u * s, updates, self.rate_scale(params))
        return optax.apply_updates(params, updates), opt_state

    def ema(self, ema, params, step):
        """The average after update ``step``."""
        return jax.tree.map(
            lambda old, new: jnp.where(step <= self.ema_start, new, old + (1.0 - self.ema_decay) * (new - old)),
            ema,
            params,
        )


def value_and_gradients(objective: Callable, params):
    """((value, metrics by term or None), gradients) of ``objective(params)``."""
    value, grads = audit.value_and_grad(objective, params)
    return value, parallel.at_rest(grads)


def accumulate(gradients: Callable, batch: Mapping[str, jax.Array], keys, count: int, *, keeps: bool = False):
    """Mean of ``gradients(part of the batch, keys)`` over ``count`` microbatches, one after the other.

    Args:
      gradients: returns a tree of float32 arrays, each a mean over the examples it is given.
      batch: examples along the first axis of every array.
      keys: PRNG keys [n], from which each of several microbatches makes its own.
      count: divides the number of examples. Microbatch i takes every ``count``-th example from i on: each device group
        computes its own examples of it, and none move.
      keeps: ``gradients`` returns (tree, arrays with the examples along the first axis), and so does this, with those
        of the whole batch in its order.
    """
    if count == 1:
        return gradients(batch, keys)

    def both(batch, keys):
        return gradients(batch, keys) if keeps else (gradients(batch, keys), {})

    def part(total, xs):
        index, microbatch = xs
        own = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
        found, examples = both(microbatch, own)
        return jax.tree.map(jnp.add, total, found), examples

    parts = {name: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1) for name, x in batch.items()}
    shapes, _ = jax.eval_shape(lambda b: both(b, keys), {name: x[0] for name, x in parts.items()})
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, kept = jax.lax.scan(part, start, (jnp.arange(count), parts))
    mean = jax.tree.map(lambda x: x / count, total)
    if not keeps:
        return mean
    return mean, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), kept)


def update_net(state: TrainState, name: str, update: Update, grads) -> tuple[TrainState, dict[str, jax.Array]]:
    """(the state with one network updated, its norms): the common end of every step.

    Args:
      state: its ``step`` is that of the last finished step.
      name: of the network.
      update: its optimiser and average.
      grads: tree of its parameters.
    """
    net = state.nets[name]
    params, opt_state = update.params(net.params, net.opt_state, grads)
    return settle(state, name, update, params, opt_state), norms(grads, params)


def settle(state: TrainState, name: str, update: Update, params, opt_state) -> TrainState:
    """The state with one network at new parameters, its average after them."""
    ema = state.nets[name].ema
    ema = None if ema is None else update.ema(ema, params, state.step + 1)
    return state._replace(nets={**state.nets, name: Net(params, ema, opt_state)})


def data_step(
    state: TrainState,
    frozen: Mapping[str, object],
    batch: Mapping[str, jax.Array],
    *,
    name: str,
    seed: int,
    null_MC,
    make_net: Callable,
    make_asked: Callable,
    prepare: Callable,
    terms: Sequence[Term],
    update: Update,
    text_dropout: float,
    microbatches: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of a network trained on data.

    Args:
      state: donated by the caller.
      frozen: parameters of networks that are not trained.
      batch: "latents" [B, T, H, W, C] and "text" [B, M, C].
      name: of the network in the state.
      seed, null_MC: randomness is a function of (seed, state.step); null_MC are the unconditional text rows.
      make_net: ``make_net(params) -> net``.
      make_asked: ``make_asked(state, frozen) -> {name: net}``, the networks that losses may ask for.
      prepare: ``prepare(batch, key) -> batch`` with what the networks look back on, one for all.
      terms: weighted losses.
      update: optimiser and average.
      text_dropout: fraction of examples trained without text.
      microbatches: parts of the batch that are computed one after the other, see ``accumulate``.

    Returns:
      (state, metrics): every loss term, their weighted sum "loss", "grad_norm", and "param_norm" after the update.
    """
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), 3)
    batch = {**batch, "text": drop_text(batch["text"], null_MC, keys[0], text_dropout)}

    def gradients(batch, keys):
        batch, offered = prepare(batch, keys[0]), make_asked(jax.lax.stop_gradient(state), frozen)

        def objective(params):
            return total_loss(terms, make_net(params), batch, keys[1], {**offered, "samples": batch})

        return value_and_gradients(objective, state.nets[name].params)

    (loss, metrics), grads = accumulate(gradients, batch, keys[1:], microbatches)
    state, sizes = update_net(state, name, update, grads)
    return state, {"loss": loss, **logged(metrics), **sizes}


def logged(metrics) -> dict[str, jax.Array]:
    """Metrics as scalars: the mean behind every (sum, count), 0 where nothing was counted.

    After ``accumulate``, because the mean of microbatches' means would not be that of the batch.
    """
    return {k: x[0] / jnp.maximum(x[1], 1e-6) if isinstance(x, tuple) else x for k, x in metrics.items()}


def norms(grads, params) -> dict[str, jax.Array]:
    """Global norms of the gradient and of the parameters after the update."""
    return {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
