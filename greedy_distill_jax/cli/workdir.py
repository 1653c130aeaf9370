"""A folder that holds one job of several steps, so that the same command goes on and another one is refused."""

import os
import tempfile
from pathlib import Path

from greedy_distill_jax.errors import UserError


def claim(workdir: Path, job: str) -> Path:
    """Creates the folder and returns its file ``job``, which the caller writes once the job is sure to start.

    Args:
      workdir: the folder.
      job: what is to be done there, in words that tell it from any other job.

    Raises:
      UserError: with field "workdir": another job has the folder, or nothing can be written there.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        raise UserError(f"{workdir} cannot be written ({error.strerror}); choose another folder.", "workdir") from error
    marker = workdir / "job"
    try:
        held = marker.read_text(encoding="utf-8", errors="replace") if os.path.lexists(marker) else job
    except OSError as error:
        held = f"{marker} cannot be read: {error.strerror}"
    if held != job:
        raise UserError(f"{workdir} holds another job ({held[:200]}); choose another folder or delete it.", "workdir")
    return marker
