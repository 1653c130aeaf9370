"""The network behind the loss "motion_head" of stage "dmd", and how it is trained (docs/method.md, section 9.4).

After every update of the student the head learns to recognise the motions of the videos that the student has just made
in what the teacher's score makes of them, once they are noised (``losses.contrast``).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from greedy_distill_jax.config.keys import Optimizer, Size
from greedy_distill_jax.losses.contrast import contrast
from greedy_distill_jax.losses.motion import Head, differences
from greedy_distill_jax.models import flops
from greedy_distill_jax.models.motion_head import MotionHead, MotionHeadConfig
from greedy_distill_jax.ranges import Count, Momentum, Positive
from greedy_distill_jax.training.cost import Cost, Meter, total
from greedy_distill_jax.training.optimizer import make_optimizer
from greedy_distill_jax.training.stages.base import Network, Part
from greedy_distill_jax.training.state import TrainState
from greedy_distill_jax.training.update import Update, update_net, value_and_gradients


@dataclasses.dataclass(frozen=True)
class MotionHeadKeys:
    """Keys of the head that the loss "motion_head" asks for."""

    width: Size = 64  # channels of its hidden layers
    layers: Count = 2  # hidden layers
    decay: Momentum = 0.95  # of its average, the target, per update of the student
    temperature: Positive = 0.1  # of the contrast it is trained by
    # Weight decay pulls it back to where it starts, the identity.
    optimizer: Optimizer = dataclasses.field(default_factory=lambda: Optimizer("adamw", 1e-3, weight_decay=1e-2))


def make_head(keys: MotionHeadKeys, channels: int) -> MotionHead:
    """The network for latents of so many channels."""
    return MotionHead(MotionHeadConfig(channels, keys.width, keys.layers))


class Built(NamedTuple):
    """The network of a stage, and the part that trains it."""

    network: Network
    part: Part


def build(
    keys: MotionHeadKeys, shape: tuple[int, int, int, int, int], *, updates: int, due: Callable[[int], bool], skip: int
) -> Built:
    """The head of a run.

    Args:
      keys: its keys.
      shape: [B, T, H, W, C] of the videos that an update of the student makes.
      updates: of the student in the run, after each of which the head has one.
      due: the steps in which the student has one.
      skip: first frames that no loss counts.
    """
    model, update = make_head(keys, shape[-1]), Update(make_optimizer(keys.optimizer, steps=updates), keys.decay)
    takes = dict.fromkeys(("latents", "x0_real"), jax.ShapeDtypeStruct(shape, jnp.float32))

    def call(state, frozen, batch, carry):
        state, metrics = head_step(state, carry, model=model, update=update, temperature=keys.temperature, skip=skip)
        # What it has used goes no further: a part after it gets the same in steps without an update of the student.
        return state, metrics, {name: x for name, x in carry.items() if name not in takes}

    part = Part("motion_head", due, call, losses="config.motion_head", takes=takes)
    return Built(Network(model, update, part=part.name, target=True), part)


def offered_by(model: MotionHead, make_scores: Callable) -> Callable:
    """``make_scores(state, frozen)`` with "head" beside the scores: the feature, and its average as the target."""

    def make(state, frozen):
        net = state.nets["motion_head"]
        head = Head(lambda y: model(net.params, y), lambda y: model(net.ema, y))
        return make_scores(state, frozen) | {"head": head}

    return make


def head_step(
    state: TrainState,
    learnt: Mapping[str, jax.Array],
    *,
    model: MotionHead,
    update: Update,
    temperature: float,
    skip: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the head.

    Args:
      state: its network "motion_head".
      learnt: "latents" and "x0_real" [B, T, H, W, C], see ``policy_gradient.generator_step``.
      model, update: the network, its optimiser and average.
      temperature: see ``contrast``.
      skip: first frames that no loss counts.

    Returns:
      (state, metrics): the loss "motion_head/contrast", the share of motions that are recognised "motion_head/accuracy"
      and the norms of the update.
    """
    net = state.nets["motion_head"]
    made, real = (differences(learnt[name][:, skip:], "motion_head") for name in ("latents", "x0_real"))

    def objective(params):
        loss_B, metrics = contrast(model(params, made), model(net.ema, real), temperature=temperature)
        loss = loss_B.mean()
        return loss, {"contrast": loss, **{f"contrast/{name}": x for name, x in metrics.items()}}

    (_, metrics), grads = value_and_gradients(objective, net.params)
    state, sizes = update_net(state, "motion_head", update, grads)
    named = {"contrast": metrics["contrast"], "accuracy": metrics["contrast/accuracy"], **sizes}
    return state, {f"motion_head/{name}": x for name, x in named.items()}


def matched(keys: MotionHeadKeys, meter: Meter, draws: int) -> flops.Flops:
    """What a term "motion_head" computes for an example: phi, back to the video, and its average for both scores."""
    return total(_layers(keys, meter, meter.frames - 1)) * (2 + 1 + 2 * draws)


def learnt(keys: MotionHeadKeys, meter: Meter, skip: int) -> Cost:
    """An update of the head; nothing is differentiated with respect to the motion that it gets."""
    layers = _layers(keys, meter, meter.frames - 1 - skip)
    cost = total(layers) * (flops.TRAINED + 1) + layers[0] * -1.0
    return Cost(cost * meter.batch, cost * meter.batch)


def _layers(keys: MotionHeadKeys, meter: Meter, frames: int) -> list[flops.Flops]:
    cfg = make_head(keys, meter.wan.channels).cfg
    return flops.motion_head(cfg, frames * meter.tokens * meter.wan.patch**2)
