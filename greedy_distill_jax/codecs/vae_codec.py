"""The video autoencoders as codecs: uint8 videos to latents and back, whole or as a stream, in tiles if wanted.

Pixels cross to and from the device as uint8, a quarter of float32's bytes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, Shaped, UInt8

from greedy_distill_jax.codecs.tiles import Step, Tiles, tiled
from greedy_distill_jax.codecs.vae import Cache, WanVAE
from greedy_distill_jax.codecs.vae_tiny import TinyVAE
from greedy_distill_jax.errors import UserError


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


def _decoder(vae: WanVAE | TinyVAE, tiles: Tiles | None, params: Any) -> Step:
    """The step of a stream from latents to frames in [-1, 1]."""
    step = functools.partial(vae.decode_step, params)
    return step if tiles is None else tiled(step, tiles, 1, vae.cfg.spatial_stride)


def _decode_step(
    vae: WanVAE | TinyVAE, tiles: Tiles | None, params: Any, cache: Cache, latents_BFhwC: Float32[Array, "B F h w C"]
) -> tuple[Cache, UInt8[Array, "B T H W 3"]]:
    cache, video = _decoder(vae, tiles, params)(cache, latents_BFhwC)
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
                f"VAE: frames of {width}x{height} pixels; use a size whose sides are multiples of {stride}.",
                field="height" if height % stride else "width",
            )
        return height // stride, width // stride, self.vae.cfg.channels

    def encode(self, video: UInt8[np.ndarray, "*n T H W 3"]) -> Float32[np.ndarray, "*n F h w C"]:
        """Latents of 1 + 4 k frames, k + 1 latent frames; UserError for another number or size."""
        if video.dtype != np.uint8:
            raise TypeError(f"VAE: video of dtype {video.dtype}, expected uint8")
        self.latent_shape(*video.shape[-3:-1])
        frames, stride = video.shape[-4], self.temporal_stride
        if frames % stride != 1 % stride:
            raise UserError(
                f"VAE: a video of {frames} frames; use 1 + {stride} k of them, such as 1, 5 or 81.", "video"
            )
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

    def pixels(self, params: Any, latents_BFhwC: Float32[Array, "B F h w C"]) -> Float32[Array, "B T H W 3"]:
        """1 + 4 (F - 1) frames in [0, 1], not rounded; differentiable."""
        self._check(latents_BFhwC.shape[-1])
        video = whole(_decoder(self.vae, self.tiles, params), latents_BFhwC, 1, 1)
        return jnp.clip(0.5 * (video.astype(jnp.float32) + 1.0), 0.0, 1.0)

    def _check(self, channels: int) -> None:
        if channels != self.vae.cfg.channels:
            raise UserError(
                f"VAE: latents of {channels} channels, the VAE has {self.vae.cfg.channels}; "
                "decode with the VAE that the model was trained with",
                field="codec",
            )
