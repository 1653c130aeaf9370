"""What a stream is given to go on from, as latents: a video, an image, a folder of images, or latents in a file."""

import collections
import math
import re
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from greedy_distill_jax.data.sources.cutting import fit_frame
from greedy_distill_jax.data.video_io import probe, read_frames
from greedy_distill_jax.errors import UserError, about
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.streaming.timeline import Timeline

IMAGES, LATENTS = (".png", ".jpg", ".jpeg", ".webp", ".bmp"), ".npy"
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # others have more than 8 bits


def read_given(
    run: Run, given: str | Path, *, fps: float | int, last: int | None = None, frames: int | None = None
) -> Float32[np.ndarray, "1 T h w C"]:
    """Returns latents for ``Session.give`` of the run's student, as its codec encodes them.

    Frames of another size are cropped about the centre and resized, as by `prepare`, and a video of another rate is
    resampled: every frame is the one on display at its time. A note on standard error says so.

    Args:
      run: of a student.
      given: a video that FFmpeg decodes, an image of `IMAGES`, a folder of images in the order of the numbers in their
        names, or a file of numpy's with clean latents [T, h, w, C].
      fps: frames per second of the video to be made.
      last: how many of the frames, the last ones, are given; None for all.
      frames: of the video to be made, more than are given; None for any number.

    Raises:
      UserError: what cannot be read, is of another size (latents and images of a folder) or not finite (field "given"),
        a number of frames that the codec and whole chunks do not take (field "given_frames"), and a video of no more
        frames (field "frames"), before it is decoded further or encoded.
    """
    path = Path(given).expanduser()
    timeline, enough = Timeline(run.codec.temporal_stride, run.model.cfg.chunk), frames or math.inf
    if path.suffix.lower() == LATENTS:
        if last is not None:
            raise UserError(f"{path} holds latents, which are given as they are; leave it out", "given_frames")
        with about("given"):
            latents = _latents(path, run.latent_shape[1:], timeline.chunk)
        if (count := timeline.video_frames(latents.shape[1])) >= enough:
            raise _too_short(frames, f"the {count} of {path}")
        return latents
    if last is not None and last >= enough:
        raise _too_short(frames, f"the {last} that are given")
    frame = jax.ShapeDtypeStruct((1, 1, *run.latent_shape[1:]), np.float32)
    height, width = jax.eval_shape(run.codec.pixels, run.codec.params, frame).shape[2:4]
    with about("given"):
        kept, count, told = collections.deque(maxlen=last), 0, ""
        images, rate = _frames(path, fps)
        for image in images:
            count += 1
            if not told and image.shape[:2] != (height, width):
                told = f"cropped and resized from {image.shape[1]}x{image.shape[0]} to {width}x{height}"
            kept.append(fit_frame(image, width, height))
            if len(kept) >= enough:
                break
    if len(kept) >= enough:
        raise _too_short(frames, f"{path} has", ", or give the last ones only")
    if last is not None and last > count:
        raise UserError(f"the last {last} frames are asked for, but {path} has {count}; ask for fewer", "given_frames")
    _check_whole(timeline, len(kept), count)
    if changes := ", ".join(filter(None, (told, rate))):
        print(f"note: {path}: {len(kept)} of {count} frames are given, {changes}.", file=sys.stderr)
    return run.codec.encode(np.stack(kept))[None]


def _too_short(frames: int, given: str, other: str = "") -> UserError:
    return UserError(f"{frames} frames are no more than {given}; make more{other}", "frames")


def _check_whole(timeline: Timeline, frames: int, count: int) -> None:
    """As ``Timeline.latent_frames``, of frames that are there: no more than ``count`` can be chosen."""
    fits = timeline.fill(frames)
    if fits == frames:
        return
    if (frames - 1) % timeline.stride:
        why = f"the codec, which makes 1 + {timeline.stride} k of them"
    else:
        why = f"the student's chunk of {timeline.chunk} latent frames"
    near = [n for n in (fits - timeline.chunk * timeline.stride, fits) if 0 < n <= count]
    remedy = f"choose {' or '.join(map(str, near))}" if near else f"give at least {timeline.video_frames(1)}"
    raise UserError(f"{frames} frames do not fit {why}; {remedy}", "given_frames")


def _frames(path: Path, fps: float | int) -> tuple[Iterable[UInt8[np.ndarray, "H W 3"]], str]:
    """(the frames that are there, what was done to their rate)."""
    if path.is_dir():
        return _folder(path), ""
    if path.suffix.lower() in IMAGES:
        return [_image(path)], ""
    info = probe(path)
    if info.frames == 1 or (not info.variable and abs(info.fps / fps - 1) < 0.01):
        return read_frames(path), ""
    return read_frames(path, fps=fps), f"resampled from {info.fps:.4g} to {fps:g} frames per second"


def _folder(path: Path) -> Iterable[UInt8[np.ndarray, "H W 3"]]:
    def place(file: Path) -> tuple[list, str]:  # frame_2 before frame_10; the name settles 1 and 01
        return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", file.name)], file.name

    files = sorted((file for file in path.iterdir() if file.suffix.lower() in IMAGES), key=place)
    if not files:
        raise UserError(f"{path} holds no image; put frames ending in {', '.join(IMAGES)} there")
    first = None
    for file in files:
        image = _image(file)
        first = image.shape if first is None else first
        if image.shape != first:
            sizes = (f"{shape[1]}x{shape[0]}" for shape in (image.shape, first))
            raise UserError("{} is of {} pixels, {} of {}; make them equal".format(file, *sizes, files[0].name))
        yield image


def _image(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """An image as it is shown: turned as its EXIF says, transparent parts on black, as frames of videos are."""
    try:
        with Image.open(path) as opened:
            if getattr(opened, "n_frames", 1) > 1:
                raise UserError(f"{path} is animated; convert it to mp4")
            if opened.mode not in _MODES:
                raise UserError(f"{path} has pixels of the kind {opened.mode}; save it with 8 bits per channel")
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA"))
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no image that can be read ({error}); save it again, as .png") from error


def _latents(path: Path, shape: tuple[int, ...], chunk: int) -> Float32[np.ndarray, "1 T h w C"]:
    try:
        latents = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no array of numpy's ({error}); write it with numpy.save") from error
    if not isinstance(latents, np.ndarray):
        latents.close()
        raise UserError(f"{path} is an archive of arrays (.npz), whatever its name; write one with numpy.save")
    wanted = f"clean latents of floating point, [T, {', '.join(map(str, shape))}] with T a multiple of {chunk}"
    fits = latents.ndim == 4 and latents.shape[1:] == shape and len(latents) and not len(latents) % chunk
    if not fits or latents.dtype.kind != "f":
        raise UserError(f"{path} holds {latents.dtype} {list(latents.shape)}; give {wanted}")
    latents = latents.astype(np.float32)
    if not np.isfinite(latents).all():
        raise UserError(f"{path} holds values that are not finite; give {wanted}")
    return latents[None]
