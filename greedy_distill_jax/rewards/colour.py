"""The colour of what stands out from the background, in any video."""

from types import ModuleType
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ranges import one_of
from greedy_distill_jax.rewards.protocol import View, reward

SINCE = ("first", "previous")


@reward(kind="jax", differentiable=True)
def colour_kept(view: View, *, since: Annotated[str, one_of(*SINCE)] = "first") -> Float32[Array, " B"]:
    """Minus the mean over frames and channels of |c_t - c|, so that what stands out keeps its colour.

    c_t is ``salient_colour`` of a judged frame. What stands out is found without a gradient, so that colours change,
    not what counts. Content that vanishes loses, content that stands still does not; where the background's colour
    drifts as well, c_t follows it only as far as content does.

    Args:
      since: what c is. "first": the mean over the first frames, which a student may have forgotten: it then learns what
        is common to all videos, such as paler colours. "previous": c_{t-1}, which it sees.

    Raises:
      UserError: fewer than 2 frames, where each is compared with the one before.
    """
    frames = _colour_by_frame(view.video_BTHWC)
    if since == "previous":
        if frames.shape[1] < 2:
            raise UserError("reward colour_kept: 1 frame is judged, it compares 2; let it have more.")
        return -jnp.mean(jnp.abs(jnp.diff(frames, axis=1)), axis=(1, 2))
    first = jnp.mean(_colour_by_frame(view.first_BSHWC), axis=1, keepdims=True)
    return -jnp.mean(jnp.abs(frames - first), axis=(1, 2))


def _colour_by_frame(video: Float32[Array, "B T H W 3"]) -> Float32[Array, "B T 3"]:
    weight, background = jax.lax.stop_gradient(salience(video, jnp))
    return salient_colour(video, weight, background, jnp)


def salience(video: Any, numpy: ModuleType) -> tuple[Any, Any]:
    """(weights of pixels, background) of frames.

    The background is the median of the frame's border in every channel; a pixel weighs its squared distance to it.

    Args:
      video: [B, T, H, W, 3], in [0, 1].
      numpy: `numpy` or `jax.numpy`, whose arrays they are.

    Returns:
      [B, T, H, W, 1] and [B, T, 1, 1, 3].
    """
    edges = video[:, :, 0], video[:, :, -1], video[:, :, 1:-1, 0], video[:, :, 1:-1, -1]
    border = numpy.concatenate(edges, axis=2)
    background = numpy.median(border, axis=2)[:, :, None, None]
    return ((video - background) ** 2).sum(-1, keepdims=True), background


def salient_colour(video: Any, weight: Any, background: Any, numpy: ModuleType) -> Any:
    """The mean colour [B, T, 3] of frames by the weights of ``salience``; an empty frame has its background's."""
    colour = numpy.mean(weight * video, axis=(2, 3)) + 1e-4 * background[:, :, 0, 0]
    return colour / (numpy.mean(weight, axis=(2, 3)) + 1e-4)
