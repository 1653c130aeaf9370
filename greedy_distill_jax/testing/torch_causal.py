"""The causal student in eager PyTorch, in the manner of Self-Forcing: a peer to compare numbers and times with.

Plain functions over Wan's tensors by their names, in float32. Keys are cached rotated in one preallocated buffer per
layer; every call of a chunk overwrites the chunk's slots, and a chunk that finds the window full moves the history
behind the sink towards the front first (METHOD_SPEC B.2, B.3).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.export.source import TreeSource
from greedy_distill_jax.export.write import tensors_of
from greedy_distill_jax.models.wan_config import CausalConfig
from greedy_distill_jax.stream import initial_noise

THETA = 10_000.0


def step_noise(state: Any, steps: int) -> list[np.ndarray]:
    """What the next step of one of our streams draws, for ``TorchCausal.step``."""
    key, shape = jax.random.split(state.key)[1], state.last.shape
    more = [jax.random.normal(jax.random.fold_in(key, n), shape, jnp.float32) for n in range(1, steps)]
    return [np.asarray(x) for x in (initial_noise(key, shape), *more)]


class TorchCausal:
    """A stream of one causal student: absolute positions, a clean pass after every chunk.

    Args:
      params: the student's parameters, our tree.
      cfg: of the student; rope_mode "absolute", context "clean", a velocity head.
      text: encoder rows [B, M, C].
      sigmas: of the denoising steps, re-noised in between.
      grid: rows and columns of a latent frame.
    """

    def __init__(self, params: Any, cfg: CausalConfig, text: np.ndarray, sigmas: Sequence[float], grid):
        import torch

        if (cfg.rope_mode, cfg.context, cfg.base.prediction) != ("absolute", "clean", "velocity"):
            raise ValueError(f"TorchCausal streams absolute positions, clean context and a velocity head, got {cfg}.")
        self.torch, self.cfg, self.sigmas, self.index = torch, cfg, tuple(sigmas), 0
        base = cfg.base
        named = tensors_of(TreeSource(base, params), "original", "float32")
        self.weights = {name: torch.from_numpy(np.array(value)) for name, value in named}
        self.grid = tuple(side // base.patch for side in grid)
        self.frame_tokens = self.grid[0] * self.grid[1]
        self.tokens = cfg.chunk * self.frame_tokens
        rows = self._mlp("text_embedding", torch.from_numpy(np.array(text)), torch.nn.functional.gelu)
        names = [f"blocks.{layer}" for layer in range(base.num_layers)]
        self.text = [self._key_value(f"{name}.cross_attn", rows) for name in names]
        slots = (cfg.sink_chunks + cfg.ring_chunks + 1) * self.tokens
        shape = (len(text), slots, base.num_heads, base.head_dim)
        self.cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in names]
        self.filled = 0  # tokens in the cache, without the chunk in the making

    def step(self, noise: Sequence[np.ndarray]) -> np.ndarray:
        """The next clean chunk [B, g, H, W, C]; ``noise``: what it starts from, and one more for every further step."""
        torch, after = self.torch, (*self.sigmas[1:], 0.0)
        with torch.inference_mode():
            self._make_room()
            rope = self._rope()
            x = torch.from_numpy(np.array(noise[0]))
            for sigma, next_sigma, fresh in zip(self.sigmas, after, (*noise[1:], None)):
                x0 = x - sigma * self._velocity(x, sigma, rope)
                x = x0 if fresh is None else (1 - next_sigma) * x0 + next_sigma * torch.from_numpy(np.array(fresh))
            self._velocity(x, 0.0, rope, with_head=False)
        self.filled, self.index = self.filled + self.tokens, self.index + 1
        return x.numpy()

    def _make_room(self) -> None:
        """A full cache loses the oldest chunk behind the sink."""
        sink = self.cfg.sink_chunks * self.tokens
        if self.filled + self.tokens > self.cache[0][0].shape[1]:
            for buffer in (b for pair in self.cache for b in pair):
                buffer[:, sink : self.filled - self.tokens] = buffer[:, sink + self.tokens : self.filled].clone()
            self.filled -= self.tokens

    def _rope(self):
        """cos and sin [tokens, 1, K / 2] of the chunk's own tokens."""
        torch, pairs = self.torch, self.cfg.base.head_dim // 2
        start, angles = self.index * self.cfg.chunk, []
        sizes = (self.cfg.chunk, *self.grid)
        for axis, size in enumerate(sizes):
            count = pairs // 3 if axis else pairs - 2 * (pairs // 3)
            position = torch.arange(size, dtype=torch.float64) + (0 if axis else start)
            angle = position[:, None] * THETA ** (-torch.arange(count, dtype=torch.float64) / count)
            angles.append(angle.reshape([size if n == axis else 1 for n in range(3)] + [count]).expand(*sizes, count))
        angle = torch.cat(angles, dim=-1).reshape(self.tokens, 1, pairs)
        return angle.cos().float(), angle.sin().float()

    def _rotate(self, x, rope):
        cos, sin = rope
        even, odd = x[..., 0::2], x[..., 1::2]
        return self.torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    def _linear(self, name, x):
        return self.torch.nn.functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _mlp(self, name, x, activation):
        options = {"approximate": "tanh"} if activation is self.torch.nn.functional.gelu else {}
        return self._linear(f"{name}.2", activation(self._linear(f"{name}.0", x), **options))

    def _norm(self, x, name=None):
        weight, bias = (self.weights.get(f"{name}.{part}") for part in ("weight", "bias"))
        return self.torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, self.cfg.base.eps)

    def _heads(self, name, x, normed: bool):
        y = self._linear(name, x)
        if normed:
            *path, letter = name.split(".")
            weight = self.weights[".".join([*path, f"norm_{letter}.weight"])]
            y = self.torch.nn.functional.rms_norm(y, y.shape[-1:], weight, self.cfg.base.eps)
        return y.unflatten(-1, (self.cfg.base.num_heads, -1))

    def _key_value(self, name, x):
        return self._heads(f"{name}.k", x, True), self._heads(f"{name}.v", x, False)

    def _attend(self, name, q, k, v):
        attend = self.torch.nn.functional.scaled_dot_product_attention
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        return self._linear(f"{name}.o", out.flatten(2))

    def _velocity(self, x, sigma: float, rope, with_head: bool = True):
        """The network's answer for the chunk; its keys and values go into the cache."""
        torch, base, end = self.torch, self.cfg.base, self.filled + self.tokens
        p, (rows, columns) = base.patch, self.grid
        kernel, bias = (self.weights[f"patch_embedding.{part}"] for part in ("weight", "bias"))
        h = torch.nn.functional.conv3d(x.permute(0, 4, 1, 2, 3), kernel, bias, stride=(1, p, p))
        h = h.flatten(2).transpose(1, 2)
        half = base.freq_dim // 2
        angle = 1000.0 * sigma * THETA ** (-torch.arange(half, dtype=torch.float64) / half)
        e = torch.cat([angle.cos(), angle.sin()]).float().expand(len(x), -1)
        e = self._mlp("time_embedding", e, torch.nn.functional.silu)
        e0 = self._linear("time_projection.1", torch.nn.functional.silu(e)).unflatten(-1, (6, -1))
        for layer, (text, (keys, values)) in enumerate(zip(self.text, self.cache)):
            name = f"blocks.{layer}"
            m = (self.weights[f"{name}.modulation"] + e0)[:, :, None]
            shift1, scale1, gate1, shift2, scale2, gate2 = m.unbind(1)
            y = self._norm(h) * (1 + scale1) + shift1
            own, v = self._key_value(f"{name}.self_attn", y)
            keys[:, self.filled : end], values[:, self.filled : end] = self._rotate(own, rope), v
            q = self._rotate(self._heads(f"{name}.self_attn.q", y, True), rope)
            h = h + self._attend(f"{name}.self_attn", q, keys[:, :end], values[:, :end]) * gate1
            q = self._heads(f"{name}.cross_attn.q", self._norm(h, f"{name}.norm3"), True)
            h = h + self._attend(f"{name}.cross_attn", q, *text)
            y = self._norm(h) * (1 + scale2) + shift2
            h = h + self._mlp(f"{name}.ffn", y, torch.nn.functional.gelu) * gate2
        if not with_head:
            return None
        shift, scale = (self.weights["head.modulation"] + e[:, None])[:, :, None].unbind(1)
        out = self._linear("head.head", self._norm(h) * (1 + scale) + shift)
        out = out.reshape(len(x), x.shape[1], rows, columns, p, p, base.channels)
        return out.permute(0, 1, 2, 4, 3, 5, 6).reshape(x.shape)
