"""The tiny video autoencoder for Wan2.1's latents: TAEHV with the weights "taew2_1" (madebyollin/taehv).

Two-dimensional convolutions, and blocks that read the frame before theirs. That frame is all there is to remember, so
the same step serves one latent frame with the cache of the last step, a few of them, or a whole video at once.
Where Wan's autoencoder takes one frame first and four from then on, this one takes four from the start: encoding
repeats the last frame of a video to a multiple of four, decoding drops the first three frames of the first four.
Videos are [B, T, H, W, 3] in [-1, 1] here (the weights know [0, 1]), latents [B, F, h, w, C] as Wan's normalised ones.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float

from greedy_distill_jax.codecs.vae import Cache
from greedy_distill_jax.codecs.vae_layers import Conv, chain, pointwise


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig:
    """Sizes; the defaults are those of "taew2_1".

    Attributes:
      encoder_width: of all stages of the encoder.
      decoder_widths: of the latents' stage, and after every doubling of H and W.
      blocks: memory blocks of a stage.
      pool: which stages of the encoder, full resolution first, halve the number of frames.
      grow: which stages of the decoder, the latents' first, double it.
      channels: of a latent.
      dtype: of activations and convolutions.
    """

    encoder_width: int = 64
    decoder_widths: tuple[int, ...] = (256, 128, 64, 64)
    blocks: int = 3
    pool: tuple[bool, ...] = (True, True, False)
    grow: tuple[bool, ...] = (False, True, True)
    channels: int = 16
    dtype: str = "float32"

    def __post_init__(self):
        if not len(self.pool) == len(self.grow) == len(self.decoder_widths) - 1 or sum(self.pool) != sum(self.grow):
            raise ValueError(
                f"pool={self.pool} and grow={self.grow} need as many stages and changes as one another, "
                f"and one stage less than decoder_widths={self.decoder_widths}."
            )

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent pixel along a side."""
        return 2 ** len(self.pool)

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame."""
        return 2 ** sum(self.pool)


class MemoryBlock(nn.Module):
    """Three convolutions of a frame beside the frame before it, around a shortcut."""

    features: int
    dtype: Any

    def setup(self):
        width = self.features
        self.conv = [Conv((3, 3, i, width), self.dtype) for i in (2 * width, width, width)]

    def __call__(
        self, x_BTHWC: Float[Array, "B T H W D"], past: Float[Array, "B 1 H W D"] | None
    ) -> tuple[Float[Array, "B T H W E"], Float[Array, "B 1 H W D"]]:
        """(output, last frame of the input); ``past`` is what the call before it gave, None for zeros."""
        past = jnp.zeros_like(x_BTHWC[:, :1]) if past is None else past
        before = jnp.concatenate([past, x_BTHWC[:, :-1]], axis=1)
        h = nn.relu(self.conv[0](jnp.concatenate([x_BTHWC, before], axis=-1)))
        h = self.conv[2](nn.relu(self.conv[1](h)))
        return nn.relu(h + x_BTHWC), x_BTHWC[:, -1:]


class EncoderStage(nn.Module):
    """Halves H and W, and T where ``pool``, then memory blocks."""

    cfg: TinyVAEConfig
    pool: bool

    def setup(self):
        width, dtype = self.cfg.encoder_width, jnp.dtype(self.cfg.dtype)
        self.time = pointwise(width, dtype, use_bias=False)
        self.space = Conv((3, 3, width, width), dtype, with_bias=False)
        self.memory = [MemoryBlock(width, dtype) for _ in range(self.cfg.blocks)]

    def __call__(self, x: Float[Array, "B T H W C"], past: Cache) -> tuple[Float[Array, "B t h w D"], Cache]:
        if self.pool:
            x = rearrange(x, "b (t n) h w c -> b t h w (n c)", n=2)
        x = self.space(self.time(x), stride=2, padding=((1, 1), (1, 1)))
        return chain(self.memory, x, past)


class DecoderStage(nn.Module):
    """Memory blocks, then doubles H and W, and T where ``grow``."""

    cfg: TinyVAEConfig
    index: int

    def setup(self):
        inputs, features = self.cfg.decoder_widths[self.index : self.index + 2]
        dtype = jnp.dtype(self.cfg.dtype)
        self.memory = [MemoryBlock(inputs, dtype) for _ in range(self.cfg.blocks)]
        self.time = pointwise(inputs * (2 if self.cfg.grow[self.index] else 1), dtype, use_bias=False)
        self.space = Conv((3, 3, inputs, features), dtype, with_bias=False)

    def __call__(self, x: Float[Array, "B t h w C"], past: Cache, drop: int) -> tuple[Float[Array, "B T H W D"], Cache]:
        """``drop``: frames to leave out after the change of T; what follows works frame by frame."""
        x, kept = chain(self.memory, x, past)
        x = self.time(x)  # pointwise, so it may come before the doubling of H and W
        if self.cfg.grow[self.index]:
            x = rearrange(x, "b t h w (n c) -> b (t n) h w c", n=2)
        return self.space(repeat(x[:, drop:], "b t h w c -> b t (h p) (w q) c", p=2, q=2)), kept


class TinyEncoder(nn.Module):
    """Video in [-1, 1], a multiple of the temporal stride of frames -> latents. Call as (video_BTHW3, cache)."""

    cfg: TinyVAEConfig

    def setup(self):
        width, dtype = self.cfg.encoder_width, jnp.dtype(self.cfg.dtype)
        self.conv_in = Conv((3, 3, 3, width), dtype)
        self.stages = [EncoderStage(self.cfg, pool) for pool in self.cfg.pool]
        self.conv_out = Conv((3, 3, width, self.cfg.channels), dtype)

    def __call__(
        self, video_BTHW3: Float[Array, "B T H W 3"], cache: Cache = None
    ) -> tuple[Float[Array, "B F h w C"], Cache]:
        x = (video_BTHW3 * 0.5 + 0.5).astype(jnp.dtype(self.cfg.dtype))
        x, kept = chain(self.stages, nn.relu(self.conv_in(x)), cache)
        return self.conv_out(x).astype(jnp.float32), kept


class TinyDecoder(nn.Module):
    """Latents -> video in [-1, 1], float32, without the frames before the first. Call as (latents_BFhwC, cache)."""

    cfg: TinyVAEConfig

    def setup(self):
        widths, dtype = self.cfg.decoder_widths, jnp.dtype(self.cfg.dtype)
        self.conv_in = Conv((3, 3, self.cfg.channels, widths[0]), dtype)
        self.stages = [DecoderStage(self.cfg, index) for index in range(len(self.cfg.grow))]
        self.conv_out = Conv((3, 3, widths[-1], 3), dtype)

    def __call__(
        self, latents_BFhwC: Float[Array, "B F h w C"], cache: Cache = None
    ) -> tuple[Float[Array, "B T H W 3"], Cache]:
        x = (jnp.tanh(latents_BFhwC / 3.0) * 3.0).astype(jnp.dtype(self.cfg.dtype))
        x, kept = nn.relu(self.conv_in(x)), []
        for index, stage in enumerate(self.stages):
            last = index == len(self.stages) - 1
            drop = self.cfg.temporal_stride - 1 if last and cache is None else 0
            x, after = stage(x, None if cache is None else cache[index], drop)
            kept.append(after)
        x = self.conv_out(nn.relu(x)).astype(jnp.float32)
        return jnp.clip(x, 0.0, 1.0) * 2.0 - 1.0, tuple(kept)


@dataclasses.dataclass(frozen=True)
class TinyVAE:
    """Encoder and decoder as pure functions of their parameters; see `vae.WanVAE`, whose interface this is."""

    cfg: TinyVAEConfig = TinyVAEConfig()

    @property
    def first_frames(self) -> int:
        """Frames of video that make the first latent frame."""
        return self.cfg.temporal_stride

    def init(self, key: jax.Array) -> dict:
        """Random parameters, float32."""
        side, keys = self.cfg.spatial_stride, jax.random.split(key)
        video = jnp.zeros((1, self.cfg.temporal_stride, side, side, 3))
        return {
            "encoder": TinyEncoder(self.cfg).init(keys[0], video)["params"],
            "decoder": TinyDecoder(self.cfg).init(keys[1], jnp.zeros((1, 1, 1, 1, self.cfg.channels)))["params"],
        }

    def encode_step(
        self, params: Any, cache: Cache, video_BTHWC: Float[Array, "B T H W 3"]
    ) -> tuple[Cache, Float[Array, "B F h w C"]]:
        """A multiple of ``cfg.temporal_stride`` frames to latents; the cache is None at the start of a video."""
        latents, cache = TinyEncoder(self.cfg).apply({"params": params["encoder"]}, video_BTHWC, cache)
        return cache, latents

    def decode_step(
        self, params: Any, cache: Cache, latents_BFhwC: Float[Array, "B F h w C"]
    ) -> tuple[Cache, Float[Array, "B T H W 3"]]:
        """Any number of latent frames to frames in [-1, 1]; with the cache None, one for the first and four each."""
        video, cache = TinyDecoder(self.cfg).apply({"params": params["decoder"]}, latents_BFhwC, cache)
        return cache, video
