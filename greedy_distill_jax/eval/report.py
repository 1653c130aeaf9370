"""The evaluation report: metrics.json for programs and one self-contained report.html for people.

Takes numbers and arrays that were measured elsewhere. The page loads nothing, so it can be mailed, archived or opened
without a network.
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval import page, tables
from greedy_distill_jax.eval.page import Section, Videos
from greedy_distill_jax.storage.partial import Partial


def write_report(
    directory: str | os.PathLike,
    *,
    metrics: dict,
    sections: Sequence[Section],
    videos: Videos,
    captions: Sequence[str],
    fps: float = 8.0,
) -> Path:
    """Writes metrics.json and the self-contained report.html; each file is replaced whole or not at all.

    Args:
      directory: where to write; created if it is not there.
      metrics: what metrics.json holds, see ``tables.validate_metrics``.
      sections: parts of the page; the one named "rows" has the table of models.
      videos: column name (data, teacher, ...) to one uint8 [T, H, W, 3] video per caption, in columns' order; None for
        a video that was not made. Within a row shorter videos are padded with their last frame, dimmed.
      captions: one per row of videos.
      fps: frame rate of the videos in the page.

    Returns:
      The path of report.html.

    Raises:
      UserError: for metrics that do not fit the schema, and (field "output") a directory that cannot be written.
    """
    tables.validate_metrics(metrics)
    metrics = tables.plain(metrics)
    html = page.render(metrics, sections, videos, captions, fps)
    text = json.dumps(metrics, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_all(Path(directory), {"metrics.json": text.encode(), "report.html": html.encode()}, "the report")
    return Path(directory) / "report.html"


def write_all(directory: Path, contents: Mapping[str, bytes], what: str) -> None:
    """Writes files beside their targets first and renames them when all are complete; leaves nothing half-written.

    Args:
      directory: of the files; created if it is not there.
      contents: name -> what is in the file.
      what: they are together, for the error.

    Raises:
      UserError: (field "output") it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            partials = []
            for name, content in contents.items():
                partials.append(Partial(directory / name))
                stack.callback(partials[-1].abort)  # nothing once it has its name
                partials[-1].path.write_bytes(content)
            for partial in partials:
                partial.commit()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot write {what} to {directory}: {reason}; choose a writable directory", "output"
        ) from error
