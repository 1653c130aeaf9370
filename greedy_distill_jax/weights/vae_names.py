"""The mapping tables of the video autoencoders: Wan2.1_VAE.pth, diffusers' `AutoencoderKLWan`, TAEHV's taew2_1.pth.

One table per autoencoder; everything is a rename, a transposition ([..., I, O] against [O, I, ...]) and axes of length
one, so nothing is lost or rounded. Original and diffusers names differ by renaming alone.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from greedy_distill_jax.codecs.vae import VAEConfig, WanVAE
from greedy_distill_jax.codecs.vae_tiny import TinyVAE, TinyVAEConfig
from greedy_distill_jax.distribution.sharding import leaf_paths

VAE = WanVAE | TinyVAE


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
      ours: path of the leaf.
      original: name in Wan's (or TAEHV's) own file.
      diffusers: name in `AutoencoderKLWan`; "" where there is none.
      ones: axes of length one at the end of the foreign tensor.
    """

    ours: str
    original: str
    diffusers: str = ""
    ones: int = 0

    def to_foreign(self, value: np.ndarray) -> np.ndarray:
        """The foreign tensor of a leaf of ours, contiguous."""
        if self.ours.endswith("/kernel"):
            value = np.moveaxis(value, (-1, -2), (0, 1))
        return np.ascontiguousarray(value).reshape(*value.shape, *(1,) * self.ones)

    def from_foreign(self, value: np.ndarray) -> np.ndarray:
        """A leaf of ours, contiguous."""
        value = value.reshape(value.shape[: value.ndim - self.ones])
        if self.ours.endswith("/kernel"):
            value = np.moveaxis(value, (0, 1), (-1, -2))
        return np.ascontiguousarray(value)

    def foreign_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the foreign tensor of a leaf of ours."""
        if self.ours.endswith("/kernel"):
            shape = (shape[-1], shape[-2], *shape[:-2])
        return (*shape, *(1,) * self.ones)


def _conv(ours: str, original: str, diffusers: str = "", ones: int = 0, bias: bool = True) -> Iterator[Row]:
    yield Row(f"{ours}/kernel", f"{original}.weight", diffusers and f"{diffusers}.weight", ones)
    if bias:
        yield Row(f"{ours}/bias", f"{original}.bias", diffusers and f"{diffusers}.bias")


def _norm(ours: str, original: str, diffusers: str, ones: int = 3) -> Row:
    return Row(f"{ours}/scale", f"{original}.gamma", f"{diffusers}.gamma", ones)


def _block(ours: str, original: str, diffusers: str, shortcut: bool = False) -> Iterator[Row]:
    yield _norm(f"{ours}/norm1", f"{original}.residual.0", f"{diffusers}.norm1")
    yield from _conv(f"{ours}/conv1", f"{original}.residual.2", f"{diffusers}.conv1")
    yield _norm(f"{ours}/norm2", f"{original}.residual.3", f"{diffusers}.norm2")
    yield from _conv(f"{ours}/conv2", f"{original}.residual.6", f"{diffusers}.conv2")
    if shortcut:
        yield from _conv(f"{ours}/shortcut", f"{original}.shortcut", f"{diffusers}.conv_shortcut", ones=3)


def _resample(ours: str, original: str, diffusers: str, temporal: bool) -> Iterator[Row]:
    yield from _conv(f"{ours}/space", f"{original}.resample.1", f"{diffusers}.resample.1")
    if temporal:
        yield from _conv(f"{ours}/time", f"{original}.time_conv", f"{diffusers}.time_conv", ones=2)


def _ends(part: str) -> Iterator[Row]:
    """What encoder and decoder have in common: both ends and the middle."""
    yield from _conv(f"{part}/conv_in", f"{part}.conv1", f"{part}.conv_in")
    for i, n in ((0, 0), (1, 2)):
        yield from _block(f"{part}/middle/res_{i}", f"{part}.middle.{n}", f"{part}.mid_block.resnets.{i}")
    ours, original, other = f"{part}/middle/attention", f"{part}.middle.1", f"{part}.mid_block.attentions.0"
    yield _norm(f"{ours}/norm", f"{original}.norm", f"{other}.norm", ones=2)
    yield from _conv(f"{ours}/qkv", f"{original}.to_qkv", f"{other}.to_qkv", ones=2)
    yield from _conv(f"{ours}/proj", f"{original}.proj", f"{other}.proj", ones=2)
    yield _norm(f"{part}/norm_out", f"{part}.head.0", f"{part}.norm_out")
    yield from _conv(f"{part}/conv_out", f"{part}.head.2", f"{part}.conv_out")


def _wan_rows(cfg: VAEConfig) -> Iterator[Row]:
    yield from _conv("encoder/quant", "conv1", "quant_conv", ones=3)
    yield from _conv("decoder/quant", "conv2", "post_quant_conv", ones=3)
    for part in ("encoder", "decoder"):
        yield from _ends(part)
    n, last = 0, len(cfg.temporal)  # n: number within the flat lists of the others
    for stage, (inputs, width) in enumerate(zip((cfg.dim, *cfg.widths), cfg.widths)):
        for i in range(cfg.res_blocks):
            names = f"encoder.downsamples.{n}", f"encoder.down_blocks.{n}"
            yield from _block(f"encoder/stages_{stage}/res_{i}", *names, shortcut=i == 0 and inputs != width)
            n += 1
        if stage < last:
            names = f"encoder.downsamples.{n}", f"encoder.down_blocks.{n}"
            yield from _resample(f"encoder/stages_{stage}/resize", *names, cfg.temporal[stage])
            n += 1
    n, widths = 0, cfg.widths[::-1]
    for stage, (inputs, width) in enumerate(zip((widths[0], *(w // 2 for w in widths)), widths)):
        for i in range(cfg.res_blocks + 1):
            names = f"decoder.upsamples.{n}", f"decoder.up_blocks.{stage}.resnets.{i}"
            yield from _block(f"decoder/stages_{stage}/res_{i}", *names, shortcut=i == 0 and inputs != width)
            n += 1
        if stage < last:
            names = f"decoder.upsamples.{n}", f"decoder.up_blocks.{stage}.upsamplers.0"
            yield from _resample(f"decoder/stages_{stage}/resize", *names, cfg.temporal[::-1][stage])
            n += 1


def _tiny_rows(cfg: TinyVAEConfig) -> Iterator[Row]:
    def memory(ours: str, start: int) -> Iterator[Row]:
        part = ours.partition("/")[0]
        for i in range(cfg.blocks):
            for j in range(3):
                yield from _conv(f"{ours}/memory_{i}/conv_{j}", f"{part}.{start + i}.conv.{2 * j}")

    yield from _conv("encoder/conv_in", "encoder.0")
    n = 2  # number within torch's Sequential, which counts activations too
    for stage in range(len(cfg.pool)):
        ours = f"encoder/stages_{stage}"
        yield from _conv(f"{ours}/time", f"encoder.{n}.conv", ones=2, bias=False)
        yield from _conv(f"{ours}/space", f"encoder.{n + 1}", bias=False)
        yield from memory(ours, n + 2)
        n += 2 + cfg.blocks
    yield from _conv("encoder/conv_out", f"encoder.{n}")
    yield from _conv("decoder/conv_in", "decoder.1")
    n = 3
    for stage in range(len(cfg.grow)):
        ours = f"decoder/stages_{stage}"
        yield from memory(ours, n)
        n += cfg.blocks
        yield from _conv(f"{ours}/time", f"decoder.{n + 1}.conv", ones=2, bias=False)
        yield from _conv(f"{ours}/space", f"decoder.{n + 2}", bias=False)
        n += 3
    yield from _conv("decoder/conv_out", f"decoder.{n + 1}")


def rows(vae: VAE) -> tuple[Row, ...]:
    """The table of one autoencoder."""
    return tuple(_tiny_rows(vae.cfg) if isinstance(vae, TinyVAE) else _wan_rows(vae.cfg))


def parameter_shapes(vae: VAE) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter."""
    return {path: tuple(x.shape) for path, x in leaf_paths(jax.eval_shape(vae.init, jax.random.key(0)))}


def describe(vae: VAE) -> str:
    """One line: kind and sizes."""
    cfg = vae.cfg
    if isinstance(vae, TinyVAE):
        return f"a tiny VAE (widths {cfg.encoder_width} and {list(cfg.decoder_widths)}, {cfg.channels} channels)"
    return f"a Wan2.1 VAE (dim {cfg.dim} x {list(cfg.multipliers)}, {cfg.channels} channels)"
