"""The video autoencoders as codecs: uint8 videos to latents and back, whole or as a stream, in tiles if wanted.

Pixels cross to and from the device as uint8, a quarter of float32's bytes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, Shaped, UInt8

from greedy_distill_jax.codecs.vae import Cache, WanVAE
from greedy_distill_jax.codecs.vae_tiny import TinyVAE
from greedy_distill_jax.errors import UserError

Step = Callable[[Cache, jax.Array], tuple[Cache, jax.Array]]  # (cache, [B, T, ...]) -> (cache, [B, T', ...])


def to_pixels(video: Float[Array, "*n"]) -> UInt8[Array, "*n"]:
    """[-1, 1] -> uint8, rounded and clipped."""
    return jnp.clip(jnp.rint((video.astype(jnp.float32) + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def from_pixels(video: UInt8[Array, "*n"]) -> Float32[Array, "*n"]:
    """uint8 -> [-1, 1]."""
    return video.astype(jnp.float32) * (1 / 127.5) - 1.0


def whole(step: Step, x_BTHWC: Shaped[Array, "B T H W C"], first: int, rest: int) -> Shaped[Array, "B F h w D"]:
    """A whole video by the step of a stream: ``first`` frames, then a scan over ``rest`` at a time."""
    cache, out = step(None, x_BTHWC[:, :first])
    if x_BTHWC.shape[1] == first:
        return out
    _, others = jax.lax.scan(step, cache, rearrange(x_BTHWC[:, first:], "b (n t) ... -> n b t ...", t=rest))
    return jnp.concatenate([out, rearrange(others, "n b t ... -> b (n t) ...")], axis=1)


# --- tiles --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of one size, in latent pixels, that overlap and are blended linearly.

    A tile at a time is on the device with its activations; what its convolutions remember stays there for all tiles.
    The result is close to that of the whole frame and not the same: what a tile does not see is zero for it, and the
    attention of Wan's autoencoder looks at one tile.

    Attributes:
      size: (height, width) of a tile; a frame that is not larger is not divided.
      overlap: of neighbours, at least.
    """

    size: tuple[int, int] = (32, 32)
    overlap: int = 8

    def __post_init__(self):
        if not 0 < self.overlap < min(self.size):
            raise ValueError(f"tiles of {self.size} cannot overlap by {self.overlap}; use 1 to {min(self.size) - 1}.")

    def starts(self, extent: int, axis: int) -> tuple[int, ...]:
        """Where tiles begin along an axis of ``extent`` latent pixels: evenly, from one end to the other."""
        size = self.size[axis]
        if extent <= size:
            return (0,)
        count = -(-(extent - self.overlap) // (size - self.overlap))
        return tuple(round(i * (extent - size) / (count - 1)) for i in range(count))

    def weights(self, extent: int, axis: int, scale: int) -> np.ndarray:
        """[tiles, pixels of a tile], summing to one at every pixel; ``scale`` pixels per latent pixel."""
        starts, size = self.starts(extent, axis), min(self.size[axis], extent) * scale
        total, ramps = np.zeros(extent * scale), []
        for i, start in enumerate(starts):
            position, ramp = np.arange(size) + 0.5, np.ones(size)
            if i > 0:
                ramp = np.minimum(ramp, position / (scale * (starts[i - 1] + self.size[axis] - start)))
            if i + 1 < len(starts):
                ramp = np.minimum(ramp, (size - position) / (scale * (start + self.size[axis] - starts[i + 1])))
            total[start * scale : start * scale + size] += ramp
            ramps.append(ramp)
        return np.stack([r / total[s * scale : s * scale + size] for r, s in zip(ramps, starts)]).astype(np.float32)


def tiled(step: Step, tiles: Tiles, scale_in: int, scale_out: int) -> Step:
    """``step`` on every tile in turn, with a cache that has a leading axis of tiles.

    Args:
      step: of a stream, for any height and width.
      tiles: sizes.
      scale_in, scale_out: pixels per latent pixel of what ``step`` takes and gives.
    """

    def run(cache, x):
        extents = [n // scale_in for n in x.shape[2:4]]
        rows, columns = (tiles.starts(n, axis) for axis, n in enumerate(extents))
        corners = [(row, column) for row in rows for column in columns]
        size = [min(s, n) for s, n in zip(tiles.size, extents)]

        def cut(array, row, column, scale):
            return array[:, :, row * scale : (row + size[0]) * scale, column * scale : (column + size[1]) * scale]

        pieces = jnp.stack([cut(x, *corner, scale_in) for corner in corners])
        cache, pieces = jax.lax.map(lambda given: step(*given), (cache, pieces))
        down, across = (jnp.asarray(tiles.weights(n, axis, scale_out)) for axis, n in enumerate(extents))
        out = jnp.zeros((*pieces.shape[1:3], *(n * scale_out for n in extents), pieces.shape[-1]), pieces.dtype)
        for i, (row, column) in enumerate(corners):
            weight = down[i // len(columns)][:, None] * across[i % len(columns)][None]
            top, left = row * scale_out, column * scale_out
            place = out.at[:, :, top : top + weight.shape[0], left : left + weight.shape[1]]
            out = place.add(pieces[i] * weight[None, None, :, :, None])
        return cache, out

    return run


# --- the codec ----------------------------------------------------------------------------------------------------


def _decode_step(vae, tiles: Tiles | None, params, cache: Cache, latents_BFhwC):
    step = functools.partial(vae.decode_step, params)
    if tiles is not None:
        step = tiled(step, tiles, 1, vae.cfg.spatial_stride)
    cache, video = step(cache, latents_BFhwC)
    return cache, to_pixels(video)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(vae, tiles: Tiles | None, params, latents_BFhwC):
    return whole(functools.partial(_decode_step, vae, tiles, params), latents_BFhwC, 1, 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(vae, tiles: Tiles | None, params, video_BTHWC):
    step = functools.partial(vae.encode_step, params)
    if tiles is not None:
        step = tiled(step, tiles, vae.cfg.spatial_stride, 1)
    stride = vae.cfg.temporal_stride
    missing = (vae.first_frames - video_BTHWC.shape[1]) % stride  # at the end, for the tiny one
    video = jnp.concatenate([video_BTHWC, *[video_BTHWC[:, -1:]] * missing], axis=1)
    return whole(lambda cache, x: step(cache, from_pixels(x)), video, vae.first_frames, stride)


@dataclasses.dataclass(frozen=True, eq=False)
class VAECodec:
    """A `VideoCodec` of Wan's autoencoder or of the tiny one.

    Attributes:
      vae: sizes and functions.
      params: their parameters, on the device; a stream needs those of the decoder alone.
      tiles: None for whole frames.
      source: path that the parameters were read from, if any.
    """

    vae: WanVAE | TinyVAE
    params: Any
    tiles: Tiles | None = None
    source: str = ""

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame, after the first, which is one frame."""
        return self.vae.cfg.temporal_stride

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, C) of a frame of ``height`` x ``width`` pixels; UserError if they do not divide."""
        stride = self.vae.cfg.spatial_stride
        if height % stride or width % stride:
            raise UserError(
                f"VAE: frames of {width}x{height} pixels; use a size whose sides are multiples of {stride}."
            )
        return height // stride, width // stride, self.vae.cfg.channels

    def encode(self, video: UInt8[np.ndarray, "*n T H W 3"]) -> Float32[np.ndarray, "*n F h w C"]:
        """Latents of 1 + 4 k frames, k + 1 latent frames; UserError for another number or size."""
        if video.dtype != np.uint8:
            raise TypeError(f"VAE: video of dtype {video.dtype}, expected uint8")
        self.latent_shape(*video.shape[-3:-1])
        frames, stride = video.shape[-4], self.temporal_stride
        if frames % stride != 1 % stride:
            raise UserError(f"VAE: a video of {frames} frames; use 1 + {stride} k of them, such as 1, 5 or 81.")
        latents = np.asarray(_encode(self.vae, self.tiles, self.params, video.reshape(-1, *video.shape[-4:])))
        return latents.reshape(*video.shape[:-4], *latents.shape[1:])

    def decode(self, latents: Float32[np.ndarray, "*n F h w C"]) -> UInt8[np.ndarray, "*n T H W 3"]:
        """1 + 4 (F - 1) frames; UserError for latents of another number of channels."""
        latents = np.asarray(latents, np.float32)
        self._check(latents.shape[-1])
        video = np.asarray(_decode(self.vae, self.tiles, self.params, latents.reshape(-1, *latents.shape[-4:])))
        return video.reshape(*latents.shape[:-4], *video.shape[1:])

    def open_decoder(self) -> Cache:
        """The cache of a stream before its first latent frame."""
        return None

    def decode_next(
        self, params: Any, state: Cache, latent_BhwC: Float32[Array, "B h w C"]
    ) -> tuple[Cache, UInt8[Array, "B t H W 3"]]:
        """The next frames of a stream, one for its first latent frame and four for every other; see `VideoCodec`."""
        self._check(latent_BhwC.shape[-1])
        return _decode_step(self.vae, self.tiles, params, state, latent_BhwC[:, None])

    def _check(self, channels: int) -> None:
        if channels != self.vae.cfg.channels:
            raise UserError(
                f"VAE: latents of {channels} channels, the VAE has {self.vae.cfg.channels}; "
                "decode with the VAE that the model was trained with"
            )
