"""What a run must reach before it may call itself trained, as data: the report shows it, the tests enforce it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DIRECTION = 0.95  # videos in which the teacher moves the captioned object the captioned way
BEHIND_TEACHER = 0.05  # valid frames the student may lose to its teacher
LAST_OVER_FIRST = 0.9  # valid frames in the last window over the first, at 8x the training length
WINDOWS = ("first", "last")  # each has gates of its own, for neither to hide behind the other
# Limits by window. In the last one every few-step stream slows down, stage 1's with its many steps too: its limits are
# what stage 2 reaches there in the committed runs of the quickstart (docs/results.md) with a margin.
STAGE2_FD = {"first": 0.75, "last": 0.85}  # Frechet distance over stage 1's, real videos' own subtracted from both
MOTION = {"first": (0.75, 1.25), "last": (0.5, 1.25)}  # spread of step lengths over that of real videos
STEP_STD = {"first": "step_std", "last": "step_std_last"}
# Of stage 3, in the last window, whose motion it is for; what it may cost in well-formed objects is a limit as well.
STAGE3_FD, STAGE3_MOTION, STAGE3_VALID = 0.9, 1.1, 0.15


def gate(name: str, value: float | None, threshold: str, passed: bool | np.bool_ | None) -> dict[str, Any]:
    """Returns one claim as metrics.json has it; ``passed`` is None where nothing was measured."""
    return {"name": name, "value": value, "threshold": threshold, "passed": None if passed is None else bool(passed)}


def quality_gates(
    teacher: Mapping[str, Any], student: Mapping[str, Any], *, direction: bool = True
) -> list[dict[str, Any]]:
    """Returns the gates on two rows of metrics (keys direction, valid_first, valid_last).

    Args:
      teacher, student: the rows.
      direction: whether the captions tell one.
    """
    floor = teacher["valid_first"] - BEHIND_TEACHER
    ratio = student["valid_last"] / student["valid_first"] if student["valid_first"] else 0.0
    out = [
        _at_least("student valid in as many frames as its teacher, less 5 points", student["valid_first"], floor),
        _at_least("student's last window over its first, valid frames, 8x the training length", ratio, LAST_OVER_FIRST),
    ]
    if direction:
        out.insert(0, _at_least("teacher moves the object as captioned", teacher["direction"], DIRECTION))
    return out


def stage2_gates(stage2: Mapping[str, Any], stage1: Mapping[str, Any], real: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the gates on a stream of stage 2, next to one of stage 1 at the same evaluations per frame.

    Args:
      stage2, stage1, real: metrics of both streams and of real videos, with the same reference; keys fd_first, fd_last,
        step_std, step_std_last.
    """
    out = []
    for window in WINDOWS:
        before, after = (corrected_fd(row, real, (window,)) for row in (stage1, stage2))
        out.append(
            gate(
                f"stage 2's Frechet distance over stage 1's, same evaluations, less real videos' own, {window} window",
                round(after / before, 4) if before > 0 else None,
                f"<= {STAGE2_FD[window]}",
                after <= STAGE2_FD[window] * max(before, 0.0),
            )
        )
    for window in WINDOWS:
        motion, (low, high) = motion_spread(stage2, real, (window,)), MOTION[window]
        out.append(
            gate(
                f"spread of stage 2's step lengths over that of real videos, {window} window",
                round(motion, 4),
                f"{low} to {high}",
                low <= motion <= high,
            )
        )
    return out


def stage3_gates(stage3: Mapping[str, Any], stage2: Mapping[str, Any], real: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the gates on the last window of a stream of stage 3, next to one of the stage 2 that it started from.

    Args:
      stage3, stage2, real: metrics of both streams and of real videos, with the same reference; keys fd_last,
        step_std_last and valid_last.
    """
    before, after = (corrected_fd(row, real, ("last",)) for row in (stage2, stage3))
    pace, pace_before = (motion_spread(row, real, ("last",)) for row in (stage3, stage2))
    lost = stage2["valid_last"] - stage3["valid_last"]
    return [
        gate(
            "stage 3's Frechet distance over stage 2's, less real videos' own, last window",
            round(after / before, 4) if before > 0 else None,
            f"<= {STAGE3_FD}",
            after <= STAGE3_FD * max(before, 0.0),
        ),
        gate(
            "spread of stage 3's step lengths over stage 2's, last window",
            round(pace / pace_before, 4) if pace_before else None,
            f">= {STAGE3_MOTION}",
            pace >= STAGE3_MOTION * pace_before > 0,
        ),
        gate(
            "valid frames that stage 3 loses, last window", round(lost, 4), f"<= {STAGE3_VALID}", lost <= STAGE3_VALID
        ),
    ]


def corrected_fd(row: Mapping[str, Any], real: Mapping[str, Any], windows: Sequence[str] = WINDOWS) -> float:
    """Returns the Frechet distance, mean of windows, less that of real videos to the same reference."""
    return sum(row[f"fd_{window}"] - real[f"fd_{window}"] for window in windows) / len(windows)


def motion_spread(row: Mapping[str, Any], real: Mapping[str, Any], windows: Sequence[str] = WINDOWS) -> float:
    """Returns the standard deviation of step lengths, mean of windows, over that of real videos."""
    found, wanted = (sum(values[STEP_STD[window]] for window in windows) for values in (row, real))
    return found / wanted


def _at_least(name: str, value: float, floor: float) -> dict[str, Any]:
    return gate(name, round(value, 4), f">= {floor:.4f}", value >= floor and value > 0)
