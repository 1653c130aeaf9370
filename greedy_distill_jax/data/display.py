"""Decoded frames as a screen shows them: upright, of square pixels, without transparency, in the colours of sRGB."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc
from jaxtyping import Integer, Shaped, UInt8

from greedy_distill_jax.errors import UserError

# Code points of ITU-T H.273 that are not shown as they are: they need a tone or gamut mapping, or a matrix that
# libswscale does not have.
_TRANSFERS = {8: "linear light", 9: "logarithmic light", 10: "logarithmic light", 17: "SMPTE 428 light"}
_TRANSFERS |= {ColorTrc.SMPTE2084: "PQ (HDR)", ColorTrc.ARIB_STD_B67: "HLG (HDR)"}
_PRIMARIES = {ColorPrimaries.BT2020: "BT.2020", 10: "CIE XYZ", 11: "DCI-P3", 12: "Display P3"}
_MATRICES = {8: "YCgCo", 10: "BT.2020 constant luminance", 11: "SMPTE 2085", 14: "ICtCp", 15: "IPT"}
_UNSPECIFIED = 2
_LEAST_EDGE = 0.02  # of a matrix: entries below this part of the largest count as zero


def show(frame: av.VideoFrame, pixel_aspect: Fraction | None, path: object) -> UInt8[np.ndarray, "H W 3"]:
    """Returns what a screen shows of a decoded frame.

    The side that pixels are wider than high along is stretched (rows or columns are never dropped), transparent parts
    are put on black. Where the file does not say which matrix its colours have, large frames have that of BT.709 and
    others that of BT.601, as players assume.

    Args:
      frame: as decoded.
      pixel_aspect: width of a pixel divided by its height; None for square ones.
      path: of the file, for errors.

    Raises:
      UserError: colours that need a tone or gamut mapping, a display matrix that is no quarter turn, pixels more than
        ten times as long as wide.
    """
    _check_colours(frame, path)
    width, height = frame.width, frame.height
    aspect = pixel_aspect or Fraction(1)
    if not Fraction(1, 10) <= aspect <= 10:
        raise UserError(f"{path} has pixels of {aspect.numerator} x {aspect.denominator}; convert it to mp4", "path")
    width, height = max(width, round(width * aspect)), max(height, round(height / aspect))
    matrix = frame.colorspace
    if matrix == _UNSPECIFIED:
        matrix = Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601
    layout = "rgba" if has_alpha(frame) else "rgb24"
    image = frame.to_ndarray(format=layout, width=width, height=height, src_colorspace=matrix)
    if layout == "rgba":
        alpha = image[..., 3:].astype(np.uint16)
        image = ((image[..., :3] * alpha + 127) // 255).astype(np.uint8)
    sides = frame.side_data.get("DISPLAYMATRIX")
    return image if sides is None else upright(image, np.frombuffer(sides, np.int32), path)


def has_alpha(frame: av.VideoFrame) -> bool:
    """Returns whether pixels of a decoded frame may be transparent."""
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def upright(
    image: Shaped[np.ndarray, "A B 3"], matrix: Integer[np.ndarray, " 9"] | Sequence[int], path: object
) -> Shaped[np.ndarray, "H W 3"]:
    """Turns and mirrors an image as a display matrix says.

    Args:
      image: as stored.
      matrix: (a, b, u, c, d, v, x, y, w): the pixel at column p and row q is shown at (a p + c q, b p + d q), but for
        scale and offset (ISO/IEC 14496-12, 6.2.2).
      path: of the file, for errors.

    Raises:
      UserError: neither a quarter turn nor one with a mirror.
    """
    a, b, c, d = (int(matrix[index]) for index in (0, 1, 3, 4))
    least = _LEAST_EDGE * max(abs(a), abs(b), abs(c), abs(d))
    straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    if straight > least >= max(abs(b), abs(c)):
        columns, rows = a, d
    elif crossed > least >= max(abs(a), abs(d)):
        image, columns, rows = image.swapaxes(0, 1), c, b
    else:
        told = ", ".join(f"{entry / 65536:.3g}" for entry in (a, b, c, d))
        raise UserError(f"{path} is to be shown by the matrix ({told}), no quarter turn; convert it to mp4", "path")
    return np.ascontiguousarray(image[:: -1 if rows < 0 else 1, :: -1 if columns < 0 else 1])


def _check_colours(frame: av.VideoFrame, path: object) -> None:
    found = _TRANSFERS.get(frame.color_trc) or _PRIMARIES.get(frame.color_primaries) or _MATRICES.get(frame.colorspace)
    if not found and "DOVI_METADATA" in frame.side_data:
        found = "Dolby Vision"  # may have colours of its own that it names nowhere else
    if found:
        raise UserError(
            f"{path} has colours in {found}, which would come out wrong; convert it to BT.709 (SDR) with a program "
            "that maps tones",
            "path",
        )
