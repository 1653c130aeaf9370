"""Numbers of generated moving-shape videos: does the captioned object move the captioned way, and for how long.

Frechet distances are biased upwards by small samples: judge with 256 videos or more, against real videos' distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8
from numpy.lib.stride_tricks import sliding_window_view

from greedy_distill_jax.data.sources import moving_shapes as ms
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval import oracle

_LEAST_DISPLACEMENT = 0.5 / 16  # in the captioned direction, as a fraction of the frame
_CONV_CHANNELS = (24, 64)
_CONV_SEED = 0


def evaluate_videos(
    video_VTHWC: UInt8[np.ndarray, "V T H W 3"],
    captions: Sequence[str],
    *,
    window: int = 8,
    reference_VTHWC: UInt8[np.ndarray, "R S A B 3"],
) -> dict[str, Any]:
    """All metrics of generated videos against their captions and against real videos.

    Frames are called valid as in `oracle.valid`; "first" and "last" are windows of `window` frames at the two ends.

    Args:
      video_VTHWC: generated videos, square frames, at least 3 of them and at least `window`.
      captions: the caption of every video.
      window: frames of the first and last window.
      reference_VTHWC: real videos of the same captions and frame size. With at least T frames, each window is compared
        with the same window of the reference; a shorter reference stands for both ends with its own.

    Returns:
      direction: fraction of videos whose object gets further from where it starts in the captioned direction than in
        the other three, within the first window, and at least 0.5 px (at 16x16). Chance is about 1/4.
      valid_first, valid_last: fraction of valid frames in the first and last window.
      valid_by_frame: list of T floats, fraction of videos valid in that frame.
      colour_change_by_frame: list of T floats, mean |rgb of the object - its mean over the first window|, in [0, 1]:
        how far colour has drifted.
      caption: fraction of videos with the captioned direction, and the captioned shape and colour in most frames of the
        first window. Both are over the videos whose caption names a direction, nan without any.
      fd_first, fd_last: Frechet distance of `random_conv_features` to the reference.
      step_std, step_std_last: standard deviation, in pixels, of the step length along the captioned axis between valid
        frames of the window; U(0.2, 2.4) has 0.64, a model without diversity 0.
      flicker: mean change of the object between consecutive frames, |rgb difference| (mean of channels, in [0, 1]) plus
        |difference of the mass ratio|. Blur lowers it: never a headline.
      wobble: mean movement across the captioned axis between consecutive valid frames, pixels per frame; real: about 0.
      step_std, step_std_last and wobble are nan when no two consecutive frames are valid.
      direction_se, valid_first_se, valid_last_se, caption_se, flicker_se: standard errors over videos of what they are
        named for, nan with fewer than two.

    Raises:
      UserError: too few frames for the window, an unknown caption, captions or frame sizes that do not match.
    """
    n_frames = video_VTHWC.shape[1]
    if not 3 <= window <= n_frames or window > reference_VTHWC.shape[1]:
        raise UserError(
            f"evaluate_videos: window={window} with videos of {n_frames} frames and a reference of "
            f"{reference_VTHWC.shape[1]}; use a window of 3 frames or more and videos at least "
            "as long"
        )
    if reference_VTHWC.shape[2:] != video_VTHWC.shape[2:]:
        raise UserError(
            f"evaluate_videos: videos of {video_VTHWC.shape[2:]} against a reference of {reference_VTHWC.shape[2:]}; "
            "draw the reference at the same size"
        )
    reading = oracle.read(video_VTHWC)
    valid = oracle.valid(reading, captions, window=window)
    shape_V, colour_V, direction_V = oracle.expected(reading, captions, window).T
    heading = ms.DIRECTION_XY[direction_V].astype(np.float32)  # [V, 2]
    along = np.einsum("vtk,vk->vt", reading.velocity_VT2, heading)
    across = np.einsum("vtk,vk->vt", reading.velocity_VT2, heading[:, ::-1])
    # A wandering shape moves along an axis of its own.
    sizes, wandering = np.abs(reading.velocity_VT2), (direction_V < 0)[:, None]
    along, across = np.where(wandering, sizes.max(-1), along), np.where(wandering, sizes.min(-1), across)

    # How far from its first position the object gets within the first window. Bouncing brings it back, but real
    # objects have room for two steps before it, so that the furthest point lies the captioned way.
    forward, sideways = (np.cumsum(v[:, 1:window], axis=1) for v in (along, across))
    reach = forward.max(1)
    headed = (reach >= _LEAST_DISPLACEMENT * video_VTHWC.shape[3]) & (reach > (-forward).max(1))
    headed &= reach > np.abs(sideways).max(1)
    matches = (reading.shape_VT == shape_V[:, None]) & (reading.colour_VT == colour_V[:, None])
    # The captioned pair must be seen in more than half of the frames; that makes it the majority.
    named = matches[:, :window].mean(1) > 0.5

    pairs = valid[:, 1:] & valid[:, :-1]
    change = np.abs(np.diff(reading.rgb_VT3, axis=1)).mean(-1) + np.abs(np.diff(reading.mass_VT, axis=1))
    first, last = slice(0, window), slice(n_frames - window, n_frames)
    reference_frames = reference_VTHWC.shape[1]
    end = min(n_frames, reference_frames)
    reference_last = reference_VTHWC[:, end - window : end]

    def step_std(frames: slice) -> float:
        return _or_nan(np.std, np.abs(along[:, frames][:, 1:])[pairs[:, frames.start : frames.stop - 1]])

    rgb_start = reading.rgb_VT3[:, :window].mean(1, keepdims=True)
    colour_change = np.abs(reading.rgb_VT3 - rgb_start).mean((0, 2))

    return {
        "direction": _or_nan(np.mean, headed[direction_V >= 0]),
        "direction_se": standard_error(headed[direction_V >= 0]),
        "valid_first": float(valid[:, first].mean()),
        "valid_first_se": standard_error(valid[:, first].mean(1)),
        "valid_last": float(valid[:, last].mean()),
        "valid_last_se": standard_error(valid[:, last].mean(1)),
        "valid_by_frame": valid.mean(0).tolist(),
        "caption": _or_nan(np.mean, (headed & named)[direction_V >= 0]),
        "caption_se": standard_error((headed & named)[direction_V >= 0]),
        "colour_change_by_frame": colour_change.tolist(),
        "fd_first": frechet_distance(
            random_conv_features(video_VTHWC[:, first]), random_conv_features(reference_VTHWC[:, :window])
        ),
        "fd_last": frechet_distance(random_conv_features(video_VTHWC[:, last]), random_conv_features(reference_last)),
        "step_std": step_std(first),
        "step_std_last": step_std(last),
        "flicker": float(change.mean()),
        "flicker_se": standard_error(change.mean(1)),
        "wobble": _or_nan(np.mean, np.abs(across[:, 1:])[pairs]),
    }


def standard_error(values_V: Any) -> float:
    """Returns the standard error of the mean of independent values; nan with fewer than two."""
    values = np.asarray(values_V, np.float64)
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def frechet_distance(features_a: Float[np.ndarray, "n F"], features_b: Float[np.ndarray, "m F"]) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) with covariances A and B, in float64; the trace of the root is the
    sum of the roots of the eigenvalues of A^(1/2) B A^(1/2). Source: Dowson and Landau 1982; for images Heusel et al.
    2017 (FID).

    Raises:
      UserError: fewer than two rows.
    """
    for features in (features_a, features_b):
        if len(features) < 2:
            raise UserError(f"frechet_distance: {len(features)} rows of features; give at least 2, better 256")
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(covariance_a)
    root_a = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root_a @ covariance_b @ root_a)
    spread = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(np.maximum(product, 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + max(spread, 0.0))


def random_conv_features(video_VTHWC: UInt8[np.ndarray, "V T H W 3"]) -> Float32[np.ndarray, "n 64"]:
    """Features of all pairs of consecutive frames from a fixed random convolutional net; rows are V * (T - 1) pairs.

    Two 3x3 convolutions of stride 2 with relu, then the mean of each of 64 channels over the frame: pairs make motion
    visible. Where in the frame an object is stays out of it on purpose: the spread of positions would triple the
    sampling noise relative to the distances of frozen, blurred or recoloured videos (and validity does not need it).

    Raises:
      UserError: fewer than two frames, or frames smaller than 8 pixels.
    """
    n_videos, n_frames, height, width = video_VTHWC.shape[:4]
    if n_frames < 2 or min(height, width) < 8:
        raise UserError(
            f"random_conv_features: {n_frames} frames of {width}x{height}; give 2 or more of 8x8 pixels or more"
        )
    random = np.random.RandomState(_CONV_SEED)  # numpy's frozen generator: the same net in every version
    kernels, fan_in = [], 6
    for channels in _CONV_CHANNELS:
        kernels.append(random.standard_normal((9 * fan_in, channels)).astype(np.float32) * (2 / (9 * fan_in)) ** 0.5)
        fan_in = channels
    out = np.empty((n_videos, n_frames - 1, _CONV_CHANNELS[-1]), np.float32)
    per_chunk = max(1, (1 << 22) // (n_frames * height * width))
    for start in range(0, n_videos, per_chunk):
        frames = video_VTHWC[start : start + per_chunk].astype(np.float32) / 127.5
        x = np.concatenate([frames[:, :-1], frames[:, 1:]], -1).reshape(-1, height, width, 6)
        for kernel in kernels:
            patches = sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2]  # [n, h, w, C, 3, 3]
            x = np.maximum(patches.reshape(*patches.shape[:3], -1) @ kernel, 0)
        out[start : start + per_chunk] = x.mean((1, 2)).reshape(-1, *out.shape[1:])
    return out.reshape(-1, out.shape[-1])


def real_vs_real(reference_VTHWC: UInt8[np.ndarray, "V T H W 3"], *, window: int = 8) -> float:
    """The floor of `fd_first`: Frechet distance between the first and the second half of real videos, first windows.

    The halves should show the same captions, as halves of "held_out" do. The bias falls as one over the videos per
    side, so that V videos here tell the floor of V / 2; use `frechet_distance` on two seeds for the floor of V.
    """
    features = random_conv_features(reference_VTHWC[:, :window])
    rows = len(features) // len(reference_VTHWC) * (len(reference_VTHWC) // 2)
    return frechet_distance(features[:rows], features[rows:])


def _or_nan(statistic: Any, values: np.ndarray) -> float:
    return float(statistic(values)) if values.size else float("nan")
