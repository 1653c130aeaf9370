"""The video autoencoder of Wan2.1 (METHOD_SPEC A.7), causal in time, so that it runs as a stream.

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
from einops import rearrange, repeat
from jaxtyping import Array, Float

WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip

Cache = Any  # a nest of [B, 1 or 2, H, W, C] arrays; None before the first frame
_TAPS = 3  # frames that a causal convolution reads
_CONV = {4: ("NHWC", "HWIO", "NHWC"), 5: ("NDHWC", "DHWIO", "NDHWC")}


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


# --- layers -------------------------------------------------------------------------------------------------------


def conv(x, kernel, bias, *, stride: int = 1, padding="SAME"):
    """Convolution of [N, H, W, C] or [N, T, H, W, C], channels last; ``stride`` and ``padding`` for every axis."""
    y = jax.lax.conv_general_dilated(x, kernel, (stride,) * (x.ndim - 2), padding, dimension_numbers=_CONV[x.ndim])
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class Conv(nn.Module):
    """Convolution of every frame by itself, kernel [k, k, I, O].

    Attributes:
      shape: of the kernel.
      dtype: of the computation.
      bias: whether there is one.
    """

    shape: tuple[int, ...]
    dtype: Any
    with_bias: bool = True

    def setup(self):
        fan_in = nn.initializers.lecun_normal(in_axis=tuple(range(len(self.shape) - 1)))
        self.kernel = self.param("kernel", fan_in, self.shape, jnp.float32)
        if self.with_bias:
            self.bias = self.param("bias", nn.initializers.zeros, self.shape[-1:], jnp.float32)

    def weights(self):
        """(kernel, bias or None) in the dtype of the computation."""
        return self.kernel.astype(self.dtype), self.bias.astype(self.dtype) if self.with_bias else None

    def __call__(self, x_BTHWC, *, stride: int = 1, padding="SAME"):
        y = conv(rearrange(x_BTHWC, "b t h w c -> (b t) h w c"), *self.weights(), stride=stride, padding=padding)
        return rearrange(y, "(b t) h w c -> b t h w c", b=x_BTHWC.shape[0])


class CausalConv(Conv):
    """Convolution over the current and the two earlier frames, kernel [3, 3, 3, I, O], zeros before the first."""

    def __call__(self, x_BTHWC, past):
        """(output, last two frames of the input); ``past`` is what the call before it gave, or None."""
        kernel, bias = self.weights()
        if past is None:
            kept = jnp.concatenate([jnp.zeros_like(x_BTHWC), x_BTHWC], axis=1)[:, -2:]
            if x_BTHWC.shape[1] == 1:  # the kernel's other frames would read zeros
                return conv(x_BTHWC[:, 0], kernel[-1], bias)[:, None], kept
            past = jnp.zeros_like(kept)
        x = jnp.concatenate([past, x_BTHWC], axis=1)
        y = jax.lax.platform_dependent(x, kernel, cpu=_frame_by_frame, default=_three_dimensional)
        return y + bias[None, None, None, None], x[:, -2:]


def _three_dimensional(x, kernel):
    return conv(x, kernel, None, padding=((0, 0), (1, 1), (1, 1)))


def _frame_by_frame(x, kernel):
    """The same as convolutions of frames: XLA's three-dimensional one takes three times as long on a CPU."""
    frames = x.shape[1] - (_TAPS - 1)
    parts = [rearrange(x[:, i : i + frames], "b t h w c -> (b t) h w c") for i in range(_TAPS)]
    y = sum(conv(part, tap, None) for part, tap in zip(parts, kernel))
    return rearrange(y, "(b t) h w c -> b t h w c", b=x.shape[0])


class TimeConv(Conv):
    """Convolution along time alone, kernel [3, I, O], over frames of which the first two are only read."""

    def __call__(self, x_BTHWC, *, stride: int = 1):
        kernel, bias = self.weights()
        frames = x_BTHWC.shape[1] - (_TAPS - 1)
        taps = [x_BTHWC[:, i : i + frames : stride] for i in range(_TAPS)]
        kernel = rearrange(kernel, "t i o -> (t i) o")
        return jnp.concatenate(taps, axis=-1) @ kernel + bias[None, None, None, None]


class Norm(nn.Module):
    """x / |x| * sqrt(C) * scale over the channels, in float32."""

    features: int

    def setup(self):
        self.scale = self.param("scale", nn.initializers.ones, (self.features,), jnp.float32)

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True))
        scale = self.scale.reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32 * (self.features**0.5 / jnp.maximum(length, 1e-12)) * scale).astype(x.dtype)


def _pointwise(features: int, dtype) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, param_dtype=jnp.float32)


class ResBlock(nn.Module):
    """Norm, SiLU, causal convolution, twice, around a shortcut."""

    inputs: int
    features: int
    dtype: Any

    def setup(self):
        self.norm1, self.norm2 = Norm(self.inputs), Norm(self.features)
        self.conv1 = CausalConv((3, 3, 3, self.inputs, self.features), self.dtype)
        self.conv2 = CausalConv((3, 3, 3, self.features, self.features), self.dtype)
        if self.inputs != self.features:
            self.shortcut = _pointwise(self.features, self.dtype)

    def __call__(self, x, past):
        first, second = past or (None, None)
        h, first = self.conv1(nn.silu(self.norm1(x)), first)
        h, second = self.conv2(nn.silu(self.norm2(h)), second)
        return (x if self.inputs == self.features else self.shortcut(x)) + h, (first, second)


class Attention(nn.Module):
    """One head of self-attention within every frame."""

    features: int
    dtype: Any

    def setup(self):
        self.norm = Norm(self.features)
        self.qkv, self.proj = _pointwise(3 * self.features, self.dtype), _pointwise(self.features, self.dtype)

    def __call__(self, x_BTHWC):
        b, t, h, w, _ = x_BTHWC.shape
        qkv = rearrange(self.qkv(self.norm(x_BTHWC)), "b t h w (n c) -> n (b t) (h w) 1 c", n=3)
        out = jax.nn.dot_product_attention(*qkv, implementation="xla")
        return x_BTHWC + self.proj(rearrange(out, "(b t) (h w) 1 c -> b t h w c", b=b, t=t, h=h, w=w))


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    features: int
    dtype: Any

    def setup(self):
        self.res = [ResBlock(self.features, self.features, self.dtype) for _ in range(2)]
        self.attention = Attention(self.features, self.dtype)

    def __call__(self, x, past):
        first, second = past or (None, None)
        x, first = self.res[0](x, first)
        x, second = self.res[1](self.attention(x), second)
        return x, (first, second)


class Down(nn.Module):
    """Halves H and W, and T where ``temporal``."""

    features: int
    temporal: bool
    dtype: Any

    def setup(self):
        self.space = Conv((3, 3, self.features, self.features), self.dtype)
        if self.temporal:
            self.time = TimeConv((_TAPS, self.features, self.features), self.dtype)

    def __call__(self, x, past):
        x = self.space(x, stride=2, padding=((0, 1), (0, 1)))
        if not self.temporal:
            return x, ()
        last = x[:, -1:]
        if past is not None:  # the first frame of a video stays as it is
            x = self.time(jnp.concatenate([past, x], axis=1), stride=2)
        return x, last


class Up(nn.Module):
    """Doubles H and W and halves the width; doubles T where ``temporal``."""

    features: int
    temporal: bool
    dtype: Any

    def setup(self):
        self.space = Conv((3, 3, self.features, self.features // 2), self.dtype)
        if self.temporal:
            self.time = TimeConv((_TAPS, self.features, 2 * self.features), self.dtype)

    def __call__(self, x, past):
        kept = ()
        if self.temporal and past is None:
            # The first frame of a video stays one frame, and the convolution in time never sees it.
            kept = jnp.zeros_like(jnp.concatenate([x, x], axis=1))
        elif self.temporal:
            x = jnp.concatenate([past, x], axis=1)
            kept = x[:, -2:]
            x = rearrange(self.time(x), "b t h w (n c) -> b (t n) h w c", n=2)
        return self.space(repeat(x, "b t h w c -> b t (h p) (w q) c", p=2, q=2)), kept


class Stage(nn.Module):
    """Residual blocks, then a change of resolution unless it is the last stage.

    Attributes:
      inputs, features: widths before and after the first block.
      blocks: residual blocks.
      resample: `Down`, `Up` or None.
      temporal: see there.
    """

    inputs: int
    features: int
    blocks: int
    resample: type | None
    temporal: bool
    dtype: Any

    def setup(self):
        inputs = (self.inputs, *(self.features for _ in range(self.blocks - 1)))
        self.res = [ResBlock(i, self.features, self.dtype) for i in inputs]
        if self.resample is not None:
            self.resize = self.resample(self.features, self.temporal, self.dtype)

    def __call__(self, x, past):
        kept, past = [], past or (None,) * (self.blocks + 1)
        for block, before in zip(self.res, past):
            x, after = block(x, before)
            kept.append(after)
        if self.resample is not None:
            x, after = self.resize(x, past[-1])
            kept.append(after)
        return x, tuple(kept)


def _chain(layers, x, past):
    """Layers that take and give caches, one after the other."""
    kept = []
    for layer, before in zip(layers, past or (None,) * len(layers), strict=True):
        x, after = layer(x, before)
        kept.append(after)
    return x, tuple(kept)


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
        self.quant = _pointwise(2 * cfg.channels, dtype)

    def __call__(self, video_BTHW3, cache: Cache = None):
        past = cache or {"in": None, "out": None}
        x, kept_in = self.conv_in(video_BTHW3.astype(jnp.dtype(self.cfg.dtype)), past["in"])
        x, kept = _chain((*self.stages, self.middle), x, past.get("stages"))
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
        self.quant = _pointwise(cfg.channels, dtype)
        self.conv_in = CausalConv((3, 3, 3, cfg.channels, widths[0]), dtype)
        self.middle = Middle(widths[0], dtype)
        inputs = (widths[0], *(width // 2 for width in widths[:-1]))  # `Up` halves the width
        self.stages = [
            Stage(i, o, cfg.res_blocks + 1, Up if n < len(temporal) else None, n < len(temporal) and temporal[n], dtype)
            for n, (i, o) in enumerate(zip(inputs, widths))
        ]
        self.norm_out = Norm(widths[-1])
        self.conv_out = CausalConv((3, 3, 3, widths[-1], 3), dtype)

    def __call__(self, latents_BFhwC, cache: Cache = None):
        past = cache or {"in": None, "out": None}
        x = latents_BFhwC.astype(jnp.float32) * _row(self.cfg.std) + _row(self.cfg.mean)
        x, kept_in = self.conv_in(self.quant(x.astype(jnp.dtype(self.cfg.dtype))), past["in"])
        x, kept = _chain((self.middle, *self.stages), x, past.get("stages"))
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
        latents, cache = Encoder(self.cfg).apply({"params": params["encoder"]}, video_BTHWC, cache)
        return cache, latents

    def decode_step(
        self, params: Any, cache: Cache, latents_BFhwC: Float[Array, "B F h w C"]
    ) -> tuple[Cache, Float[Array, "B T H W 3"]]:
        """The first latent frame (cache None, gives one frame), or any number more, to frames in [-1, 1]."""
        video, cache = Decoder(self.cfg).apply({"params": params["decoder"]}, latents_BFhwC, cache)
        return cache, video
