"""Pure step functions; ``train.py`` jits them with shardings."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.models.dit import Teacher
from greedy_distill_jax.models.student import History, StreamingModel
from greedy_distill_jax.state import TrainState


@dataclasses.dataclass(frozen=True)
class Term:
    """One weighted loss of the sum ``train.py`` minimises."""

    name: str
    loss: Callable
    weight: float
    options: Mapping[str, object]


def teacher_net(teacher: Teacher, params, key):
    """``net(x, sigma, batch)`` of the bidirectional teacher."""
    del key
    return lambda x, sigma, batch: teacher(params, x, sigma, batch["text"])


def student_net(
    student: StreamingModel,
    params,
    key,
    *,
    context_noise: float = 0.0,
    last_sigmas: tuple[float, float] | None = None,
):
    """Teacher-forced ``net(x, sigma, batch)``: every chunk sees the batch's own frames before it.

    Args:
      student, params: any student.
      key: for the noise on the history.
      context_noise: the history is noised to a level drawn from U(0, context_noise) per video, and the networks
        are told the level (METHOD_SPEC E.4, robustness to their own errors).
      last_sigmas: with context mode "last_step_kv" the history behind the keys (of ETM + SDD: SDD's) is at these
        levels (of the first chunk, of the others), as it will be when streaming.
    """
    key_level, key_noise, key_last = jax.random.split(key, 3)

    def net(x, sigma, batch):
        frames = batch["latents"].astype(jnp.float32)
        level = context_noise * jax.random.uniform(key_level, (frames.shape[0], 1), jnp.float32)
        clean = frames
        if context_noise:
            frames = flow.add_noise(clean, jax.random.normal(key_noise, clean.shape, jnp.float32), level)
        history = History(frames, level)
        if last_sigmas is not None:
            is_first = jnp.arange(frames.shape[1]) < student.cfg.chunk
            last = jnp.where(is_first, *(jnp.float32(x) for x in last_sigmas))
            last = jnp.broadcast_to(last[None], frames.shape[:2])
            noisy = flow.add_noise(clean, jax.random.normal(key_last, clean.shape, jnp.float32), last)
            history = history._replace(sdd_frames_BTHWC=noisy, sdd_sigma_BT=last)
        return student(params, x, sigma, batch["text"], history)

    return net


def drop_text(text_BMC, null_MC, key, rate: float):
    """Replaces the text of a fraction ``rate`` of the examples by the unconditional rows."""
    drop = jax.random.uniform(key, (text_BMC.shape[0], 1, 1)) < rate
    return jnp.where(drop, null_MC[None], text_BMC)


def total_loss(terms: Sequence[Term], net, batch, key):
    """(sum of weight * mean(loss_B), metrics by term); ``net`` is called with x, sigma, batch."""
    total, metrics = jnp.float32(0.0), {}
    for i, term in enumerate(terms):
        loss_B, extra = term.loss(net, batch, jax.random.fold_in(key, i), **term.options)
        value = jnp.mean(loss_B)
        total = total + term.weight * value
        metrics[term.name] = value
        metrics.update({f"{term.name}/{name}": x for name, x in extra.items()})
    return total, metrics


def train_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    *,
    seed: int,
    null_MC,
    make_net: Callable,
    terms: Sequence[Term],
    optimizer: optax.GradientTransformation,
    text_dropout: float,
    ema_decay: float,
    ema_start: int,
    rate_scale: Callable | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the trained network.

    Args:
      state: donated by the caller.
      batch: "latents" [B, T, H, W, C] and "text" [B, M, C].
      seed, null_MC: randomness is a function of (seed, state.step); null_MC are the unconditional text rows.
      make_net: ``make_net(params, key) -> net``.
      terms: weighted losses.
      optimizer: of ``state.params``.
      text_dropout: fraction of examples trained without text.
      ema_decay, ema_start: the average follows the parameters exactly until update ``ema_start``.
      rate_scale: ``rate_scale(params) -> tree`` of factors on the update of each leaf (new parameters learn faster).

    Returns:
      (state, metrics): every loss term, their weighted sum "loss", "grad_norm", and "param_norm" after the update.
    """
    key_text, key_net, key_loss = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), 3)
    batch = {**batch, "text": drop_text(batch["text"], null_MC, key_text, text_dropout)}

    def objective(params):
        return total_loss(terms, make_net(params, key_net), batch, key_loss)

    (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes dtypes and ranks
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    if rate_scale is not None:
        updates = jax.tree.map(lambda u, s: u * s, updates, rate_scale(state.params))
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    ema = jax.tree.map(
        lambda old, new: jnp.where(step <= ema_start, new, old + (1.0 - ema_decay) * (new - old)), state.ema, params
    )
    norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
    metrics = {"loss": loss, **metrics, **norms}
    return TrainState(step, params, ema, opt_state), metrics
