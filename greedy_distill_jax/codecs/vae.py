"""The video autoencoder of Wan2.1 (arXiv 2503.20314), causal in time, so that it runs as a stream.

Four frames of video are one latent frame, except that the first frame alone is the first latent frame. A causal
convolution remembers the last two frames it read; what all of them remember is the cache, an explicit pytree that one
step takes and the next one gets. ``None`` is the cache at the start of a video: the first step differs in shape (one
frame instead of four) and in work (of three frames of a kernel only the last one reads anything), so `jax.jit` makes
two programs of one function. Videos are [B, T, H, W, 3] in [-1, 1], latents [B, F, h, w, C].
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from greedy_distill_jax.codecs.vae_layers import CausalConv, Down, Middle, Norm, Stage, Up, chain, pointwise


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


WAN_MEAN = _numbers(
    "-0.7571 -0.7089 -0.9113 0.1075 -0.1745 0.9653 -0.1517 1.5508 "
    "0.4134 -0.0715 0.5517 -0.3632 -0.1922 -0.9497 0.2503 -0.2921"
)
WAN_STD = _numbers(
    "2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 2.8251 1.9160"
)

Cache = Any  # a nest of [B, 1 or 2, H, W, C] arrays; None before the first frame


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes; the defaults are Wan2.1's.

    Attributes:
      dim: width at full resolution.
      multipliers: width of every stage in multiples of ``dim``, full resolution first; all but the last halve H and W.
      res_blocks: residual blocks of an encoder's stage; a decoder's stage has one more.
      temporal: which of the halvings also halve the number of frames.
      channels: of a latent.
      mean, std: of the latents, one each per channel; latents are given out normalised with them.
      dtype: of activations and convolutions; norms and the softmax are float32.
    """

    dim: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    channels: int = 16
    mean: tuple[float, ...] = WAN_MEAN
    std: tuple[float, ...] = WAN_STD
    dtype: str = "float32"

    def __post_init__(self):
        if len(self.temporal) != len(self.multipliers) - 1:
            raise ValueError(f"temporal={self.temporal} needs one entry less than multipliers={self.multipliers}.")
        if not len(self.mean) == len(self.std) == self.channels or min(self.std) <= 0:
            raise ValueError(f"mean and std need {self.channels} entries, std positive; got {self.mean}, {self.std}.")

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of every stage, full resolution first."""
        return tuple(self.dim * multiplier for multiplier in self.multipliers)

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent pixel along a side."""
        return 2 ** len(self.temporal)

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame, after the first."""
        return 2 ** sum(self.temporal)


class Encoder(nn.Module):
    """Video in [-1, 1] -> normalised mean of the latents.

    Call as (video_BTHW3, cache): one frame with the cache None, a multiple of the temporal stride afterwards.
    """

    cfg: VAEConfig

    def setup(self):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        widths, last = cfg.widths, len(cfg.temporal)
        self.conv_in = CausalConv((3, 3, 3, 3, cfg.dim), dtype)
        self.stages = [
            Stage(i, o, cfg.res_blocks, Down if n < last else None, n < last and cfg.temporal[n], dtype)
            for n, (i, o) in enumerate(zip((cfg.dim, *widths), widths))
        ]
        self.middle = Middle(widths[-1], dtype)
        self.norm_out = Norm(widths[-1])
        self.conv_out = CausalConv((3, 3, 3, widths[-1], 2 * cfg.channels), dtype)
        self.quant = pointwise(2 * cfg.channels, dtype)

    def __call__(
        self, video_BTHW3: Float[Array, "B T H W 3"], cache: Cache = None
    ) -> tuple[Float[Array, "B F h w C"], Cache]:
        past = cache or {"in": None, "out": None}
        x, kept_in = self.conv_in(video_BTHW3.astype(jnp.dtype(self.cfg.dtype)), past["in"])
        x, kept = chain((*self.stages, self.middle), x, past.get("stages"))
        x, kept_out = self.conv_out(nn.silu(self.norm_out(x)), past["out"])
        mean = self.quant(x)[..., : self.cfg.channels].astype(jnp.float32)  # the rest is the log variance
        return (mean - _row(self.cfg.mean)) / _row(self.cfg.std), {"in": kept_in, "stages": kept, "out": kept_out}


class Decoder(nn.Module):
    """Normalised latents -> video in [-1, 1], float32.

    Call as (latents_BFhwC, cache): one latent frame with the cache None, any number afterwards.
    """

    cfg: VAEConfig

    def setup(self):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        widths, temporal = cfg.widths[::-1], cfg.temporal[::-1]
        self.quant = pointwise(cfg.channels, dtype)
        self.conv_in = CausalConv((3, 3, 3, cfg.channels, widths[0]), dtype)
        self.middle = Middle(widths[0], dtype)
        inputs = (widths[0], *(width // 2 for width in widths[:-1]))  # `Up` halves the width
        self.stages = [
            Stage(i, o, cfg.res_blocks + 1, Up if n < len(temporal) else None, n < len(temporal) and temporal[n], dtype)
            for n, (i, o) in enumerate(zip(inputs, widths))
        ]
        self.norm_out = Norm(widths[-1])
        self.conv_out = CausalConv((3, 3, 3, widths[-1], 3), dtype)

    def __call__(
        self, latents_BFhwC: Float[Array, "B F h w C"], cache: Cache = None
    ) -> tuple[Float[Array, "B T H W 3"], Cache]:
        past = cache or {"in": None, "out": None}
        x = latents_BFhwC.astype(jnp.float32) * _row(self.cfg.std) + _row(self.cfg.mean)
        x, kept_in = self.conv_in(self.quant(x.astype(jnp.dtype(self.cfg.dtype))), past["in"])
        x, kept = chain((self.middle, *self.stages), x, past.get("stages"))
        x, kept_out = self.conv_out(nn.silu(self.norm_out(x)), past["out"])
        return jnp.clip(x.astype(jnp.float32), -1.0, 1.0), {"in": kept_in, "stages": kept, "out": kept_out}


def _row(values):
    return jnp.asarray(np.asarray(values, np.float32))[None, None, None, None]


# --- the autoencoder ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class WanVAE:
    """Encoder and decoder as pure functions of their parameters, ``{"encoder": ..., "decoder": ...}``."""

    cfg: VAEConfig = VAEConfig()

    first_frames = 1  # of video, that make the first latent frame

    def init(self, key: jax.Array) -> dict:
        """Random parameters, float32."""
        side, frames = self.cfg.spatial_stride, self.cfg.temporal_stride

        def both(module, first, rest):  # the first step leaves out the convolutions in time
            return module(rest, module(first)[1])

        keys, one = jax.random.split(key), jnp.zeros((1, 1, 1, 1, self.cfg.channels))
        first, rest = jnp.zeros((1, 1, side, side, 3)), jnp.zeros((1, frames, side, side, 3))
        return {
            "encoder": Encoder(self.cfg).init(keys[0], first, rest, method=both)["params"],
            "decoder": Decoder(self.cfg).init(keys[1], one, one, method=both)["params"],
        }

    def encode_step(
        self, params: Any, cache: Cache, video_BTHWC: Float[Array, "B T H W 3"]
    ) -> tuple[Cache, Float[Array, "B F h w C"]]:
        """The first frame (cache None), or a multiple of ``cfg.temporal_stride`` more, to latents."""
        frames, stride = video_BTHWC.shape[1], self.cfg.temporal_stride
        if frames != 1 if cache is None else frames % stride:
            raise ValueError(f"{frames} frames: the first step takes one, others a multiple of {stride}.")
        latents, cache = Encoder(self.cfg).apply({"params": params["encoder"]}, video_BTHWC, cache)
        return cache, latents

    def decode_step(
        self, params: Any, cache: Cache, latents_BFhwC: Float[Array, "B F h w C"]
    ) -> tuple[Cache, Float[Array, "B T H W 3"]]:
        """The first latent frame (cache None, gives one frame), or any number more, to frames in [-1, 1]."""
        if cache is None and latents_BFhwC.shape[1] != 1:
            raise ValueError(f"{latents_BFhwC.shape[1]} latent frames: the first step takes one.")
        video, cache = Decoder(self.cfg).apply({"params": params["decoder"]}, latents_BFhwC, cache)
        return cache, video
