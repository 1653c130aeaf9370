"""The causal student in PyTorch, in the manner of Self-Forcing: a peer to compare numbers and times with.

Plain functions over Wan's tensors by their names, on any device of PyTorch, in one dtype throughout (rotations and
what depends on a timestep only are prepared in float64). Keys are cached in one preallocated buffer per layer, rotated
to their place in the video, or un-rotated where positions are those within the window; every call of a chunk overwrites
the chunk's slots, and a chunk that finds the window full moves the history behind the sink towards the front first
(docs/method.md, section 4.2). A new prompt recomputes keys in the buffer as it lies there (section 4.3).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.models.students.config import CausalConfig
from greedy_distill_jax.streaming.loop import CONTEXT_FOLD, initial_noise
from greedy_distill_jax.weights.source import TreeSource
from greedy_distill_jax.weights.write import tensors_of

THETA = 10_000.0


def step_noise(state: Any, steps: int, *, context: bool = False) -> list[np.ndarray]:
    """What the next step of one of our streams draws, for ``TorchCausal.step``; ``context``: for what it keeps, too."""
    key, shape = jax.random.split(state.key)[1], state.last.shape
    folds = [*range(1, steps), *([CONTEXT_FOLD] if context else [])]
    more = [jax.random.normal(jax.random.fold_in(key, n), shape, jnp.float32) for n in folds]
    return [np.asarray(x) for x in (initial_noise(key, shape), *more)]


class TorchCausal:
    """A stream of one causal student, with a pass over every chunk as it is kept.

    Args:
      params: the student's parameters, our tree.
      cfg: of the student; context "clean", a velocity head.
      text: encoder rows [B, M, C].
      sigmas: of the denoising steps, re-noised in between.
      grid: rows and columns of a latent frame.
      context_sigma: noise level that chunks are kept at.
      device: PyTorch's name of it.
      dtype: of weights, activations and cache, "float32" or "bfloat16"; norms and softmax accumulate in float32.
      mode: of ``torch.compile``, for the network once the window is full and every shape stays as it is; None: eager.
    """

    def __init__(
        self,
        params: Any,
        cfg: CausalConfig,
        text: np.ndarray,
        sigmas: Sequence[float],
        grid: tuple[int, int],
        *,
        context_sigma: float = 0.0,
        device: str = "cpu",
        dtype: str = "float32",
        mode: str | None = None,
    ):
        import torch

        if (cfg.context, cfg.base.prediction) != ("clean", "velocity"):
            raise ValueError(f"TorchCausal streams clean context and a velocity head, got {cfg}.")
        self.torch, self.cfg, self.sigmas, self.level, self.index = torch, cfg, tuple(sigmas), context_sigma, 0
        base = cfg.base
        named = tensors_of(TreeSource(base, params), "original", "float32")
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        self.weights = {name: self.tensor(value) for name, value in named}
        self.grid = tuple(side // base.patch for side in grid)
        self.frame_tokens = self.grid[0] * self.grid[1]
        self.tokens = cfg.chunk * self.frame_tokens
        slots = (cfg.sink_chunks + cfg.ring_chunks + 1) * self.tokens
        shape = (len(text), slots, base.num_heads, base.head_dim)
        layers = range(base.num_layers)
        with torch.inference_mode():
            self.text = self._project(text)
            self.cache = [tuple(torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in "kv") for _ in layers]
            self.times = {sigma: self._time(sigma, len(text)) for sigma in {*self.sigmas, context_sigma}}
        self.filled = 0  # tokens in the cache, without the chunk in the making
        self.frames = None  # of the chunks in the cache, or that were there last, as they are kept
        self.compiled = None
        if mode is not None:
            # Without this a CUDA graph would copy weights and cache in every call, and refuse to write the cache.
            for tensor in (*self.weights.values(), *(x for pair in self.cache for x in pair)):
                torch._dynamo.mark_static_address(tensor)
            self.compiled = torch.compile(self._velocity, dynamic=False, mode=mode)

    def tensor(self, value: np.ndarray):
        """An array on the peer's device, in its dtype."""
        return self.torch.from_numpy(np.array(value)).to(self.device, self.dtype)

    def step(self, noise: Sequence[Any]) -> Any:
        """The next clean chunk [B, g, H, W, C], ready.

        Args:
          noise: what it starts from, one more per further step, and where chunks are kept at a noise level one for
            that; tensors of the peer's device (``tensor``).
        """
        torch, after = self.torch, (*self.sigmas[1:], 0.0)
        with torch.inference_mode():
            full = self._make_room()
            velocity = self.compiled if full and self.compiled else self._velocity
            ropes, x = self._ropes(self.filled, 1, self.index), noise[0]
            for sigma, next_sigma, fresh in zip(self.sigmas, after, (*noise[1 : len(after)], None)):
                x0 = x - sigma * velocity(x, self.times[sigma], ropes, self.filled)
                x = x0 if fresh is None else (1 - next_sigma) * x0 + next_sigma * fresh
            self._keep(velocity, x, noise[-1], ropes)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return x

    def observe(self, x: Any, noise: Any = None) -> None:
        """A given clean chunk in place of the next one; ``noise``: for what is kept of it at a noise level."""
        with self.torch.inference_mode():
            self._make_room()
            self._keep(self._velocity, x, noise, self._ropes(self.filled, 1, self.index))

    def _keep(self, velocity, x, noise, ropes) -> None:
        """The pass over a finished chunk, whose keys stay in the cache."""
        kept = (1 - self.level) * x + self.level * noise if self.level else x
        velocity(kept, self.times[self.level], ropes, self.filled, with_head=False)
        if self.cfg.recache:
            frames = kept if self.frames is None else self.torch.cat([self.frames, kept], dim=1)
            self.frames = frames[:, -self.cfg.chunk * (self.cfg.sink_chunks + self.cfg.ring_chunks + 1) :]
        self.filled, self.index = self.filled + self.tokens, self.index + 1

    def switch_prompt(self, text: np.ndarray) -> None:
        """The next chunks follow other rows [B, M, C]; keys are recomputed where the student's configuration says so.

        The recache of LongLive's window: all its frames pass through the network at once, their keys go over those in
        the buffer and everything there is seen. A sink that outlives the switch is not written over, once there are
        frames that are no longer in the buffer. That of the ring: the oldest chunk leaves first, and the sink stays.
        """
        cfg = self.cfg
        with self.torch.inference_mode():
            self.text = self._project(text)
            if not cfg.recache or not self.index:
                return
            sink, first = cfg.sink_chunks * self.tokens, 0
            if cfg.recache_of == "ring":
                self._make_room()
                first = sink
            chunks = (self.filled - first) // self.tokens
            if not chunks:
                return
            ropes = self._ropes(first, chunks, self.index - chunks)
            passed = cfg.recache_of == "window" and cfg.global_sink and self.index * self.tokens > self.filled
            before = [[x[:, : sink if passed else first].clone() for x in pair] for pair in self.cache]
            frames = self.frames[:, -chunks * cfg.chunk :]
            self._velocity(frames, self.times[self.level], ropes, first, with_head=False, protected=before)

    def _project(self, text: np.ndarray):
        """Keys and values of the text, per layer."""
        rows = self._mlp("text_embedding", self.tensor(text), self.torch.nn.functional.gelu)
        return [self._key_value(f"blocks.{layer}.cross_attn", rows) for layer in range(self.cfg.base.num_layers)]

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

    def _ropes(self, first: int, chunks: int, number: int):
        """Rotations of the queries of chunks behind ``first`` tokens, from chunk ``number``, and of the keys they see.

        Absolute positions: of the own keys. Relative ones: of the whole buffer, whose places are the positions.
        """
        if self.cfg.rope_mode == "absolute":
            own = self._rope(number, chunks)
            return own, own
        place = first // self.tokens
        return self._rope(place, chunks), self._rope(0, place + chunks)

    def _rope(self, chunk: int, chunks: int):
        """cos and sin [tokens, 1, K / 2] of chunks from position ``chunk`` on."""
        torch, pairs = self.torch, self.cfg.base.head_dim // 2
        start, angles = chunk * self.cfg.chunk, []
        sizes = (chunks * self.cfg.chunk, *self.grid)
        for axis, size in enumerate(sizes):
            count = pairs // 3 if axis else pairs - 2 * (pairs // 3)
            position = torch.arange(size, dtype=torch.float64) + (0 if axis else start)
            angle = position[:, None] * THETA ** (-torch.arange(count, dtype=torch.float64) / count)
            angles.append(angle.reshape([size if n == axis else 1 for n in range(3)] + [count]).expand(*sizes, count))
        angle = torch.cat(angles, dim=-1).reshape(chunks * self.tokens, 1, pairs)
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

    def _velocity(self, x, times, ropes, filled: int, with_head: bool = True, protected=None):
        """The network's answer for frames behind ``filled`` tokens; their keys and values go into the cache.

        ``protected``: per layer keys and values that stay in front of it.
        """
        torch, base, (e, e0), (rope_q, rope_k) = self.torch, self.cfg.base, times, ropes
        p, (rows, columns) = base.patch, self.grid
        end, absolute = filled + x.shape[1] * self.frame_tokens, self.cfg.rope_mode == "absolute"
        kernel, bias = (self.weights[f"patch_embedding.{part}"] for part in ("weight", "bias"))
        h = torch.nn.functional.conv3d(x.permute(0, 4, 1, 2, 3), kernel, bias, stride=(1, p, p))
        h = h.flatten(2).transpose(1, 2)
        for layer, (text, (keys, values)) in enumerate(zip(self.text, self.cache)):
            name = f"blocks.{layer}"
            m = (self.weights[f"{name}.modulation"] + e0)[:, :, None]
            shift1, scale1, gate1, shift2, scale2, gate2 = m.unbind(1)
            y = self._norm(h) * (1 + scale1) + shift1
            own, v = self._key_value(f"{name}.self_attn", y)
            keys[:, filled:end], values[:, filled:end] = self._rotate(own, rope_k) if absolute else own, v
            for buffer, old in zip((keys, values), protected[layer] if protected else ()):
                buffer[:, : old.shape[1]] = old
            q = self._rotate(self._heads(f"{name}.self_attn.q", y, True), rope_q)
            seen = keys[:, :end] if absolute else self._rotate(keys[:, :end], rope_k)
            h = h + self._attend(f"{name}.self_attn", q, seen, values[:, :end]) * gate1
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
