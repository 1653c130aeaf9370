"""What a run must reach before it may call itself trained, as data: the report shows it, the tests enforce it."""

from collections.abc import Mapping, Sequence
from typing import Any

DIRECTION = 0.95  # videos in which the teacher moves the captioned object the captioned way
BEHIND_TEACHER = 0.05  # valid frames the student may lose to its teacher
LAST_OVER_FIRST = 0.9  # valid frames in the last window over the first, at 8x the training length
STUDENTS = {"etm_sdd": "ETM + SDD", "causal": "causal student"}  # columns of the timing
GROWTH = 1.1  # time of a frame far into the stream over an early one
STAGE2_FD = 0.75  # Frechet distance of stage 2 over stage 1's, real videos' own distance subtracted from both
MOTION = (0.75, 1.25)  # spread of step lengths over that of real videos


def quality_gates(
    teacher: Mapping[str, Any], student: Mapping[str, Any], *, direction: bool = True
) -> list[dict[str, Any]]:
    """Gates on two rows of metrics (keys direction, valid_first, valid_last).

    ``direction``: whether the captions tell one.
    """
    floor = teacher["valid_first"] - BEHIND_TEACHER
    ratio = student["valid_last"] / student["valid_first"] if student["valid_first"] else 0.0
    out = [
        _gate("student valid in as many frames as its teacher, less 5 points", student["valid_first"], floor),
        _gate("student's last window over its first, valid frames, 8x the training length", ratio, LAST_OVER_FIRST),
    ]
    if direction:
        out.insert(0, _gate("teacher moves the object as captioned", teacher["direction"], DIRECTION))
    return out


def stage2_gates(stage2: Mapping[str, Any], stage1: Mapping[str, Any], real: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Gates on the metrics of the streams of both stages at the same evaluations per frame, and of real videos.

    All three with the same reference; keys fd_first, fd_last, step_std, step_std_last.
    """
    before, after = corrected_fd(stage1, real), corrected_fd(stage2, real)
    motion = motion_spread(stage2, real)
    return [
        {
            "name": "stage 2's Frechet distance over stage 1's, same evaluations, less that of real videos",
            "value": round(after / before, 4) if before > 0 else None,
            "threshold": f"<= {STAGE2_FD}",
            "passed": bool(after <= STAGE2_FD * max(before, 0.0)),
        },
        {
            "name": "spread of stage 2's step lengths over that of real videos",
            "value": round(motion, 4),
            "threshold": f"{MOTION[0]} to {MOTION[1]}",
            "passed": bool(MOTION[0] <= motion <= MOTION[1]),
        },
    ]


def corrected_fd(row: Mapping[str, Any], real: Mapping[str, Any]) -> float:
    """Frechet distance, mean of the first and the last window, less that of real videos to the same reference."""
    return (row["fd_first"] + row["fd_last"] - real["fd_first"] - real["fd_last"]) / 2


def motion_spread(row: Mapping[str, Any], real: Mapping[str, Any]) -> float:
    """Standard deviation of step lengths, mean of the first and the last window, over that of real videos."""
    return (row["step_std"] + row["step_std_last"]) / (real["step_std"] + real["step_std_last"])


def cost_gate(rows: Sequence[Mapping[str, float | int]], early: int, late: int) -> dict[str, Any]:
    """Gate on ``time_per_frame`` rows: the student's frame ``late`` over frame ``early``."""
    column = next(name for name in STUDENTS if name in rows[0])
    by_length = {row["frames"]: row[column] for row in rows}
    growth = by_length[late] / by_length[early]
    name = f"time of frame {late} over frame {early}, {STUDENTS[column]}"
    return {"name": name, "value": round(growth, 4), "threshold": f"<= {GROWTH}", "passed": growth <= GROWTH}


def _gate(name: str, value: float, floor: float) -> dict[str, Any]:
    return {
        "name": name,
        "value": round(value, 4),
        "threshold": f">= {floor:.4f}",
        "passed": bool(value >= floor and value > 0),
    }
