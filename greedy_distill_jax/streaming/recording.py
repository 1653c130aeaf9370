"""Video files that are written while their frames are made."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from greedy_distill_jax.data.video_io import VideoWriter

WIDTH = 128  # pixels that small videos are enlarged to


def output_paths(output: str | Path, videos: int) -> list[Path]:
    """Returns one file for each video: out.mp4, or out-0.mp4, out-1.mp4, ..."""
    path = Path(output)
    return [path] if videos == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(videos)]


class Recording:
    """One video file for each video of a batch; all appear complete under their names, or none does.

    Use it as a context manager, opened before the first frame is made: a name that cannot be written should not cost a
    video. Memory does not grow with the length (except of a .gif).

    Attributes:
      paths: of the files.
      fps: frames per second; may be set until the first chunk.
    """

    def __init__(self, paths: Sequence[Path], *, fps: float | int | None = None, upscale: int = 0):
        """Opens the files.

        Args:
          paths: of the files, .mp4, .webm or .gif, in the order of the batch.
          fps: frames per second; None if it is set later.
          upscale: pixels per pixel; 0 makes small videos about 128 pixels wide.

        Raises:
          UserError: a file that cannot be written, as for ``VideoWriter``.
        """
        self.paths, self._fps, self._upscale = list(paths), fps, upscale
        with contextlib.ExitStack() as stack:
            options = dict(fps=1 if fps is None else fps, upscale=upscale or 1)
            self._writers = [stack.enter_context(VideoWriter(path, **options)) for path in self.paths]
            stack.pop_all()  # closed together, at the end

    @property
    def fps(self) -> float | int | None:
        """Frames per second; UserError when it is set to a rate that a file cannot hold."""
        return self._fps

    @fps.setter
    def fps(self, value: float | int) -> None:
        for writer in self._writers:
            writer.fps = value
        self._fps = value

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.abort)  # nothing once it has its name
            if kind is None:
                for act in (VideoWriter.finish, VideoWriter.commit):
                    for writer in self._writers:
                        act(writer)

    def write(self, frames: UInt8[np.ndarray, "B T H W 3"]) -> None:
        """Appends the next frames of every video; ValueError while there is no ``fps``."""
        if self._fps is None:
            raise ValueError("Recording: set fps before the first frame")
        for writer, video in zip(self._writers, frames, strict=True):
            writer.upscale = self._upscale or max(1, WIDTH // frames.shape[3])
            for frame in video:
                writer.write(frame)
