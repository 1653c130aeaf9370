"""What a video codec is, and how one decodes a stream."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float32, UInt8

from greedy_distill_jax.distribution.compile_cache import compiled_ahead


@runtime_checkable
class VideoCodec(Protocol):
    """What stands between pixels and latents: `PatchCodec` here, `vae_codec.VAECodec` at full size.

    The first latent frame is one frame of video, every other one is `temporal_stride` frames. `encode` and `decode`
    take whole videos; a stream is decoded by `StreamDecoder`, or by `decode_next` where it is part of another program.

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


class StreamDecoder:
    """From the next latent frames [B, F, h, w, C] of one stream to the frames of video that they add.

    It remembers what the stream needs, on the device; a new stream needs a new one.
    """

    def __init__(self, codec: VideoCodec):
        self._codec, self._state = codec, codec.open_decoder()
        # All streams of a codec share its program.
        self._decode_next = vars(codec).setdefault("_jitted", jax.jit(codec.decode_next, donate_argnums=1))

    def prepare(self, latents_BFhwC: Float32[Array, "B F h w C"]) -> None:
        """Compiles what latents of such a shape need, whose values do not count; only one frame is cut out."""
        state, known = self._codec.open_decoder(), []
        placed = latents_BFhwC.sharding if latents_BFhwC.committed else None
        first = latents_BFhwC[:, 0]  # as ``start`` does it, which is a program, too
        latent = jax.ShapeDtypeStruct(first.shape, first.dtype, sharding=placed)

        def kind(x):
            return x.shape, x.dtype, x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None

        while (shapes := jax.tree.map(kind, state)) not in known:
            known.append(shapes)
            state, _ = compiled_ahead(self._decode_next, self._codec.params, state, latent)

    def __call__(self, latents_BFhwC: Float32[Array | np.ndarray, "B F h w C"]) -> UInt8[np.ndarray, "B T H W 3"]:
        """The frames of video, on the host."""
        return on_host(self.start(latents_BFhwC))

    def start(self, latents_BFhwC: Float32[Array | np.ndarray, "B F h w C"]) -> list[UInt8[Array, "B _t H W 3"]]:
        """The same for ``on_host``: the device has been told, nobody has waited for it."""
        frames = []
        for i in range(latents_BFhwC.shape[1]):
            self._state, more = self._decode_next(self._codec.params, self._state, latents_BFhwC[:, i])
            more.copy_to_host_async()
            frames.append(more)
        return frames


def on_host(frames: list[UInt8[Array, "B _t H W 3"]]) -> UInt8[np.ndarray, "B T H W 3"]:
    """Waits for what ``StreamDecoder.start`` has begun."""
    return np.concatenate([np.asarray(more) for more in frames], axis=1)
