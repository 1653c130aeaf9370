"""The Wan2.1 DiT: teacher, SDD and causal students are this module with different layouts."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from greedy_distill_jax.distribution import parallel
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.models.wan.layers import Embeddings, Emitted, Head, Layer, Layout, Shared, block_stack
from greedy_distill_jax.models.wan.linear import dense
from greedy_distill_jax.models.wan.rope import Rope, rope_table

# An x0-predicting head becomes a velocity through (x - x0) / max(sigma, SIGMA_FLOOR): below the floor the implied
# x0 blends into x itself (the exact boundary condition at sigma = 0) and the loss weight 1/sigma^2 stays bounded.
SIGMA_FLOOR = 0.05


def grid_of(x_BTHWC: Float[Array, "B T H W C"], cfg: WanConfig) -> tuple[int, int]:
    """Patch grid of a latent video."""
    h, w = x_BTHWC.shape[2:4]
    if h % cfg.patch or w % cfg.patch:
        raise ValueError(f"Latent grid {h}x{w} is not a multiple of the patch size {cfg.patch}.")
    return h // cfg.patch, w // cfg.patch


def _identity_then_zero(key, shape, dtype=jnp.float32):
    del key
    return jnp.eye(*shape, dtype=dtype)


class Dit(nn.Module):
    """Patch embedding, scanned blocks, head.

    Attributes:
      layout: pattern of this call's self-attention; None with ``project`` only.
      fusion: how ETM's output z enters ("none" for the teacher; docs/method.md, section 3.4).
      emit: per-layer results to return, fields of ``Emitted``.
      with_head: False for passes that only write keys and values.
    """

    cfg: WanConfig
    depth: int
    layout: Layout | None = None
    fusion: str = "none"
    z_gate_init: float = 0.0
    emit: tuple[str, ...] = ()
    with_head: bool = True
    project_only: bool = False

    def setup(self):
        cfg = self.cfg
        self.embed = Embeddings(cfg, with_text=self.fusion != "replace")
        self.blocks = block_stack(
            cfg,
            self.depth,
            layout=self.layout,
            keys_only=not self.with_head,
            fusion=self.fusion,
            z_gate_init=self.z_gate_init,
            emit=self.emit,
            project_only=self.project_only,
        )
        if self.fusion in ("add", "adaln"):
            self.z_in = dense(cfg.dim, cfg, nn.initializers.zeros)
        elif self.fusion == "concat":
            self.z_in = dense(cfg.dim, cfg, _identity_then_zero)
        if self.with_head:
            self.head = Head(cfg)

    def __call__(
        self,
        x_BTHWC: Float[Array, "B T H W C"],
        sigma_BT: Float[Array, "B _"],
        text_BMC: Float[Array, "B M text_dim"] | None = None,
        *,
        rope_q: Rope,
        rope_k: Rope | None = None,
        lengths: Int32[Array, " Q"] | None = None,
        z_BSD: Float[Array, "B S D"] | None = None,
        rope_z: Rope | None = None,
        rope_zq: Rope | None = None,
        layer: Layer = Layer(),  # noqa: B008 (an immutable NamedTuple)
    ) -> tuple[Float32[Array, "B T H W C"] | None, Emitted]:
        """Velocity of the given frames.

        Args:
          x_BTHWC: latents of the own chunks.
          sigma_BT: noise level per frame, or [B, 1] for one per video.
          text_BMC: encoder rows [B, M, text_dim]; None when ``layer.text`` carries projected text.
          rope_q, rope_k, rope_z, rope_zq, lengths: see ``layers.Shared``.
          z_BSD: ETM output chunks (``layout.z_of`` says which conditions which own chunk).
          layer: per-layer caches and projections.

        Returns:
          (velocity [B, T, H, W, C] float32 or None without head, Emitted).
        """
        cfg, (frames, grid) = self.cfg, (x_BTHWC.shape[1], grid_of(x_BTHWC, self.cfg))
        tokens, extra = self.embed.tokens(x_BTHWC), None
        if self.fusion in ("add", "concat", "adaln"):
            length = self.layout.tokens
            z = rearrange(z_BSD, "b (c l) d -> b c l d", l=length)[:, np.asarray(self.layout.z_of)]
            if self.fusion == "adaln":
                per_chunk = length // (grid[0] * grid[1])
                mean = parallel.mean_of_stripes(jnp.mean(z, axis=2))
                extra = repeat(self.z_in(mean), "b c d -> b (c g) d", g=per_chunk)
            else:
                z = rearrange(z, "b c l d -> b (c l) d")
                if self.fusion == "add":
                    tokens = tokens + self.z_in(z).astype(jnp.float32)
                else:
                    both = jnp.concatenate([tokens, z.astype(jnp.float32)], axis=-1)
                    tokens = self.z_in(both.astype(jnp.dtype(cfg.dtype))).astype(jnp.float32)
        e, e0 = self.embed.time(sigma_BT, extra)
        text = None if text_BMC is None or self.fusion == "replace" else self.embed.text(text_BMC)
        uses_z_kv = self.fusion in ("selfkv", "xattn2", "replace")
        shared = Shared(
            modulation=e0,
            rope_q=rope_q,
            rope_k=rope_k,
            lengths=lengths,
            text=text,
            z=z_BSD if uses_z_kv and layer.z is None else None,
            rope_z=rope_z,
            rope_zq=rope_zq,
        )
        tokens, emitted = self.blocks(tokens, shared, layer)
        if not self.with_head:
            return None, emitted
        out = self.head(tokens, e, frames, grid)
        if cfg.prediction == "x0":
            sigma = jnp.broadcast_to(sigma_BT, x_BTHWC.shape[:2])[..., None, None, None]
            out = (x_BTHWC.astype(jnp.float32) - out) / jnp.maximum(sigma, SIGMA_FLOOR)
        return out, emitted

    def project(
        self,
        text_BMC: Float[Array, "B M C"] | None = None,
        z_BSD: Float[Array, "B S D"] | None = None,
        rope_z: Rope | None = None,
    ) -> Emitted:
        """Per-layer keys and values of text and / or z, computed once and passed back in ``Layer``."""
        batch = (z_BSD if text_BMC is None else text_BMC).shape[0]
        dummy = jnp.zeros((batch, 1, self.cfg.dim), jnp.float32)
        none = jnp.zeros((batch, 1, 6, self.cfg.dim), jnp.float32)
        rope = Rope(jnp.ones((1, self.cfg.head_dim // 2)), jnp.zeros((1, self.cfg.head_dim // 2)))
        text = None if text_BMC is None or self.fusion == "replace" else self.embed.text(text_BMC)
        shared = Shared(modulation=none, rope_q=rope, text=text, z=z_BSD, rope_z=rope_z)
        return self.blocks(dummy, shared, Layer())[1]


class Teacher:
    """The bidirectional Wan2.1 teacher: every frame sees every frame.

    Attributes:
      cfg: its sizes.
      derivative: "vjp", or "jvp" for tangents by ``jax.jvp``, which the attention's own gradient does not let through.
    """

    def __init__(self, cfg: WanConfig, derivative: str = "vjp"):
        self.cfg, self.derivative = cfg.differentiated(derivative), derivative

    def _call(self, x_BTHWC):
        grid = grid_of(x_BTHWC, self.cfg)
        frames, tokens = x_BTHWC.shape[1], grid[0] * grid[1]
        module = Dit(self.cfg, self.cfg.num_layers, Layout.full(frames, tokens, derivative=self.derivative))
        return module, rope_table(np.arange(frames), grid, self.cfg.head_dim)

    def init(self, key: PRNGKeyArray, latent_shape: tuple[int, int, int, int]) -> Any:
        """Parameters for latents [T, H, W, C]; the tree does not depend on T, H, W."""
        x = jnp.zeros((1, *latent_shape), jnp.float32)
        text = jnp.zeros((1, self.cfg.text_len, self.cfg.text_dim), jnp.float32)
        module, rope = self._call(x)
        return module.init(key, x, jnp.ones((1, 1), jnp.float32), text, rope_q=rope)["params"]

    def __call__(
        self,
        params: Any,
        x_BTHWC: Float[Array, "B T H W C"],
        sigma_BT: Float[Array, "B _"],
        text_BMC: Float[Array, "B M D"],
    ) -> Float[Array, "B T H W C"]:
        """Gives the velocity; sigma is [B, 1] (one per video) or [B, T] (one per frame)."""

        def call(params, x, sigma, text):
            module, rope = self._call(x)
            return module.apply({"params": params}, x, sigma, text, rope_q=rope)[0]

        return parallel.split_videos(call, params, x_BTHWC, sigma_BT, text_BMC, whole=1)
