"""Random video autoencoders, and the tiny one in PyTorch, written frame by frame from its tensors alone."""

import jax
import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.codecs.vae import VAEConfig, WanVAE
from greedy_distill_jax.codecs.vae_tiny import TinyVAE, TinyVAEConfig

STATISTICS = dict(channels=4, mean=(0.1, 0.2, -0.3, 0.4), std=(1.0, 2.0, 0.5, 1.5))
WAN = WanVAE(VAEConfig(dim=8))  # Wan2.1's but for the width
SMALL = WanVAE(VAEConfig(dim=6, multipliers=(1, 2, 3), temporal=(True, False), res_blocks=1, **STATISTICS))
TINY = TinyVAE(TinyVAEConfig(encoder_width=8, decoder_widths=(16, 12, 8, 8), blocks=2, channels=4))


def random_params(vae: WanVAE | TinyVAE, seed: int = 0):
    """Parameters of which none is zero or one; signals keep a scale of about one."""
    shapes = jax.eval_shape(vae.init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.standard_normal(leaf.shape)
        if path[-1].key == "kernel":
            return jnp.asarray(value / np.sqrt(np.prod(leaf.shape[:-1])), leaf.dtype)
        return jnp.asarray((path[-1].key == "scale") + 0.3 * value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


class TorchTaehv:
    """TAEHV by the names of its tensors: one frame after the other, every block with the frame it saw before.

    Args:
      tensors: name -> numpy array.
      cfg: sizes.
    """

    def __init__(self, tensors, cfg: TinyVAEConfig):
        import torch

        self.torch, self.cfg = torch, cfg
        self.tensors = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}

    def _conv(self, name, x, **options):
        kernel = self.tensors[f"{name}.weight"]
        bias = self.tensors.get(f"{name}.bias")
        return self.torch.nn.functional.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2, **options)

    def _memory(self, name, frames):
        before, out = self.torch.zeros_like(frames[0]), []
        for frame in frames:
            h = self._conv(f"{name}.conv.0", self.torch.cat([frame, before], 1)).relu()
            h = self._conv(f"{name}.conv.4", self._conv(f"{name}.conv.2", h).relu())
            out.append((h + frame).relu())
            before = frame
        return out

    def encode(self, video):
        """[B, 4 n, 3, H, W] in [0, 1] -> [B, n, C, h, w]."""
        cfg, n = self.cfg, 2
        frames = [self._conv("encoder.0", frame).relu() for frame in video.unbind(1)]
        for pool in cfg.pool:
            if pool:
                frames = [self.torch.cat(pair, 1) for pair in zip(frames[::2], frames[1::2])]
            frames = [self._conv(f"encoder.{n + 1}", self._conv(f"encoder.{n}.conv", f), stride=2) for f in frames]
            for i in range(cfg.blocks):
                frames = self._memory(f"encoder.{n + 2 + i}", frames)
            n += 2 + cfg.blocks
        return self.torch.stack([self._conv(f"encoder.{n}", frame) for frame in frames], 1)

    def decode(self, latents):
        """[B, F, C, h, w] -> [B, 4 F - 3, 3, H, W] in [0, 1]."""
        cfg, n = self.cfg, 3
        frames = [self._conv("decoder.1", (frame / 3).tanh() * 3).relu() for frame in latents.unbind(1)]
        for grow in cfg.grow:
            for i in range(cfg.blocks):
                frames = self._memory(f"decoder.{n + i}", frames)
            n += cfg.blocks
            large = [self.torch.nn.functional.interpolate(frame, scale_factor=2) for frame in frames]
            grown = [self._conv(f"decoder.{n + 1}.conv", frame) for frame in large]
            frames = [part for frame in grown for part in frame.chunk(2 if grow else 1, 1)]
            frames = [self._conv(f"decoder.{n + 2}", frame) for frame in frames]
            n += 3
        frames = [self._conv(f"decoder.{n + 1}", frame.relu()).clamp(0, 1) for frame in frames]
        return self.torch.stack(frames[cfg.temporal_stride - 1 :], 1)
