"""What a run must reach before it may call itself trained, as data: the report shows it, the tests enforce it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

DIRECTION = 0.95  # videos in which the teacher moves the captioned object the captioned way
BEHIND_TEACHER = 0.05  # valid frames the student may lose to its teacher
LAST_OVER_FIRST = 0.9  # valid frames in the last window over the first, at 8x the training length
STAGE2_FD = 0.75  # Frechet distance of stage 2 over stage 1's, real videos' own distance subtracted from both
MOTION = (0.75, 1.25)  # spread of step lengths over that of real videos


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
    before, after = corrected_fd(stage1, real), corrected_fd(stage2, real)
    motion = motion_spread(stage2, real)
    return [
        gate(
            "stage 2's Frechet distance over stage 1's, same evaluations, less that of real videos",
            round(after / before, 4) if before > 0 else None,
            f"<= {STAGE2_FD}",
            after <= STAGE2_FD * max(before, 0.0),
        ),
        gate(
            "spread of stage 2's step lengths over that of real videos",
            round(motion, 4),
            f"{MOTION[0]} to {MOTION[1]}",
            MOTION[0] <= motion <= MOTION[1],
        ),
    ]


def corrected_fd(row: Mapping[str, Any], real: Mapping[str, Any]) -> float:
    """Returns the Frechet distance, mean of first and last window, less that of real videos to the same reference."""
    return (row["fd_first"] + row["fd_last"] - real["fd_first"] - real["fd_last"]) / 2


def motion_spread(row: Mapping[str, Any], real: Mapping[str, Any]) -> float:
    """Returns the standard deviation of step lengths, mean of first and last window, over that of real videos."""
    return (row["step_std"] + row["step_std_last"]) / (real["step_std"] + real["step_std_last"])


def _at_least(name: str, value: float, floor: float) -> dict[str, Any]:
    return gate(name, round(value, 4), f">= {floor:.4f}", value >= floor and value > 0)
