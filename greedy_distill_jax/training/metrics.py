"""What a run says: TensorBoard events, a JSON-lines file of scalars, and progress on stderr."""

import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from greedy_distill_jax.data.video_io import encode_gif
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.partial import whole

SCALARS = "scalars.jsonl"
UNKNOWN = "reward/"  # begins the names of metrics that may be NaN: then nothing was measured, and nothing is logged


class MetricWriter:
    """Writes scalars and videos of one run; does nothing when not `enabled` (every process but the first).

    Args:
      logdir: directory of the run; TensorBoard events and `scalars.jsonl` go here.
      enabled: False turns every method into a no-op.
      resume_step: the step the run goes on from; later lines of `scalars.jsonl` (written by a run that was killed
        before its next checkpoint) are dropped, and TensorBoard is told to drop later events.
      fps: of GIFs.
    """

    def __init__(self, logdir: str | os.PathLike, *, enabled: bool = True, resume_step: int = 0, fps: int = 8):
        self._enabled, self._fps, self._path = enabled, fps, Path(logdir).expanduser()
        if not enabled:
            return
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        with self._disk():
            self._path.mkdir(parents=True, exist_ok=True)
            _drop_after(self._path / SCALARS, resume_step)
            self._lines = (self._path / SCALARS).open("a", encoding="utf-8")
            self._events = EventFileWriter(os.fspath(self._path))
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._events.add_event(event_pb2.Event(wall_time=time.time(), step=resume_step + 1, session_log=session))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes {tag: number} of one step."""
        if not self._enabled:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = {tag: float(value) for tag, value in values.items()}
        now = time.time()
        self._add(now, step, Summary(value=[Summary.Value(tag=tag, simple_value=x) for tag, x in values.items()]))
        finite = {tag: x if math.isfinite(x) else str(x) for tag, x in values.items()}
        line = json.dumps({"step": int(step), "time": round(now, 3), **finite}, allow_nan=False)
        with self._disk():
            self._lines.write(line + "\n")
            self._lines.flush()  # one write per line: a killed run leaves at most one torn line

    def gif(self, step: int, tag: str, video_THWC: np.ndarray) -> None:
        """Writes a uint8 video [T, H, W, 3], shown as an animated image."""
        if not self._enabled:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        data = encode_gif(video_THWC, fps=self._fps)
        _, height, width, _ = np.shape(video_THWC)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        self._add(time.time(), step, Summary(value=[Summary.Value(tag=tag, image=image)]))

    def _add(self, now: float, step: int, summary) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        with self._disk():
            self._events.add_event(Event(wall_time=now, step=int(step), summary=summary))

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written ({error.strerror or error}); free space, or choose another directory."
            ) from error

    def flush(self) -> None:
        """Everything written so far reaches the files."""
        if self._enabled:
            with self._disk():
                self._lines.flush()
                self._events.flush()

    def close(self) -> None:
        """Flushes and closes; calling it twice is fine."""
        if self._enabled:
            self._enabled = False
            with self._disk(), contextlib.ExitStack() as stack:
                stack.callback(self._events.close)
                stack.callback(self._lines.close)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_scalars(logdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of `scalars.jsonl`: dictionaries with step, time and one number per tag ("nan" as text).

    Raises:
      UserError: the file holds something else.
    """
    path = Path(logdir).expanduser() / SCALARS
    try:
        return _parse(path.read_bytes()) if path.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not hold the scalars of a run ({error}); move it away.") from error


def _parse(content: bytes) -> list[dict[str, Any]]:
    """The complete lines, without one that a kill tore; ValueError when one is not a line of ours."""
    lines = []
    for number, text in enumerate(content.split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise ValueError("it has no step")
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        lines.append(line)
    return lines


def _drop_after(path: Path, step: int) -> None:
    """Removes the lines after a step; a file of something else is moved aside, with a line."""
    if not path.exists():
        return
    try:
        kept = [line for line in _parse(path.read_bytes()) if line["step"] <= step]
    except ValueError as error:
        aside = next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.{n}")).exists())
        path.replace(aside)
        told = f"{path} does not hold the scalars of a run ({error}); moved to {aside}"
        print(f"warning: {told}", file=sys.stderr, flush=True)
        return
    with whole(path) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
