"""Distribution matching of motion: what changes from frame to frame, weighted towards what comes late.

The motion is compared as it is (``motion``) or in a learned feature of it (``motion_head``).
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from greedy_distill_jax.diffusion import flow
from greedy_distill_jax.losses.dmd import NORMALIZERS
from greedy_distill_jax.losses.pair import Pair
from greedy_distill_jax.ranges import Fraction, Positive, one_of


class Head(NamedTuple):
    """A feature of motion, twice: both take differences of frames [B, F, H, W, C] and return that shape.

    feature: gradient flows through it into the motion, never into its parameters. target: its moving average, which
    says what both scores' motions are in the feature.
    """

    feature: Callable
    target: Callable


def motion(
    net: Callable | None,
    batch: Mapping[str, Any],
    key: PRNGKeyArray | None,
    *,
    pair: Pair,
    normalizer: Annotated[str, one_of(*NORMALIZERS)] = "real",
    dynamic: Fraction = 0.7,
    growth: Positive = 1.2,
) -> tuple[Float[Array, " B"], dict[str, Float[Array, ""]]]:
    """Surrogate whose gradient in the motion y = x[1:] - x[:-1] is h g, g that of distribution matching in y.

    g = D x0_fake(x_sigma) - D x0_real(x_sigma) with D the difference of neighbouring frames, the mean over the pair's
    draws; with the normaliser "real" every draw is divided by the example's mean |y - D x0_real|. The loss is
    1/2 mean h (y - sg(y - g))^2, so that dloss/dx = D^T (h g) / size(y), a high-pass in time of what ``dmd`` follows.
    The published terms have the same numbers and no gradient: g and h are made, and the square is taken, where none is
    kept.

    Frame weights h = dynamic (1 + share of mean g^2 up to the frame) + (1 - dynamic) growth^f / mean: later motion, and
    motion behind much that is wrong, counts more.

    Args:
      net, key: unused; the action comes with the batch, the noise with the pair.
      batch: "action" [B, T, H, W, C], the generated video, through which the gradient flows; T of at least 2.
      pair: of that video. Motion counts where both of its frames do.
      normalizer: "real" or "none".
      dynamic: weight of the share of g^2 against the growth.
      growth: factor from frame to frame.

    Raises:
      ValueError: a video of one frame.

    Returns:
      loss [B], and metrics: mean |g|, and the mean |y - D x0_real| that normalises it.

    References:
      Diagonal Distillation, arXiv 2603.09488, flow distribution matching; the weights are those of its first code.
    """
    del net, key
    return _matched("motion", batch["action"], pair, Head(_as_it_is, _as_it_is), normalizer, dynamic, growth)


def motion_head(
    net: Callable | None,
    batch: Mapping[str, Any],
    key: PRNGKeyArray | None,
    *,
    pair: Pair,
    head: Head,
    normalizer: Annotated[str, one_of(*NORMALIZERS)] = "real",
    dynamic: Fraction = 0.7,
    growth: Positive = 1.2,
) -> tuple[Float[Array, " B"], dict[str, Float[Array, ""]]]:
    """The loss ``motion`` in a learned feature: y = phi(D x), g = phi'(D x0_fake) - phi'(D x0_real).

    phi is ``head.feature``, phi' its average ``head.target``, which also measures the distance that normalises,
    mean |phi'(D x) - phi'(D x0_real)|. With J the Jacobian of phi at D x, dloss/dx = D^T J^T (h g) / size(y). A head
    that returns what it gets makes this ``motion``. In stage "dmd" the head is a small network that is trained beside
    the student (``training.motion_head``); published code has such heads, in no optimiser and without a gradient.

    Args:
      net, key, batch, pair, normalizer, dynamic, growth: as for ``motion``.
      head: the feature and its average.

    Raises:
      ValueError: a video of one frame.

    Returns:
      As ``motion``, both metrics in the feature.

    References:
      Diagonal Distillation, arXiv 2603.09488, flow distribution matching.
    """
    del net, key
    return _matched("motion_head", batch["action"], pair, head, normalizer, dynamic, growth)


def _as_it_is(y):
    return y


def _matched(name: str, action, pair: Pair, head: Head, normalizer: str, dynamic: float | int, growth: float | int):
    moved = differences(action, name)
    y, of_target = head.feature(moved), head.target(jax.lax.stop_gradient(moved))
    still, counts = jax.lax.stop_gradient(y), pair.mask[:, 1:] * pair.mask[:, :-1]
    counts = counts / jnp.maximum(jnp.mean(counts, axis=1, keepdims=True), 1e-6)
    size = flow.expand(counts, y)

    def of_draw(x0_real, x0_fake):
        real, fake = (head.target(jnp.diff(x0, axis=1)) for x0 in (x0_real, x0_fake))
        distance = jnp.mean(size * jnp.abs(of_target - real), axis=(1, 2, 3, 4))
        g = fake - real
        return g / flow.expand(jnp.maximum(distance, 1e-6), g) if normalizer == "real" else g, distance

    g, distance = jax.vmap(of_draw)(pair.x0_real, pair.x0_fake)
    g = jax.lax.stop_gradient(jnp.mean(g, axis=0))
    weight = size * flow.expand(frame_weights(g, dynamic, growth), y)
    loss_B = 0.5 * jnp.mean(weight * jnp.square(y - (still - g)), axis=(1, 2, 3, 4))
    metrics = {"gradient": jnp.mean(size * jnp.abs(g)), "distance": jnp.mean(jax.lax.stop_gradient(distance))}
    return loss_B, metrics


def differences(x: Float[Array, "B T H W C"], name: str = "motion") -> Float[Array, "B F H W C"]:
    """x[1:] - x[:-1] along the frames; ValueError, about the loss ``name``, for a video of one frame."""
    if x.shape[1] < 2:
        raise ValueError(f"{name}: a video of one frame has no motion; use at least 2 latent frames.")
    return jnp.diff(x, axis=1)


def frame_weights(
    g: Float[Array, "B F H W C"], dynamic: float | int = 0.7, growth: float | int = 1.2
) -> Float[Array, "B F"]:
    """h of ``motion`` for F differences of frames, or features of them; no gradient flows through it."""
    power = jnp.mean(jnp.square(jax.lax.stop_gradient(g)), axis=(2, 3, 4))
    share = jnp.cumsum(power, axis=1) / jnp.maximum(jnp.sum(power, axis=1, keepdims=True), 1e-12)
    rising = jnp.asarray(growth, jnp.float32) ** jnp.arange(g.shape[1], dtype=jnp.float32)
    return dynamic * (1.0 + share) + (1.0 - dynamic) * (rising / jnp.mean(rising))[None]
