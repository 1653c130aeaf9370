"""Layers of the video autoencoders: convolutions of frames, and causal ones that take and give what they remember.

Arrays are [B, T, H, W, C]. ``past`` is None for the first frame of a video, and then there is one frame.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float

from greedy_distill_jax.models.parameter import parameter

_TAPS = 3  # frames that a causal convolution reads
_CONV = {4: ("NHWC", "HWIO", "NHWC"), 5: ("NDHWC", "DHWIO", "NDHWC")}


def conv(
    x: Float[Array, "N *T H W I"],
    kernel: Float[Array, "*k I O"],
    bias: Float[Array, "O"] | None,  # noqa: F821 (one letter alone looks like a name)
    *,
    stride: int = 1,
    padding: Any = "SAME",
) -> Float[Array, "N *t h w O"]:
    """Convolution of [N, H, W, C] or [N, T, H, W, C], channels last; ``stride`` and ``padding`` for every axis."""
    y = jax.lax.conv_general_dilated(x, kernel, (stride,) * (x.ndim - 2), padding, dimension_numbers=_CONV[x.ndim])
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class Conv(nn.Module):
    """Convolution of every frame by itself, kernel [k, k, I, O].

    Attributes:
      shape: of the kernel.
      dtype: of the computation.
      with_bias: whether there is one.
    """

    shape: tuple[int, ...]
    dtype: Any
    with_bias: bool = True

    def setup(self):
        fan_in = nn.initializers.lecun_normal(in_axis=tuple(range(len(self.shape) - 1)))
        self.kernel = parameter(self, "kernel", fan_in, self.shape)
        if self.with_bias:
            self.bias = parameter(self, "bias", nn.initializers.zeros, self.shape[-1:])

    def weights(self):
        """(kernel, bias or None) in the dtype of the computation."""
        return self.kernel.astype(self.dtype), self.bias.astype(self.dtype) if self.with_bias else None

    def __call__(
        self, x_BTHWC: Float[Array, "B T H W I"], *, stride: int = 1, padding: Any = "SAME"
    ) -> Float[Array, "B T h w O"]:
        y = conv(rearrange(x_BTHWC, "b t h w c -> (b t) h w c"), *self.weights(), stride=stride, padding=padding)
        return rearrange(y, "(b t) h w c -> b t h w c", b=x_BTHWC.shape[0])


class CausalConv(Conv):
    """Convolution over the current and the two earlier frames, kernel [3, 3, 3, I, O], zeros before the first."""

    def __call__(
        self, x_BTHWC: Float[Array, "B T H W I"], past: Float[Array, "B 2 H W I"] | None
    ) -> tuple[Float[Array, "B T H W O"], Float[Array, "B 2 H W I"]]:
        """(output, last two frames of the input); ``past`` is what the call before it gave, or None."""
        kernel, bias = self.weights()
        if past is None:  # only the kernel's last frame reads anything but zeros
            kept = jnp.concatenate([jnp.zeros_like(x_BTHWC), x_BTHWC], axis=1)
            return conv(x_BTHWC[:, 0], kernel[-1], bias)[:, None], kept
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

    def __call__(self, x_BTHWC: Float[Array, "B T H W I"], *, stride: int = 1) -> Float[Array, "B t H W O"]:
        kernel, bias = self.weights()
        frames = x_BTHWC.shape[1] - (_TAPS - 1)
        taps = [x_BTHWC[:, i : i + frames : stride] for i in range(_TAPS)]
        kernel = rearrange(kernel, "t i o -> (t i) o")
        return jnp.concatenate(taps, axis=-1) @ kernel + bias[None, None, None, None]


class Norm(nn.Module):
    """x / |x| * sqrt(C) * scale over the channels, in float32."""

    features: int

    def setup(self):
        self.scale = parameter(self, "scale", nn.initializers.ones, (self.features,))

    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        x32 = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True))
        scale = self.scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32 * (self.features**0.5 / jnp.maximum(length, 1e-12)) * scale).astype(x.dtype)


def pointwise(features: int, dtype, *, use_bias: bool = True) -> nn.Dense:
    """A convolution of single pixels."""
    return nn.Dense(features, use_bias=use_bias, dtype=dtype, param_dtype=jnp.float32)


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
            self.shortcut = pointwise(self.features, self.dtype)

    def __call__(self, x: Float[Array, "B T H W I"], past: Any) -> tuple[Float[Array, "B T H W O"], Any]:
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
        self.qkv, self.proj = pointwise(3 * self.features, self.dtype), pointwise(self.features, self.dtype)

    def __call__(self, x_BTHWC: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        q, k, v = rearrange(self.qkv(self.norm(x_BTHWC)), "b t h w (n c) -> n b t (h w) c", n=3)
        logits = jnp.einsum("btqc,btkc->btqk", q, k, preferred_element_type=jnp.float32) * self.features**-0.5
        out = jnp.einsum("btqk,btkc->btqc", jax.nn.softmax(logits).astype(v.dtype), v)
        return x_BTHWC + self.proj(rearrange(out, "b t (h w) c -> b t h w c", h=x_BTHWC.shape[2]))


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    features: int
    dtype: Any

    def setup(self):
        self.res = [ResBlock(self.features, self.features, self.dtype) for _ in range(2)]
        self.attention = Attention(self.features, self.dtype)

    def __call__(self, x: Float[Array, "B T H W C"], past: Any) -> tuple[Float[Array, "B T H W C"], Any]:
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

    def __call__(self, x: Float[Array, "B T H W C"], past: Any) -> tuple[Float[Array, "B t h w C"], Any]:
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

    def __call__(self, x: Float[Array, "B t h w C"], past: Any) -> tuple[Float[Array, "B T H W D"], Any]:
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

    def __call__(self, x: Float[Array, "B T H W I"], past: Any) -> tuple[Float[Array, "B t h w O"], Any]:
        kept, past = [], past or (None,) * (self.blocks + 1)
        for block, before in zip(self.res, past):
            x, after = block(x, before)
            kept.append(after)
        if self.resample is not None:
            x, after = self.resize(x, past[-1])
            kept.append(after)
        return x, tuple(kept)


def chain(layers: Any, x: Float[Array, "B T H W I"], past: Any) -> tuple[Float[Array, "B t h w O"], tuple]:
    """Layers that take and give caches, one after the other: (output, a tuple of what they remember)."""
    kept = []
    for layer, before in zip(layers, past or (None,) * len(layers), strict=True):
        x, after = layer(x, before)
        kept.append(after)
    return x, tuple(kept)
