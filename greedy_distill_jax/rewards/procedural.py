"""Rewards that are formulas of pixels: nothing in them is learned, all have a gradient, all are easily pleased.

Each docstring says which video pleases it and should not. v is the video in [0, 1], y its luma.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ranges import Count, Natural, NotNegative, Positive, at_least
from greedy_distill_jax.rewards.protocol import View, reward

_LUMA = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709
_EDGE = 0.02  # least gradient of the luma per pixel where motion can be seen
_FASTEST = 8.0  # pixels per frame; faster is no motion but a cut


@reward(kind="jax", differentiable=True)
def flicker(view: View) -> Float32[Array, " B"]:
    """Minus mean |v[t+1] - v[t]|, for calm videos. A frozen one is best, with 0. Never optimise it alone.

    Raises:
      UserError: fewer than 2 frames.
    """
    return -jnp.mean(jnp.abs(jnp.diff(_frames(view, 2, "flicker"), axis=1)), axis=(1, 2, 3, 4))


@reward(kind="jax", differentiable=True)
def smooth2(view: View) -> Float32[Array, " B"]:
    """Minus mean |v[t-1] - 2 v[t] + v[t+1]|, for a constant pace. A frozen video is best, with 0, and a fade as good.

    Raises:
      UserError: fewer than 3 frames.
    """
    return -jnp.mean(jnp.abs(jnp.diff(_frames(view, 3, "smooth2"), 2, axis=1)), axis=(1, 2, 3, 4))


@reward(kind="jax", differentiable=True)
def motion_band(view: View, *, target: Positive | None = None, width: Positive = 0.5) -> Float32[Array, " B"]:
    """exp(-log(m / target)^2 / (2 width^2)) in (0, 1], for as much motion as wanted, neither less nor more.

    m is the mean of the normal flow u = |y[t+1] - y[t]| / sqrt(|grad y|^2 + 1e-3), at most 8 pixels per frame, over the
    pixels with an edge, |grad y| > 0.02 per pixel. Camera shake and crawling noise please it as well as motion does.

    Args:
      target: pixels per frame; None takes m of the stream's first frames.
      width: of the band, in powers of e.

    Raises:
      UserError: fewer than 2 frames.
    """
    if target is None:
        wanted = jnp.log(_motion(_frames(view, 2, "motion_band", first=True)))
    else:
        wanted = jnp.log(jnp.full(len(view.video_BTHWC), target, jnp.float32))
    off = jnp.log(_motion(_frames(view, 2, "motion_band"))) - wanted
    return jnp.exp(-jnp.square(off / width) / 2)


@reward(kind="jax", differentiable=True)
def anti_drift(view: View, *, segments: Count = 4, clipped: NotNegative = 5.0) -> Float32[Array, " B"]:
    """Colours' mean and spread stay those of the first frames.

    The mean over the segments k of the judged frames of - |mu_k - mu_0|^2 - |sd_k - sd_0|^2 - clipped relu(c_k - c_0):
    mu and sd are mean and standard deviation of luma, red - green and (red + green) / 2 - blue over a segment's pixels,
    c the share of values near 0 or 1, and segment 0 the first frames. What moves on keeps it, what stands still, too;
    a real change of the scene is punished.

    Args:
      segments: that the judged frames are cut into.
      clipped: weight of values that became black or white.
    """
    video = view.video_BTHWC
    frames, cuts = video.shape[1], min(segments, video.shape[1])
    mean_0, spread_0, clipped_0 = _colours(view.first_BSHWC)
    total = jnp.zeros(len(video), jnp.float32)
    for k in range(cuts):
        mean, spread, share = _colours(video[:, k * frames // cuts : (k + 1) * frames // cuts])
        moved = jnp.sum(jnp.square(mean - mean_0) + jnp.square(spread - spread_0), axis=1)
        total = total - moved - clipped * jax.nn.relu(share - clipped_0)
    return total / cuts


@reward(kind="jax", differentiable=True)
def sharp_hold(view: View) -> Float32[Array, " B"]:
    """Minus |log(s(video) / s(first))|, s the mean over frames of the variance of the Laplacian of y, to stay as sharp.

    Blur and noise both lose; a still copy of the first frame is best, with 0.
    """
    return -jnp.abs(jnp.log(_sharpness(view.video_BTHWC) / _sharpness(view.first_BSHWC)))


@reward(kind="jax", differentiable=True)
def seam(view: View, *, chunk: Annotated[int, at_least(2)] = 4, start: Natural = 0) -> Float32[Array, " B"]:
    """Minus relu(a / b - 1), so that frames change no more where chunks meet than inside of them.

    a and b are the mean |v[t+1] - v[t]| over the pairs of frames on both sides of a seam, and over the others. A frozen
    video has 0, and so has one that flickers everywhere.

    Args:
      chunk: frames of video that a chunk makes.
      start: frames before the first judged chunk begins: the seams lie before the frames start + k chunk.

    Raises:
      UserError: the judged frames hold no seam.
    """
    change = jnp.mean(jnp.abs(jnp.diff(_frames(view, 2, "seam"), axis=1)), axis=(2, 3, 4))
    seams = [t for t in range(change.shape[1]) if t + 1 >= start and (t + 1 - start) % chunk == 0]
    inside = [t for t in range(change.shape[1]) if t not in seams]
    if not seams or not inside:
        raise UserError(
            f"reward seam: {view.video_BTHWC.shape[1]} frames hold no seam between chunks of {chunk} that begin at "
            f"frame {start}; judge more frames, or give the options chunk and start.",
            "options",
        )
    across, within = (jnp.mean(change[:, jnp.asarray(of)], axis=1) + 1e-4 for of in (seams, inside))
    return -jax.nn.relu(across / within - 1.0)


def _frames(view: View, least: int, name: str, *, first: bool = False) -> Float32[Array, "B T H W 3"]:
    frames = view.first_BSHWC if first else view.video_BTHWC
    if frames.shape[1] < least:
        which = "first frames are given" if first else "frames are judged"
        raise UserError(f"reward {name}: {frames.shape[1]} {which}, it compares {least}; let it have more.")
    return frames


def _luma(video: Float32[Array, "B T H W 3"]) -> Float32[Array, "B T H W"]:
    return jnp.einsum("bthwc,c->bthw", video, jnp.asarray(_LUMA, jnp.float32))


def _motion(video: Float32[Array, "B T H W 3"]) -> Float32[Array, " B"]:
    """m of ``motion_band`` plus 1e-3, so that a still video has a logarithm."""
    y = _luma(video)
    between = (y[:, 1:] + y[:, :-1]) / 2
    across = (between[:, :, 1:-1, 2:] - between[:, :, 1:-1, :-2]) / 2
    down = (between[:, :, 2:, 1:-1] - between[:, :, :-2, 1:-1]) / 2
    slope = jnp.square(across) + jnp.square(down)
    flow = jnp.abs(jnp.diff(y, axis=1))[:, :, 1:-1, 1:-1] / jnp.sqrt(slope + 1e-3)
    edge = (slope > _EDGE**2).astype(jnp.float32)
    seen = jnp.sum(edge, axis=(1, 2, 3))
    return jnp.sum(edge * jnp.minimum(flow, _FASTEST), axis=(1, 2, 3)) / jnp.maximum(seen, 1.0) + 1e-3


def _colours(
    video: Float32[Array, "B T H W 3"],
) -> tuple[Float32[Array, "B 3"], Float32[Array, "B 3"], Float32[Array, " B"]]:
    """(mean [B, 3], spread [B, 3], share of clipped values [B]) of ``anti_drift``."""
    red, green, blue = (video[..., i] for i in range(3))
    opponent = jnp.stack([_luma(video), red - green, (red + green) / 2 - blue], axis=-1)
    mean, spread = jnp.mean(opponent, axis=(1, 2, 3)), jnp.var(opponent, axis=(1, 2, 3))
    near_end = jax.nn.sigmoid((video - 0.98) / 0.01) + jax.nn.sigmoid((0.02 - video) / 0.01)
    return mean, jnp.sqrt(spread + 1e-6), jnp.mean(near_end, axis=(1, 2, 3, 4))


def _sharpness(video: Float32[Array, "B T H W 3"]) -> Float32[Array, " B"]:
    """s of ``sharp_hold`` plus 1e-6, so that a flat video has a logarithm."""
    y = _luma(video)
    around = y[:, :, :-2, 1:-1] + y[:, :, 2:, 1:-1] + y[:, :, 1:-1, :-2] + y[:, :, 1:-1, 2:]
    return jnp.mean(jnp.var(around - 4 * y[:, :, 1:-1, 1:-1], axis=(2, 3)), axis=1) + 1e-6
