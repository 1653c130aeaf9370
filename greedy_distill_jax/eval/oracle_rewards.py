"""Rewards for drawn moving shapes, from what the oracle reads; nothing in them is learned.

They are what the evaluation measures: a row that is trained on one of them is judged by the others.
"""

import numpy as np
from jaxtyping import Float32

from greedy_distill_jax.data.sources import moving_shapes as ms
from greedy_distill_jax.eval import oracle
from greedy_distill_jax.ranges import Fraction
from greedy_distill_jax.rewards import HostView, reward


@reward(kind="host")
def validity(view: HostView, *, iou: Fraction = oracle.IOU_THRESHOLD) -> Float32[np.ndarray, " B"]:
    """The share of judged frames that are valid (`oracle.valid`), in [0, 1].

    A colour that the caption does not name is the one of the stream's first frames. A frozen video is as valid.

    Raises:
      UserError: frames that are not square, or a caption that is not one of the moving shapes'.
    """
    _, valid = _read(view, iou)
    return valid.mean(1, dtype=np.float32)


@reward(kind="host")
def oracle_colour_kept(view: HostView) -> Float32[np.ndarray, " B"]:
    """Minus the mean |rgb of the object - its mean over the first frames| of the judged frames and the channels.

    Raises:
      UserError: frames that are not square.
    """
    rgb = oracle.read(view.video_BTHWC).rgb_VT3
    start = oracle.read(view.first_BSHWC).rgb_VT3.mean(1, keepdims=True)
    return -np.abs(rgb - start).mean((1, 2), dtype=np.float32)


@reward(kind="host")
def direction_kept(view: HostView) -> Float32[np.ndarray, " B"]:
    """The share in [0, 1] of the object's movement that goes along the axis it has to keep to.

    sum |along| / (sum |along| + sum |across|) over the steps between two valid judged frames; 0 without a valid step
    or a movement, so that a frozen video is the worst. The axis is the captioned one, or the one along which a
    wandering shape moved most in the first frames. Objects bounce: a turn on the axis costs nothing.

    Raises:
      UserError: frames that are not square, or a caption that is not one of the moving shapes'.
    """
    reading, valid = _read(view, oracle.IOU_THRESHOLD)
    first, steps = view.first_BSHWC.shape[1], np.abs(reading.velocity_VT2)
    named = oracle.captioned(view.captions, len(steps))[:, 2]
    axis = np.where(named < 0, steps[:, :first].sum(1).argmax(1), np.abs(ms.DIRECTION_XY[named, 1]).astype(int))
    counts = valid[:, 1:] & valid[:, :-1]
    moved = (steps[:, first + 1 :] * counts[..., None]).sum(1)
    along = np.take_along_axis(moved, axis[:, None], 1)[:, 0]
    return (along / np.maximum(moved.sum(1), 1e-6)).astype(np.float32)


def _read(view: HostView, iou: float) -> tuple[oracle.OracleReading, np.ndarray]:
    """(reading of the first frames and the judged ones behind them, valid [B, T] of the judged ones)."""
    first = view.first_BSHWC.shape[1]
    reading = oracle.read(np.concatenate([view.first_BSHWC, view.video_BTHWC], axis=1))
    return reading, oracle.valid(reading, view.captions, iou_threshold=iou, window=first)[:, first:]
