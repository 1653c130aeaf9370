"""Video files: reading frames of any container that FFmpeg decodes, writing mp4, webm and gif while generating."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.partial import Partial

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".avi", ".mkv")
WRITER_SUFFIXES = (".mp4", ".webm", ".gif")

_CODECS = {  # by suffix: container, then encoders in order of preference with their options
    ".mp4": ("mp4", (("libx264", {"crf": "16", "preset": "medium"}), ("mpeg4", {"q": "2"}))),
    ".webm": ("webm", (("libvpx-vp9", {"crf": "20", "b": "0"}), ("libvpx", {"crf": "8", "b": "4M"}))),
}


@dataclass(frozen=True)
class VideoInfo:
    """What the container says: size in pixels, mean frames per second, frame count (0 when not stored)."""

    width: int
    height: int
    fps: float
    frames: int


def probe(path: str | os.PathLike) -> VideoInfo:
    """Size, rate and frame count of a video file; UserError naming the file when no video stream can be opened."""
    with _opened(path) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate or 0
        return VideoInfo(stream.width, stream.height, float(rate), stream.frames)


def read_frames(path: str | os.PathLike, *, fps: float | int | None = None) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Decodes a video file frame by frame, upright RGB uint8 [H, W, 3].

    Args:
      path: any file that FFmpeg decodes.
      fps: None for the frames as stored; otherwise frame k is the one on display at time k / fps after the first frame
        (frames are repeated or dropped, never blended).

    Raises:
      UserError: the file is missing or does not decode to its end, or fps is not positive.
    """
    if fps is not None and not fps > 0:
        raise UserError(f"fps={fps} for {path}; use a positive number", "fps")
    return _read_frames(path, fps)


def _read_frames(path: str | os.PathLike, fps: float | int | None) -> Iterator[np.ndarray]:
    count = 0
    with _opened(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        decoded = _decoded(container, stream, path)
        if fps is None:
            for frame in decoded:
                count += 1
                yield _upright(frame)
        else:
            rate = float(stream.average_rate or 25)
            shown, start, end, image = None, None, 0.0, None
            for index, frame in enumerate(decoded):
                time = frame.time if frame.time is not None else index / rate
                start = time if start is None else start
                while shown is not None and count / fps < time - start - 1e-6:
                    image = _upright(shown) if image is None else image
                    count += 1
                    yield image
                shown, image = frame, None
                duration = frame.duration * frame.time_base if frame.duration and frame.time_base else 0
                end = time - start + (float(duration) or 1 / rate)
            while shown is not None and (count / fps < end - 1e-6 or count == 0):
                image = _upright(shown) if image is None else image
                count += 1
                yield image
    if count == 0:
        raise UserError(f"{path} holds no video frame; give a file with a video stream, or remove it", "path")


def _opened(path: str | os.PathLike) -> av.container.InputContainer:
    try:
        container = av.open(os.fspath(path), metadata_errors="replace")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give the path of a video file", "path") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(
            f"{path} does not decode as video ({_reason(error)}); convert it to mp4, or remove it", "path"
        ) from error
    if not container.streams.video:
        container.close()
        raise UserError(f"{path} has no video stream; give a video file, or remove it", "path")
    return container


def _decoded(container: av.container.InputContainer, stream: av.VideoStream, path: object) -> Iterator[av.VideoFrame]:
    try:
        yield from container.decode(stream)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(
            f"{path} stops decoding as video ({_reason(error)}); convert it to mp4, or remove it", "path"
        ) from error


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).strip().splitlines()[0]


def _upright(frame: av.VideoFrame) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


class VideoWriter:
    """Writes frames to a video file as they come; the file appears complete under its name, or not at all.

    Frames go to a hidden temporary file in the same folder, which is renamed when the `with` block ends and removed
    when it raises. h264 and vp9 need even sides: an odd side is extended by one repeated row or column. A gif is kept
    in memory (one byte per pixel) until the end, because its format is written in one go.

    Example:
      with VideoWriter("out.mp4", fps=8, upscale=8) as writer:
          for frame in frames:
              writer.write(frame)
    """

    def __init__(self, path: str | os.PathLike, *, fps: float | int = 8, upscale: int = 1) -> None:
        """Args: `path` ending in .mp4, .webm or .gif; `fps` > 0; `upscale`, a whole number of pixels per pixel.

        Raises:
          UserError: another extension, a folder that cannot be written, fps or upscale out of range.
        """
        self.path = Path(path)
        suffix = self.path.suffix.lower()
        if suffix not in WRITER_SUFFIXES:
            raise UserError(
                f"cannot write {self.path}: extension {suffix!r} is unknown; use one of {', '.join(WRITER_SUFFIXES)}",
                "path",
            )
        if not fps > 0 or upscale < 1 or upscale != int(upscale):
            raise UserError(
                f"cannot write {self.path}: fps={fps}, upscale={upscale}; use fps > 0, whole upscale >= 1",
                "upscale" if fps > 0 else "fps",
            )
        self.fps, self.upscale, self.frames = fps, int(upscale), 0
        self._suffix = suffix
        self._container = self._stream = None
        self._shape: tuple[int, ...] | None = None
        self._gif: list[Image.Image] = []
        with self._disk("choose a writable folder"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_dir():
                raise IsADirectoryError(0, "a folder")
            self._partial = Partial(self.path)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, frame: UInt8[np.ndarray, "H W 3"]) -> None:
        """Appends one RGB frame; every frame must have the size of the first."""
        frame = np.asarray(frame)
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise TypeError(f"VideoWriter: expected uint8 [H, W, 3], got {frame.dtype} {frame.shape}")
        if self._shape not in (None, frame.shape):
            raise ValueError(f"VideoWriter: frame {self.frames} has shape {frame.shape}, the first had {self._shape}")
        self._shape = frame.shape
        frame = _upscaled(frame, self.upscale)
        if self._suffix == ".gif":
            self._gif.append(_palette(frame))
        else:
            height, width = frame.shape[:2]
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            with self._disk():
                if self._container is None:
                    self._open(*frame.shape[:2])
                self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        self.frames += 1

    def close(self) -> None:
        """Finishes the file and gives it its name; UserError when no frame was written, or the disk is full."""
        self.finish()
        self.commit()

    def finish(self) -> None:
        """Writes what is left to write; `commit` gives the file its name. UserError as for `close`."""
        try:
            if not self.frames:
                raise UserError(f"cannot write {self.path}: no frame was given; generate at least one", "path")
            with self._disk():
                if self._suffix == ".gif":
                    _save_gif(self._gif, self._partial.path, self.fps)
                else:
                    self._container.mux(self._stream.encode(None))
                    self._container.close()
        except BaseException:
            self.abort()
            raise

    def commit(self) -> None:
        """Gives a finished file its name."""
        with self._disk():
            self._partial.commit()

    def abort(self) -> None:
        """Drops what was written; nothing stays behind."""
        try:
            if self._container is not None:
                with contextlib.suppress(OSError):  # a full disk is told already
                    self._container.close()
                self._container = None
        finally:
            self._partial.abort()

    @contextlib.contextmanager
    def _disk(self, remedy: str = "free space, or choose another folder") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {self.path} ({reason}); {remedy}", "path") from error

    def _open(self, height: int, width: int) -> None:
        container, codecs = _CODECS[self._suffix]
        name, options = next((c for c in codecs if c[0] in av.codecs_available), (None, {}))
        if name is None:
            raise UserError(
                f"cannot write {self.path}: PyAV has no encoder for {self._suffix}; write a .gif instead", "path"
            )
        self._container = av.open(os.fspath(self._partial.path), "w", format=container)
        rate = Fraction(self.fps).limit_denominator(1001)
        self._stream = self._container.add_stream(name, rate=rate, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"


def encode_gif(video: UInt8[np.ndarray, "T H W 3"], *, fps: float | int = 8, upscale: int = 1) -> bytes:
    """An endlessly looping GIF of a video (for TensorBoard and reports); delays are rounded to 1/100 s."""
    buffer = io.BytesIO()
    _save_gif([_palette(_upscaled(frame, upscale)) for frame in np.asarray(video)], buffer, fps)
    return buffer.getvalue()


def _upscaled(frame: np.ndarray, factor: int) -> np.ndarray:
    return frame.repeat(factor, 0).repeat(factor, 1) if factor > 1 else frame


def _palette(frame: np.ndarray) -> Image.Image:
    return Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE)


def _save_gif(images: list[Image.Image], target: io.BytesIO | Path, fps: float | int) -> None:
    delay = max(20, round(100 / fps) * 10)  # milliseconds; viewers slow down anything shorter
    images[0].save(target, "GIF", save_all=True, append_images=images[1:], duration=delay, loop=0)
