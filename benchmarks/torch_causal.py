"""The causal student in PyTorch, in the manner of Self-Forcing: a peer to compare numbers and times with.

Plain functions over Wan's tensors by their names, on any device of PyTorch, in one dtype throughout (rotations and
what depends on a timestep only are prepared in float64). Keys are cached rotated in one preallocated buffer per layer;
every call of a chunk overwrites the chunk's slots, and a chunk that finds the window full moves the history behind the
sink towards the front first (docs/method.md, section 4.2).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.models.students.config import CausalConfig
from greedy_distill_jax.streaming.loop import initial_noise
from greedy_distill_jax.weights.source import TreeSource
from greedy_distill_jax.weights.write import tensors_of

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
      device: PyTorch's name of it.
      dtype: of weights, activations and cache, "float32" or "bfloat16"; norms and softmax accumulate in float32.
      compiled: ``torch.compile`` the network once the window is full and every shape stays as it is.
    """

    def __init__(
        self,
        params: Any,
        cfg: CausalConfig,
        text: np.ndarray,
        sigmas: Sequence[float],
        grid: tuple[int, int],
        *,
        device: str = "cpu",
        dtype: str = "float32",
        compiled: bool = False,
    ):
        import torch

        if (cfg.rope_mode, cfg.context, cfg.base.prediction) != ("absolute", "clean", "velocity"):
            raise ValueError(f"TorchCausal streams absolute positions, clean context and a velocity head, got {cfg}.")
        self.torch, self.cfg, self.sigmas, self.index = torch, cfg, tuple(sigmas), 0
        base = cfg.base
        named = tensors_of(TreeSource(base, params), "original", "float32")
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        self.weights = {name: self.tensor(value) for name, value in named}
        self.grid = tuple(side // base.patch for side in grid)
        self.frame_tokens = self.grid[0] * self.grid[1]
        self.tokens = cfg.chunk * self.frame_tokens
        slots = (cfg.sink_chunks + cfg.ring_chunks + 1) * self.tokens
        shape = (len(text), slots, base.num_heads, base.head_dim)
        names = [f"blocks.{layer}" for layer in range(base.num_layers)]
        with torch.inference_mode():
            rows = self._mlp("text_embedding", self.tensor(text), torch.nn.functional.gelu)
            self.text = [self._key_value(f"{name}.cross_attn", rows) for name in names]
            self.cache = [tuple(torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in "kv") for _ in names]
            self.times = {sigma: self._time(sigma, len(text)) for sigma in (*self.sigmas, 0.0)}
        self.filled = 0  # tokens in the cache, without the chunk in the making
        self.compiled = torch.compile(self._velocity, dynamic=False) if compiled else None

    def tensor(self, value: np.ndarray):
        """An array on the peer's device, in its dtype."""
        return self.torch.from_numpy(np.array(value)).to(self.device, self.dtype)

    def step(self, noise: Sequence[Any]) -> Any:
        """The next clean chunk [B, g, H, W, C], ready; ``noise``: what it starts from, one more per further step.

        Both are tensors of the peer's device (``tensor``).
        """
        torch, after = self.torch, (*self.sigmas[1:], 0.0)
        with torch.inference_mode():
            full = self._make_room()
            velocity = self.compiled if full and self.compiled else self._velocity
            rope, x = self._rope(), noise[0]
            for sigma, next_sigma, fresh in zip(self.sigmas, after, (*noise[1:], None)):
                x0 = x - sigma * velocity(x, self.times[sigma], rope, self.filled)
                x = x0 if fresh is None else (1 - next_sigma) * x0 + next_sigma * fresh
            velocity(x, self.times[0.0], rope, self.filled, with_head=False)
        self.filled, self.index = self.filled + self.tokens, self.index + 1
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return x

    def _make_room(self) -> bool:
        """Whether the cache was full; then it has lost the oldest chunk behind the sink."""
        sink = self.cfg.sink_chunks * self.tokens
        full = self.filled + self.tokens > self.cache[0][0].shape[1]
        if full:
            for buffer in (b for pair in self.cache for b in pair):
                buffer[:, sink : self.filled - self.tokens] = buffer[:, sink + self.tokens : self.filled].clone()
            self.filled -= self.tokens
        return full

    def _time(self, sigma: float, batch: int):
        """(time embedding [B, D], its projection for the blocks [B, 6, D]) of one level of noise."""
        torch, half = self.torch, self.cfg.base.freq_dim // 2
        angle = 1000.0 * sigma * THETA ** (-torch.arange(half, dtype=torch.float64) / half)
        e = torch.cat([angle.cos(), angle.sin()]).expand(batch, -1).to(self.device, self.dtype)
        e = self._mlp("time_embedding", e, torch.nn.functional.silu)
        return e, self._linear("time_projection.1", torch.nn.functional.silu(e)).unflatten(-1, (6, -1))

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
        return tuple(x.float().to(self.device) for x in (angle.cos(), angle.sin()))

    def _rotate(self, x, rope):
        cos, sin = rope
        even, odd = x[..., 0::2], x[..., 1::2]
        return self.torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)

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

    def _velocity(self, x, times, rope, filled: int, with_head: bool = True):
        """The network's answer for the chunk behind ``filled`` tokens; its keys and values go into the cache."""
        torch, base, end, (e, e0) = self.torch, self.cfg.base, filled + self.tokens, times
        p, (rows, columns) = base.patch, self.grid
        kernel, bias = (self.weights[f"patch_embedding.{part}"] for part in ("weight", "bias"))
        h = torch.nn.functional.conv3d(x.permute(0, 4, 1, 2, 3), kernel, bias, stride=(1, p, p))
        h = h.flatten(2).transpose(1, 2)
        for layer, (text, (keys, values)) in enumerate(zip(self.text, self.cache)):
            name = f"blocks.{layer}"
            m = (self.weights[f"{name}.modulation"] + e0)[:, :, None]
            shift1, scale1, gate1, shift2, scale2, gate2 = m.unbind(1)
            y = self._norm(h) * (1 + scale1) + shift1
            own, v = self._key_value(f"{name}.self_attn", y)
            keys[:, filled:end], values[:, filled:end] = self._rotate(own, rope), v
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
