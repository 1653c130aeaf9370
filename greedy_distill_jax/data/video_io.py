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
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from jaxtyping import Float, UInt8
from PIL import Image

from greedy_distill_jax.data.display import has_alpha, show
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.partial import Partial

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".avi", ".mkv")
WRITER_SUFFIXES = (".mp4", ".webm", ".gif")

_FPS = (0.1, 240)  # frames per second
_GIF_FPS = 50  # viewers slow down what is faster
_COMPLETE = "copy or record it again, or remove it"
_CODECS = {  # by suffix: container, then encoders in order of preference with their options
    ".mp4": ("mp4", (("libx264", {"crf": "16", "preset": "medium"}), ("mpeg4", {"q": "2"}))),
    ".webm": ("webm", (("libvpx-vp9", {"crf": "20", "b": "0"}), ("libvpx", {"crf": "8", "b": "4M"}))),
}


@dataclass(frozen=True)
class VideoInfo:
    """What a video file shows.

    Attributes:
      width, height: in pixels, as `read_frames` gives them: upright, with square pixels.
      fps: mean frames per second, 0 for a single frame without a rate.
      frames: how many there are.
      variable: whether times between frames differ by more than a quarter from their mean.
      alpha: whether pixels may be transparent; `read_frames` puts them on black.
    """

    width: int
    height: int
    fps: float
    frames: int
    variable: bool
    alpha: bool


def check_fps(fps: float | int, suffix: str = "") -> None:
    """Raises UserError (field "fps") for a rate that is none, or that a container cannot hold.

    Args:
      fps: frames per second.
      suffix: of the file to write, "" for a rate of reading.
    """
    most = _GIF_FPS if suffix == ".gif" else _FPS[1]
    if not _FPS[0] <= fps <= most:
        whose = f" of a {suffix}" if suffix else ""
        raise UserError(f"fps={fps:g} is no rate{whose}; use {_FPS[0]:g} to {most:g} frames per second", "fps")


def probe(path: str | os.PathLike) -> VideoInfo:
    """Reads what a file shows: the times of all its frames, of which the first is decoded.

    Raises:
      UserError: as `read_frames`, except for frames that do not decode after the first.
    """
    times, first = [], None
    with _opened(path) as container:
        stream = _video_stream(container)
        decoder = _decoder(stream, path)
        for packet in _packets(container, stream, path):
            time = packet.dts if packet.pts is None else packet.pts
            if time is not None and not packet.is_discard:
                times.append(float(time * packet.time_base))
            if first is None:
                first = next(iter(_decode(decoder, packet, path)), None)
        if first is None:
            raise _no_frame(path)
        height, width = show(first, _pixel_aspect(stream), path).shape[:2]
        fps, variable = _rate(np.sort(times), stream)
        return VideoInfo(width, height, fps, len(times), variable, has_alpha(first))


def _rate(times: Float[np.ndarray, " n"], stream: av.VideoStream) -> tuple[float, bool]:
    """(mean frames per second, whether they are uneven) of the sorted times of frames, in seconds."""
    stored = _stored_rate(stream)
    if len(times) < 2 or times[0] == times[-1]:
        return stored, False
    fps = float((len(times) - 1) / (times[-1] - times[0]))
    off = np.abs(np.diff(times) * fps - 1)
    variable = bool((off > 0.25 + _tick(stream) * fps).any())
    return (stored if abs(stored / fps - 1) < 0.01 else fps), variable


def _stored_rate(stream: av.VideoStream) -> float:
    """Frames per second that the file says, 0 where it does not."""
    return float(stream.average_rate or stream.guessed_rate or 0)


def _pixel_aspect(stream: av.VideoStream) -> Fraction | None:
    found = stream.sample_aspect_ratio  # from version 19 on a number of PyAV's own
    return Fraction(found.numerator, found.denominator) if found else None


def _tick(stream: av.VideoStream) -> float:
    """Seconds by which rounding to the clock of the file may move a frame; webm and mkv count in milliseconds."""
    return min(float(stream.time_base or 0), 1e-3)


def read_frames(path: str | os.PathLike, *, fps: float | int | None = None) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Decodes a video file frame by frame, as a screen shows them (see `show`), RGB uint8 [H, W, 3].

    Args:
      path: any file that FFmpeg decodes.
      fps: None for the frames as stored; otherwise frame k is the one on display at time k / fps after the first frame
        (frames are repeated or dropped, never blended).

    Raises:
      UserError: the file is missing, ends before its last frame as far as its container says where that is, or does
        not decode, is not to be shown (see `show`), or fps is no rate.
    """
    if fps is not None:
        check_fps(fps)
    return _read_frames(path, fps)


def _read_frames(path: str | os.PathLike, fps: float | int | None) -> Iterator[np.ndarray]:
    count = 0
    with _opened(path) as container:
        stream = _video_stream(container)
        aspect = _pixel_aspect(stream)
        decoded = _decoded(container, stream, path)
        if fps is None:
            for frame in decoded:
                count += 1
                yield show(frame, aspect, path)
        else:
            rate = _stored_rate(stream)
            early = _tick(stream) + 1e-6  # a frame counts as on display this long before its rounded time
            shown, start, end, image = None, None, 0.0, None
            for index, frame in enumerate(decoded):
                if frame.time is None and not rate:
                    raise UserError(f"{path} has neither times nor a rate of frames; convert it to mp4", "path")
                time = frame.time if frame.time is not None else index / rate
                start = time if start is None else start
                while shown is not None and count / fps < time - start - early:
                    image = show(shown, aspect, path) if image is None else image
                    count += 1
                    yield image
                shown, image = frame, None
                duration = frame.duration * frame.time_base if frame.duration and frame.time_base else 0
                end = time - start + (float(duration) or (1 / rate if rate else 0))
            while shown is not None and (count / fps < end - early or count == 0):
                image = show(shown, aspect, path) if image is None else image
                count += 1
                yield image
    if count == 0:
        raise _no_frame(path)


def _no_frame(path: object) -> UserError:
    return UserError(f"{path} holds no video frame; give a file with a video stream, or remove it", "path")


# A title in another encoding than UTF-8 is no reason not to read a video; from version 19 on that is understood.
_ANY_METADATA = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


def _opened(path: str | os.PathLike) -> av.container.InputContainer:
    try:
        container = av.open(os.fspath(path), **_ANY_METADATA)
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


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    return container.streams.best("video") or container.streams.video[0]  # the first may be a cover picture


def _decoder(stream: av.VideoStream, path: object) -> av.CodecContext:
    """The decoder of a stream; FFmpeg's own of vp8 and vp9 would pass over transparency in silence."""
    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    decoder = stream.codec_context
    if name and stream.metadata.get("alpha_mode") == "1":
        try:
            decoder = av.CodecContext.create(name, "r")
        except ValueError as error:
            raise UserError(
                f"{path} is transparent, and PyAV lacks {name} to decode that; convert it", "path"
            ) from error
    decoder.thread_type = "AUTO"
    return decoder


def _packets(container: av.container.InputContainer, stream: av.VideoStream, path: object) -> Iterator[av.Packet]:
    """The packets of a stream, then an empty one; UserError where the file has been cut off."""
    _check_index(container, stream, path)
    end, step = 0.0, 1 / (_stored_rate(stream) or 1)
    with _reading(path):
        for packet in container.demux():
            own = packet.stream.index == stream.index
            if packet.pts is not None:
                seconds = float((packet.duration or 0) * packet.time_base) or (step if own else 0)
                end = max(end, float(packet.pts * packet.time_base) + seconds)
            if own:
                yield packet
    _check_index(container, stream, path)  # that of a fragmented file grows while it is read
    entries = len(stream.index_entries)
    if container.format.name == "avi" and entries < stream.frames:
        raise UserError(f"{path} is cut off: {entries} of {stream.frames} frames are there; {_COMPLETE}", "path")
    if "matroska" in container.format.name and container.duration:
        length = container.duration / av.time_base
        if end < length - 0.75 * step:
            raise UserError(f"{path} is cut off: it ends at {end:.2f} of {length:.2f} s; {_COMPLETE}", "path")


def _check_index(container: av.container.InputContainer, stream: av.VideoStream, path: object) -> None:
    need = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if need > container.size > 0:
        raise UserError(f"{path} is cut off: {container.size} of at least {need} bytes are there; {_COMPLETE}", "path")


def _decoded(container: av.container.InputContainer, stream: av.VideoStream, path: object) -> Iterator[av.VideoFrame]:
    decoder = _decoder(stream, path)
    for packet in _packets(container, stream, path):
        yield from _decode(decoder, packet, path)


def _decode(decoder: av.CodecContext, packet: av.Packet, path: object) -> list[av.VideoFrame]:
    with _reading(path):
        frames = decoder.decode(packet)
    for frame in frames:
        if frame.is_corrupt:
            raise UserError(f"{path} is cut off or damaged near {frame.time or 0:.2f} s; {_COMPLETE}", "path")
    return frames


@contextlib.contextmanager
def _reading(path: object) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(
            f"{path} stops decoding as video ({_reason(error)}); convert it to mp4, or remove it", "path"
        ) from error


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).strip().splitlines()[0]


LARGEST = 2**14  # pixels of a side, what H.264 and VP9 take


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
        """Args: `path` ending in .mp4, .webm or .gif; `fps`, see `check_fps`; `upscale`, whole pixels per pixel.

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
        if not 1 <= upscale < float("inf") or upscale != int(upscale):
            raise UserError(f"cannot write {self.path}: upscale={upscale}; use a whole number from 1 on", "upscale")
        self._suffix = suffix
        self.fps, self.upscale, self.frames = fps, int(upscale), 0
        self._container = self._stream = None
        self._shape: tuple[int, ...] | None = None
        self._gif: list[Image.Image] = []
        with self._disk("choose a writable folder"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_dir():
                raise IsADirectoryError(0, "a folder")
            self._partial = Partial(self.path)

    @property
    def fps(self) -> float | int:
        """Frames per second; may be set until the first frame, UserError for a rate that the container cannot hold."""
        return self._fps

    @fps.setter
    def fps(self, value: float | int) -> None:
        check_fps(value, self._suffix)
        self._fps = value

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
        if max(frame.shape) * self.upscale > LARGEST:
            height, width = (side * int(self.upscale) for side in frame.shape[:2])
            told = f"cannot write {self.path}: {width}x{height} pixels; enlarge less, sides may have {LARGEST}"
            raise UserError(told, "upscale")
        frame = _upscaled(frame, self.upscale)
        if self._suffix == ".gif":
            self._gif.append(_palette(frame))
        else:
            height, width = frame.shape[:2]
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            with self._disk():
                if self._container is None:
                    self._open(*frame.shape[:2])
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
                self._container.mux(self._stream.encode(picture))
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
        """Gives a finished file its name; removes it where that cannot be."""
        try:
            with self._disk():
                self._partial.commit()
        finally:
            self.abort()  # nothing once it has its name

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
        rate = Fraction(self.fps).limit_denominator(min(1001, int(65535 / self.fps)))  # mpeg4 counts to 65535
        self._stream = self._container.add_stream(name, rate=rate, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        # Said in the file: players guess the matrix of what says none by its size.
        about = self._stream.codec_context
        about.colorspace, about.color_range = Colorspace.ITU709, ColorRange.MPEG
        about.color_primaries, about.color_trc = ColorPrimaries.BT709, ColorTrc.BT709


def encode_gif(video: UInt8[np.ndarray, "T H W 3"], *, fps: float | int = 8, upscale: int = 1) -> bytes:
    """Returns an endlessly looping GIF of a video, for TensorBoard and reports.

    Frames begin at times rounded to 1/100 s, so that the mean rate is kept.

    Raises:
      UserError: a rate that a GIF cannot hold, see `check_fps`.
    """
    check_fps(fps, ".gif")
    buffer = io.BytesIO()
    _save_gif([_palette(_upscaled(frame, upscale)) for frame in np.asarray(video)], buffer, fps)
    return buffer.getvalue()


def _upscaled(frame: np.ndarray, factor: int) -> np.ndarray:
    return frame.repeat(factor, 0).repeat(factor, 1) if factor > 1 else frame


def _palette(frame: np.ndarray) -> Image.Image:
    return Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE)


def _save_gif(images: list[Image.Image], target: io.BytesIO | Path, fps: float | int) -> None:
    starts = np.round(100 / fps * np.arange(len(images) + 1))  # in 1/100 s
    delays = (10 * np.diff(starts).astype(int)).tolist()  # milliseconds
    images[0].save(target, "GIF", save_all=True, append_images=images[1:], duration=delays, loop=0)
