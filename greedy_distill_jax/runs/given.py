"""What a stream is given to go on from, as latents: a video, an image, a folder of images, or latents in a file."""

import collections
import re
import sys
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
    run: Run, given: str | Path, *, fps: float | int, last: int | None = None
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

    Raises:
      UserError: what cannot be read, is of another size (latents and images of a folder) or not finite (field "given"),
        and a number of frames that the codec and whole chunks do not take (field "given_frames").
    """
    path = Path(given).expanduser()
    if path.suffix == LATENTS:
        if last is not None:
            raise UserError(f"{path} holds latents, which are given as they are; leave it out", "given_frames")
        with about("given"):
            return _latents(path, run.latent_shape[1:], run.model.cfg.chunk)
    frame = jax.ShapeDtypeStruct((1, 1, *run.latent_shape[1:]), np.float32)
    height, width = jax.eval_shape(run.codec.pixels, run.codec.params, frame).shape[2:4]
    with about("given"):
        frames, count, told = collections.deque(maxlen=last), 0, ""
        images, rate = _frames(path, fps)
        for image in images:
            count += 1
            if not told and image.shape[:2] != (height, width):
                told = f"cropped and resized from {image.shape[1]}x{image.shape[0]} to {width}x{height}"
            frames.append(fit_frame(image, width, height))
    if last is not None and last > count:
        raise UserError(f"the last {last} frames are asked for, but {path} has {count}; ask for fewer", "given_frames")
    Timeline(run.codec.temporal_stride, run.model.cfg.chunk).latent_frames(len(frames), "given_frames")
    if changes := ", ".join(filter(None, (told, rate))):
        print(f"note: {path}: {len(frames)} of {count} frames are given, {changes}.", file=sys.stderr)
    return run.codec.encode(np.stack(frames))[None]


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
    def place(file: Path) -> list:  # frame_2 before frame_10
        return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", file.name)]

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
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is no array of numpy's ({error}); write it with numpy.save") from error
    wanted = f"clean latents of floating point, [T, {', '.join(map(str, shape))}] with T a multiple of {chunk}"
    fits = latents.ndim == 4 and latents.shape[1:] == shape and len(latents) and not len(latents) % chunk
    if not fits or latents.dtype.kind != "f":
        raise UserError(f"{path} holds {latents.dtype} {list(latents.shape)}; give {wanted}")
    latents = latents.astype(np.float32)
    if not np.isfinite(latents).all():
        raise UserError(f"{path} holds values that are not finite; give {wanted}")
    return latents[None]
