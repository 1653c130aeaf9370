"""Moving shapes: is the captioned object there, does it move the captioned way, and for how long.

An oracle reads shape, colour and position back from the pixels (``oracle.py``, ``metrics.py``); nothing is learned.
"""

import math

from greedy_distill_jax.eval import gates, metrics, oracle
from greedy_distill_jax.eval.comparison import HORIZON, Comparison
from greedy_distill_jax.eval.suites import Column, Measured, Plot, Suite, keys_of
from greedy_distill_jax.eval.tables import NOT_THERE

COLUMNS = (
    Column(
        "direction",
        "Direction",
        "Share of videos whose object moves the way the caption says; 100% is perfect.",
        format="share",
        better="higher",
        error="direction_se",
    ),
    Column(
        "valid_first",
        "Valid, first window",
        "Share of frames at the start of a long rollout in which the oracle reads back a well-formed object of the "
        "captioned kind.",
        format="share",
        better="higher",
        error="valid_first_se",
    ),
    Column(
        "valid_last",
        "Valid, last window",
        "The same share at the end of the rollout, far beyond the training length; close to the first window means no "
        "drift.",
        format="share",
        better="higher",
        error="valid_last_se",
    ),
    Column(
        "caption",
        "Caption",
        "Share of videos in which everything the caption says is read back from the pixels; never judge by it alone.",
        format="share",
        better="higher",
        error="caption_se",
    ),
    Column(
        "fd_first",
        "FD, first window",
        "Fréchet distance between features of generated and real frame pairs, at the start of the rollout; the data "
        "row is the noise floor.",
        format="distance",
        better="lower",
    ),
    Column(
        "fd_last",
        "FD, last window",
        "The same distance at the end of the rollout; close to the first window means no drift.",
        format="distance",
        better="lower",
    ),
    Column(
        "step_std",
        "Step spread, first window",
        "Standard deviation of how far objects move in one frame: the diversity of the motion; far below the data row "
        "it has collapsed to its average.",
        unit="px",
        format="distance",
        better="data",
    ),
    Column(
        "step_std_last",
        "Step spread, last window",
        "The same in the last window.",
        unit="px",
        format="distance",
        better="data",
    ),
    Column(
        "flicker",
        "Flicker",
        "How much pixel values change from one frame to the next; blur also scores low, so never judge by it alone.",
        format="distance",
        better="data",
        error="flicker_se",
    ),
    Column(
        "wobble",
        "Wobble",
        "Movement across the captioned direction per frame.",
        unit="px",
        format="distance",
        better="lower",
    ),
)


def measure(comparison: Comparison) -> Measured:
    """Measures every entry's videos against their captions and other real videos, as a whole and frame by frame."""
    frames, rows, valid, quality = comparison.training_frames, [], {}, {}
    for name, entry in comparison.entries.items():
        found = metrics.evaluate_videos(
            entry.video_VTHWC, comparison.captions, window=frames, reference_VTHWC=comparison.reference_VTHWC
        )
        row = {"name": name} | {key: found[key] for column in COLUMNS for key in keys_of(column)}
        if entry.video_VTHWC.shape[1] == frames:  # no longer than the first window
            row |= dict.fromkeys(("valid_last", "fd_last", "step_std_last"), NOT_THERE) | {"valid_last_se": None}
        # Where no frame is valid there is no motion, and without captioned directions none is right: a dash, no error.
        row |= {key: None if key.endswith("_se") else NOT_THERE for key, x in row.items() if x != x}
        rows.append(row)
        valid[name] = found["valid_by_frame"]
        quality[name] = oracle.read(entry.video_VTHWC).iou_VT.mean(0).tolist()
    return Measured(
        rows,
        plots=(
            _by_frame(
                "Validity",
                "Share of videos whose frame shows a well-formed object of the captioned kind. Higher is better; a "
                "line that stays flat past the training length means that errors do not build up.",
                valid,
                frames,
            ),
            _by_frame(
                "Quality",
                "Agreement of each frame with the best matching template of the captioned object. Higher is better, "
                "1 is perfect; a falling line is drift.",
                quality,
                frames,
            ),
        ),
        note="“First” and “last” are the first and the last window of frames of a long rollout; a teacher makes one "
        "window. ± is the standard error over videos, 0 where all agree. The Fréchet distances have none: judge them "
        "against the row of real videos.",
    )


def _by_frame(what: str, text: str, lines: dict[str, list[float]], training_frames: int) -> Plot:
    text += f" The marker at frame {training_frames} is the training length: nothing to its right was ever trained on."
    return Plot(
        f"{what} over the frame index",
        text,
        "Frame index",
        what,
        lines,
        x_end=HORIZON * training_frames,
        y_limits=(0.0, 1.0),
        marker=(training_frames, "training length"),
    )


def claims(measured: Measured, comparison: Comparison) -> list[dict]:
    """Claims that the teacher follows captions, its student loses little, and stages 2 and 3 (if there) help."""
    rows = {row["name"]: {k: math.nan if x == NOT_THERE else x for k, x in row.items()} for row in measured.rows}
    told = (oracle.captioned(comparison.captions, len(comparison.captions))[:, 2] >= 0).all()
    found = gates.quality_gates(rows["teacher"], rows["stage1"], direction=bool(told))
    if "stage2" in rows:
        found += gates.stage2_gates(rows["stage2"], rows["stage1_few_steps"], rows["data"])
    if {"stage2", "stage3"} <= rows.keys():
        found += gates.stage3_gates(rows["stage3"], rows["stage2"], rows["data"])
    return found


SUITE = Suite(
    name="moving_shapes",
    title="Long videos",
    text="A student that streams must stay as good long after the length it was trained on.",
    columns=COLUMNS,
    measure=measure,
    gates=claims,
    applies=lambda comparison: comparison.of_shapes,
    of_models=True,
)
