"""Frames as JPEG and back."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def to_jpeg(frame: UInt8[np.ndarray, "H W 3"], quality: int) -> bytes:
    """Returns the bytes of a frame's JPEG; quality from 1 to 100."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def from_jpeg(data: bytes, most_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a JPEG's pixels; ValueError for anything else, or for more pixels, before they are decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=["JPEG"])
        if image.width * image.height > most_pixels:
            raise ValueError(f"a frame of {image.width}x{image.height} pixels is too large")
        return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"a frame is not a JPEG ({error})") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"a frame is too large ({error})") from error
