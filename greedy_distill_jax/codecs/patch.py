"""A fixed linear video codec: every patch of pixels of one frame becomes its principal components.

It stands where Wan's VAE stands at full size (same interface: `encode`, `decode`, `latent_shape`, `temporal_stride`),
so that tiny models see latents of 16 channels. Sixteen components of 4x4 pixels keep the moving shapes at 29 dB.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float32, UInt8

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.partial import whole

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class PatchCodec:
    """latent = (patch - mean) @ components / scale, with pixels in [-1, 1]; decoding is the transpose.

    Attributes:
      mean: [patch * patch * 3], the mean patch.
      components: [patch * patch * 3, channels], orthonormal columns, largest variance first.
      scale: one number for all channels, so that training latents have standard deviation 1 over all channels.
      patch: side of a patch in pixels.
    """

    mean: Float32[np.ndarray, "P"]  # noqa: F821 (one letter alone looks like a name)
    components: Float32[np.ndarray, "P C"]
    scale: float
    patch: int

    temporal_stride = 1

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.components.shape[1]

    @classmethod
    def fit(cls, videos_NTHWC: UInt8[np.ndarray, "*n H W 3"], patch: int = 4, channels: int = 16) -> PatchCodec:
        """Principal components of all patches of `videos_NTHWC`; deterministic (the largest entry of each is positive).

        Raises:
          UserError: H or W is not a multiple of `patch`, too many `channels`, or all patches are equal.
        """
        if not 1 <= channels <= 3 * patch * patch:
            raise UserError(
                f"PatchCodec: channels={channels} with patch={patch}; use 1 to {3 * patch * patch}", "channels"
            )
        patches = _to_patches(np.asarray(videos_NTHWC), patch)
        patches = patches.reshape(-1, patches.shape[-1])
        if not len(patches):
            raise UserError("PatchCodec: fit got no videos; give at least one")
        mean, second = np.zeros(patches.shape[1]), np.zeros((patches.shape[1],) * 2)
        for chunk in np.array_split(patches, -(-len(patches) // 65536)):  # float64 sums without a float64 copy
            chunk = chunk.astype(np.float64)
            mean += chunk.sum(0)
            second += chunk.T @ chunk
        mean /= len(patches)
        variances, vectors = np.linalg.eigh(second / len(patches) - np.outer(mean, mean))
        variances, vectors = variances[::-1][:channels], vectors[:, ::-1][:, :channels]
        scale = np.sqrt(max(variances.mean(), 0.0))
        if scale < 1e-4:
            raise UserError("PatchCodec: fit got videos without any variation; give videos that differ between patches")
        largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
        components = vectors * np.sign(largest)
        return cls(mean.astype(np.float32), components.astype(np.float32), float(np.float32(scale)), patch)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, C) of a frame of `height` x `width` pixels; UserError if it does not divide into patches."""
        _check_divisible(height, width, self.patch)
        return height // self.patch, width // self.patch, self.channels

    def encode(self, video: UInt8[np.ndarray, "*n H W 3"]) -> Float32[np.ndarray, "*n h w C"]:
        """Latents of uint8 frames with any leading axes; UserError if H or W is not a multiple of the patch."""
        return (_to_patches(np.asarray(video), self.patch) - self.mean) @ (self.components / np.float32(self.scale))

    def decode(self, latents: Float32[np.ndarray, "*n h w C"]) -> UInt8[np.ndarray, "*n H W 3"]:
        """Frames of latents, rounded and clipped to uint8; UserError if the channel count differs from the codec's."""
        latents = np.asarray(latents, np.float32)
        if latents.shape[-1] != self.channels:
            raise UserError(
                f"PatchCodec: latents of {latents.shape[-1]} channels, the codec has {self.channels}; "
                "decode with the codec of the run that made them",
                field="codec",
            )
        patches = latents @ (self.components.T * np.float32(self.scale)) + self.mean
        pixels = np.clip(np.rint((patches + 1) * 127.5), 0, 255).astype(np.uint8)
        return rearrange(pixels, "... h w (p q c) -> ... (h p) (w q) c", p=self.patch, q=self.patch)

    @property
    def params(self) -> dict[str, Float32[np.ndarray, "..."]]:
        """What `decode_next` and `pixels` take."""
        return {"components": self.components.T * np.float32(self.scale), "mean": self.mean}

    def open_decoder(self) -> tuple[()]:
        """Nothing: frames do not depend on one another."""
        return ()

    def decode_next(
        self, params: Any, state: tuple[()], latent_BhwC: Float32[Array, "B h w C"]
    ) -> tuple[tuple[()], UInt8[Array, "B 1 H W 3"]]:
        """`decode` of one frame, on the device."""
        patches = latent_BhwC @ params["components"] + params["mean"][None, None, None]
        pixels = jnp.clip(jnp.rint((patches + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
        return state, rearrange(pixels, "b h w (p q c) -> b 1 (h p) (w q) c", p=self.patch, q=self.patch)

    def pixels(self, params: Any, latents_BFhwC: Float32[Array, "B F h w C"]) -> Float32[Array, "B F H W 3"]:
        """`decode` on the device, not rounded, in [0, 1]; differentiable."""
        patches = latents_BFhwC @ params["components"] + params["mean"][None, None, None, None]
        pixels = rearrange(patches, "b f h w (p q c) -> b f (h p) (w q) c", p=self.patch, q=self.patch)
        return jnp.clip(0.5 * (pixels + 1.0), 0.0, 1.0)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the codec as .npz (no pickle) under a temporary name and renames it."""
        path = Path(path)
        try:
            with whole(path) as partial, open(partial, "wb") as file:  # several processes may write it
                np.savez(
                    file, mean=self.mean, components=self.components, scale=self.scale, patch=self.patch, format=_FORMAT
                )
        except OSError as error:
            raise UserError(
                f"codec file {path} cannot be written ({error.strerror}); choose a writable folder",
                field="path",
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> PatchCodec:
        """Reads what `save` wrote; UserError when the file is missing or is not a codec."""
        remedy = "give the codec.npz of a prepared data set or of a run"
        try:
            with np.load(path, allow_pickle=False) as file:
                if int(file["format"]) != _FORMAT:
                    raise ValueError(f"format {int(file['format'])}, this version reads {_FORMAT}")
                codec = cls(file["mean"], file["components"], float(file["scale"]), int(file["patch"]))
            size = 3 * codec.patch**2
            if codec.mean.shape != (size,) or codec.components.ndim != 2 or codec.components.shape[0] != size:
                raise ValueError(f"arrays of shape {codec.mean.shape} and {codec.components.shape} for {codec.patch}")
            if not all(np.isfinite(a).all() for a in (codec.mean, codec.components, codec.scale)) or codec.scale <= 0:
                raise ValueError("values that are not finite, or no positive scale")
        except FileNotFoundError as error:
            raise UserError(f"codec file {path} does not exist; {remedy}", "path") from error
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"codec file {path} is not a patch codec ({error}); {remedy}", "path") from error
        return codec


def _check_divisible(height: int, width: int, patch: int) -> None:
    if height % patch or width % patch:
        raise UserError(
            f"PatchCodec: frames of {width}x{height} pixels do not divide into patches of {patch}x{patch}; "
            f"use a size whose sides are multiples of {patch}",
            field="height" if height % patch else "width",
        )


def _to_patches(video: UInt8[np.ndarray, "*n H W 3"], patch: int) -> Float32[np.ndarray, "*n h w P"]:
    """Cuts frames into patches of P = patch * patch * 3 numbers in [-1, 1]."""
    if video.dtype != np.uint8:
        raise TypeError(f"PatchCodec: video of dtype {video.dtype}, expected uint8")
    _check_divisible(*video.shape[-3:-1], patch)
    patches = rearrange(video, "... (h p) (w q) c -> ... h w (p q c)", p=patch, q=patch)
    return patches.astype(np.float32) * np.float32(1 / 127.5) - 1
