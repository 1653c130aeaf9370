"""What a video codec is, and how one decodes a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float32, UInt8


@runtime_checkable
class VideoCodec(Protocol):
    """What stands between pixels and latents: `PatchCodec` here, `vae_codec.VAECodec` at full size.

    The first latent frame is one frame of video, every other one is `temporal_stride` frames. `encode` and `decode`
    take whole videos; a stream is decoded by `stream_decoder`, or by `decode_next` where it is part of another program.

    Attributes:
      temporal_stride: pixel frames per latent frame.
      params: arrays that `decode_next` and `pixels` take.
    """

    temporal_stride: int
    params: Any

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, C) of the latent of a frame of `height` x `width` pixels."""
        ...

    def encode(self, video: UInt8[np.ndarray, "*n H W 3"]) -> Float32[np.ndarray, "*m h w C"]:
        """Latents of uint8 frames."""
        ...

    def decode(self, latents: Float32[np.ndarray, "*m h w C"]) -> UInt8[np.ndarray, "*n H W 3"]:
        """uint8 frames of latents."""
        ...

    def open_decoder(self) -> Any:
        """What a stream remembers before its first latent frame: a pytree, whose structure may change with it."""
        ...

    def decode_next(
        self, params: Any, state: Any, latent_BhwC: Float32[Array, "B h w C"]
    ) -> tuple[Any, UInt8[Array, "B t H W 3"]]:
        """A pure function: the frames that the next latent frame of a stream adds, and what to remember."""
        ...

    def pixels(self, params: Any, latents_BFhwC: Float32[Array, "B F h w C"]) -> Float32[Array, "B T H W 3"]:
        """A pure, differentiable function: the frames of whole videos in [0, 1], not rounded."""
        ...


def stream_decoder(codec: VideoCodec) -> Callable[..., UInt8[np.ndarray, "B T H W 3"]]:
    """A function from the next latent frames [B, F, h, w, C] of one stream to the frames of video that they add.

    It remembers what the stream needs, on the device; a new stream needs a new one.
    """
    decode_next, state = jax.jit(codec.decode_next, donate_argnums=1), codec.open_decoder()

    def decode(latents_BFhwC: Float32[Array | np.ndarray, "B F h w C"]) -> UInt8[np.ndarray, "B T H W 3"]:
        nonlocal state
        frames = []
        for i in range(latents_BFhwC.shape[1]):
            state, more = decode_next(codec.params, state, latents_BFhwC[:, i])
            frames.append(more)  # the device goes on while the host copies
        return np.concatenate([np.asarray(more) for more in frames], axis=1)

    return decode
