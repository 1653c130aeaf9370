"""The Wan2.1 block and its embeddings (docs/method.md, section 2) as thin Linen modules.

A block does not know whether it serves the teacher, ETM or SDD: which keys its self-attention sees is a static
``Layout``, everything traced comes in ``Shared`` (the same for all layers) and ``Layer`` (one slice per layer).
Blocks are scanned and rematerialised, their parameters are stacked on a leading "layers" axis.
Precision: float32 for statistics, modulation, residual stream, RoPE, softmax, time embedding and head; other matmuls
in ``cfg.dtype``.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int32

from greedy_distill_jax.distribution.parallel import attention, constrain, settled, settled_on_megacore
from greedy_distill_jax.models.parameter import parameter
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.models.wan.linear import dense, float32_dense
from greedy_distill_jax.models.wan.rope import Rope, apply_rope
from greedy_distill_jax.ops.attention import Pattern

TIMESTEPS = 1000.0  # t = 1000 sigma


@dataclasses.dataclass(frozen=True)
class Layout:
    """One self-attention call: which key chunks there are, who sees them, and at which positions; all of it static.

    The candidates for keys are the chunks [cache | own | z] in this order, z only with fusion "selfkv". Behind those
    that are picked come the chunks of ``Layer.ready``: what a stream has rotated once for all calls of a chunk.

    Attributes:
      pattern: which chunks of [picked | ready] every own chunk sees; with ``Shared.lengths``, from the first of its
        list on.
      source: the candidates that are picked, in the order of the pattern's keys. One candidate can be picked twice, to
        be seen at two time positions.
      z_of: for every own chunk the ETM chunk that conditions it.
      rotate_at_use: cached keys are un-rotated and every picked chunk is rotated at the positions of ``Shared.rope_k``
        (those of ``rope_q`` where there are none); otherwise keys are rotated by ``rope_q`` once, before they are
        cached.
      frozen: keys and values of so many own chunks, from the first, pass no gradient.
      own_position: time position of every own chunk, in chunks; () where it is known only at run time.
      key_position: the same of every picked chunk.
      derivative: "vjp", or "jvp" for a network that has to pass ``jax.jvp``; see ``chunk_attention``.
    """

    pattern: Pattern
    source: tuple[int, ...]
    z_of: tuple[int, ...] = ()
    rotate_at_use: bool = False
    frozen: int = 0
    own_position: tuple[int, ...] = ()
    key_position: tuple[int, ...] = ()
    derivative: str = "vjp"

    @classmethod
    def full(cls, own: int, tokens: int, candidates: int | None = None, **options: Any) -> "Layout":
        """Every one of ``own`` chunks of ``tokens`` tokens sees all candidates, by default the own chunks."""
        pattern = Pattern.full(own, tokens, candidates)
        return cls(pattern, tuple(range(pattern.num_k_chunks)), **options)

    @property
    def tokens(self) -> int:
        """Tokens of a chunk."""
        return self.pattern.q_chunk


class Shared(NamedTuple):
    """Traced inputs that all layers share."""

    modulation: Float32[Array, "B _ 6 D"]  # one per frame, or one for all
    rope_q: Rope
    rope_k: Rope | None = None
    lengths: Int32[Array, " Q"] | None = None  # how many chunks of every own chunk's list are visible; None for all
    text: Float[Array, "B M D"] | None = None  # None when Layer.text is given
    z: Float[Array, "B S D"] | None = None  # S = z chunks * tokens
    rope_z: Rope | None = None  # selfkv with rotated cache: positions of z; xattn2: 2-D positions of z
    rope_zq: Rope | None = None  # xattn2: 2-D positions of the own tokens


class KeyValue(NamedTuple):
    """[..., S, N, K] keys and values."""

    k: Float[Array, "... S N K"]
    v: Float[Array, "... S N K"]

    def rotated(self, rope: Rope) -> "KeyValue":
        """The same with rotated keys."""
        return self._replace(k=apply_rope(self.k, rope))


class Layer(NamedTuple):
    """Traced inputs with a leading layers axis."""

    cache: KeyValue | None = None
    text: KeyValue | None = None
    z: KeyValue | None = None
    ready: tuple[KeyValue, ...] = ()  # keys as they are seen, rotated, and their values


class Emitted(NamedTuple):
    """What a layer hands back, when asked: own keys and values, projected text, projected z."""

    own: KeyValue | None = None
    text: KeyValue | None = None
    z: KeyValue | None = None


def layer_norm(eps: float, affine: bool = False, **kwargs: Any) -> nn.LayerNorm:
    """LayerNorm with float32 statistics and result."""
    return nn.LayerNorm(eps, dtype=jnp.float32, use_bias=affine, use_scale=affine, use_fast_variance=False, **kwargs)


class RMSNorm(nn.Module):
    """RMSNorm over the full width D, before the head split; weight applied in float32."""

    eps: float

    @nn.compact
    def __call__(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        scale = parameter(self, "scale", nn.initializers.ones, (x_BSD.shape[-1],))
        x = x_BSD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (settled_on_megacore(x) * scale[None, None]).astype(x_BSD.dtype)


def _per_frame(x_BSD, m_BTD, op):
    """``op(x, m)`` with the T modulation vectors broadcast over the S / T tokens of their frame."""
    x = rearrange(x_BSD, "b (t l) d -> b t l d", t=m_BTD.shape[1])
    return rearrange(op(x, m_BTD[:, :, None]), "b t l d -> b (t l) d")


def modulate(
    x_BSD: Float[Array, "B S D"], shift_BTD: Float[Array, "B T D"], scale_BTD: Float[Array, "B T D"]
) -> Float[Array, "B S D"]:
    """x (1 + scale) + shift in float32."""
    return _per_frame(_per_frame(x_BSD, scale_BTD, lambda x, s: x * (1.0 + s)), shift_BTD, jnp.add)


def _heads(x_BSD, num_heads: int):
    return rearrange(x_BSD, "b s (n k) -> b s n k", n=num_heads)


def _stop_gradient(x_BSNK, tokens: int):
    """``x`` whose first ``tokens`` pass no gradient."""
    return jnp.concatenate([jax.lax.stop_gradient(x_BSNK[:, :tokens]), x_BSNK[:, tokens:]], axis=1)


class Attention(nn.Module):
    """q, k, v, o with bias and full-width RMSNorm on q and k; optionally a second key-value pair from ETM's z."""

    cfg: WanConfig
    with_z: bool = False

    def setup(self):
        cfg = self.cfg
        self.q, self.k, self.v, self.o = (dense(cfg.dim, cfg) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.eps), RMSNorm(cfg.eps)
        if self.with_z:
            self.z_k, self.z_v, self.norm_z = dense(cfg.dim, cfg), dense(cfg.dim, cfg), RMSNorm(cfg.eps)

    def query(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S N K"]:
        """[B, S, N, K]"""
        return _heads(self.norm_q(self.q(x_BSD)), self.cfg.num_heads)

    def key_value(self, x_BSD: Float[Array, "B S D"]) -> KeyValue:
        """Keys (normed, un-rotated) and values."""
        n = self.cfg.num_heads
        return KeyValue(_heads(self.norm_k(self.k(x_BSD)), n), _heads(self.v(x_BSD), n))

    def z_key_value(self, z_BSD: Float[Array, "B S D"]) -> KeyValue:
        """The same from ETM's output, by its own linears and norm (as Wan-I2V has for images)."""
        n = self.cfg.num_heads
        return KeyValue(_heads(self.norm_z(self.z_k(z_BSD)), n), _heads(self.z_v(z_BSD), n))

    def out(self, x_BSNK: Float[Array, "B S N K"]) -> Float[Array, "B S D"]:
        """Output projection."""
        return self.o(rearrange(x_BSNK, "b s n k -> b s (n k)"))


class FeedForward(nn.Module):
    """Linear, GELU(tanh), Linear."""

    cfg: WanConfig

    @nn.compact
    def __call__(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        h = nn.gelu(dense(self.cfg.ffn_dim, self.cfg, name="up")(x_BSD), approximate=True)
        return dense(self.cfg.dim, self.cfg, name="down")(h)


def _modulation_init(cfg: WanConfig):
    def init(key, shape, dtype):
        value = jax.random.normal(key, shape, dtype) / np.sqrt(cfg.dim).astype(np.float32)
        return value.at[jnp.array([2, 5])].add(cfg.gate_init)

    return init


class Block(nn.Module):
    """One Wan block: modulated self-attention, cross-attention, modulated FFN (docs/method.md, section 2.3)."""

    cfg: WanConfig
    layout: Layout | None
    fusion: str = "none"
    z_gate_init: float = 0.0
    emit: tuple[str, ...] = ()
    project_only: bool = False

    def setup(self):
        cfg = self.cfg
        self.modulation = parameter(self, "modulation", _modulation_init(cfg), (6, cfg.dim))
        self.self_attn = Attention(cfg, with_z=self.fusion == "selfkv")
        self.cross_attn = Attention(cfg, with_z=self.fusion == "xattn2")
        self.ffn = FeedForward(cfg)
        self.norm1, self.norm2 = layer_norm(cfg.eps), layer_norm(cfg.eps)
        self.norm3 = layer_norm(cfg.eps, affine=True)
        if self.fusion == "xattn2":
            init = nn.initializers.constant(self.z_gate_init)
            self.z_gate = parameter(self, "z_gate", init, (cfg.num_heads,))

    def project_text(self, text_BMD: Float[Array, "B M D"]) -> KeyValue:
        """Cross-attention keys and values of the text rows (once per prompt)."""
        return self.cross_attn.key_value(text_BMD)

    def project_z(self, z_BSD: Float[Array, "B S D"], rope: Rope | None) -> KeyValue | None:
        """Keys and values of ETM's output (once per frame), for the fusions that attend to it."""
        if self.fusion == "selfkv":
            kv = self.self_attn.z_key_value(z_BSD)
        elif self.fusion == "xattn2":
            kv = self.cross_attn.z_key_value(z_BSD)
        elif self.fusion == "replace":
            return self.cross_attn.key_value(z_BSD)
        else:
            return None
        return kv if rope is None else kv.rotated(rope)

    def _self_attention(self, h, shared: Shared, layer: Layer, z: KeyValue | None):
        layout = self.layout
        q, own = apply_rope(self.self_attn.query(h), shared.rope_q), self.self_attn.key_value(h)
        if not layout.rotate_at_use:
            own = own.rotated(shared.rope_q)
        if layout.frozen:
            own = KeyValue(*(_stop_gradient(x, layout.frozen * layout.tokens) for x in own))
        parts = [part for part in (layer.cache, own, z if self.fusion == "selfkv" else None) if part is not None]
        k, v = (jnp.concatenate(x, axis=1) if len(x) > 1 else x[0] for x in zip(*parts, strict=True))
        chunks = k.shape[1] // layout.tokens
        if layout.source != tuple(range(chunks)):
            pick = np.asarray(layout.source)
            k, v = (rearrange(x, "b (c l) n k -> b c l n k", c=chunks)[:, pick] for x in (k, v))
            k, v = (rearrange(x, "b c l n k -> b (c l) n k") for x in (k, v))
        if layout.rotate_at_use:
            k = apply_rope(k, shared.rope_q if shared.rope_k is None else shared.rope_k)
        if layer.ready:
            k, v = (jnp.concatenate(x, axis=1) for x in zip((k, v), *layer.ready, strict=True))
        out = attention(q, k, v, layout.pattern, lengths_Q=shared.lengths, derivative=layout.derivative)
        return self.self_attn.out(out), own

    def _over_z(self, q, z: KeyValue):
        """Every own chunk attends to the z chunk that conditions it."""
        layout = self.layout
        chunks = z.k.shape[1] // layout.tokens
        pattern = Pattern.from_table([(c,) for c in layout.z_of], q_chunk=layout.tokens, num_k_chunks=chunks)
        return attention(q, z.k, z.v, pattern, derivative=layout.derivative)

    def _cross_attention(self, h, shared: Shared, text: KeyValue | None, z: KeyValue | None):
        q = self.cross_attn.query(h)
        if self.fusion == "replace":
            return self.cross_attn.out(self._over_z(q, z))
        tokens = self.layout.tokens
        rows = Pattern.full(q.shape[1] // tokens, tokens, num_k_chunks=1, k_chunk=text.k.shape[1])
        out = attention(q, text.k, text.v, rows, text=True, derivative=self.layout.derivative)
        if self.fusion == "xattn2":
            second = self._over_z(apply_rope(q, shared.rope_zq), z)
            out = out + (self.z_gate[None, None, :, None] * second.astype(jnp.float32)).astype(out.dtype)
        return self.cross_attn.out(out)

    def __call__(
        self, x_BSD: Float[Array, "B S D"], shared: Shared, layer: Layer
    ) -> tuple[Float[Array, "B S D"], Emitted]:
        """x [B, S, D] float32 -> (x, Emitted)."""
        dtype = jnp.dtype(self.cfg.dtype)
        text, z = layer.text, layer.z
        if text is None and shared.text is not None and self.fusion != "replace":
            text = self.project_text(shared.text)
        if z is None and shared.z is not None:
            z = self.project_z(shared.z, shared.rope_z)
        if self.project_only:
            return x_BSD, Emitted(text=text, z=z)
        x_BSD = constrain(x_BSD, "batch", None, None)
        m = self.modulation[None, None] + shared.modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, :, i] for i in range(6))

        h = settled_on_megacore(modulate(self.norm1(x_BSD), shift1, scale1).astype(dtype))
        h, own = self._self_attention(h, shared, layer, z)
        x_BSD = x_BSD + _per_frame(settled_on_megacore(h).astype(jnp.float32), gate1, jnp.multiply)
        h = self._cross_attention(self.norm3(x_BSD).astype(dtype), shared, text, z)
        x_BSD = x_BSD + h.astype(jnp.float32)
        h = self.ffn(settled_on_megacore(modulate(self.norm2(x_BSD), shift2, scale2).astype(dtype)))
        x_BSD = x_BSD + _per_frame(settled_on_megacore(h).astype(jnp.float32), gate2, jnp.multiply)
        emitted = Emitted(own=own, text=text, z=z)
        return x_BSD, Emitted(**{name: getattr(emitted, name) for name in self.emit})


WRITTEN_OUT = 8  # blocks at most: programs grow with them, and the last one's share of the pass shrinks
_REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.checkpoint_dots}


def block_stack(
    cfg: WanConfig, depth: int, *, layout: Layout | None, name: str | None = None, keys_only: bool = False, **block: Any
) -> nn.Module:
    """``depth`` scanned blocks; call as (x, Shared, Layer with leading layers axis) -> (x, stacked Emitted).

    ``keys_only``: nobody needs x. A few blocks are written out then, so that the compiler leaves out what of the last
    one follows its keys and values; of a loop's body it cannot.
    """
    body = Block
    if cfg.remat != "none":
        body = nn.remat(Block, policy=_REMAT_POLICIES[cfg.remat], prevent_cse=False)
    scanned = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=depth,
        unroll=depth if keys_only and depth <= WRITTEN_OUT else 1,
        check_constancy_invariants=False,  # nothing of the body is broadcast: saves one trace of it
    )
    return scanned(cfg, layout=layout, name=name, **block)


def sinusoid(t: Float[Array, "*shape"], dim: int) -> Float32[Array, "*shape dim"]:
    """[..., dim] cos then sin of t * 10000^(-k / (dim / 2)), float32.

    The integer part of t goes through a float64-made table: t up to 1000 times a frequency of 1 would cost four
    digits in float32.
    """
    half = dim // 2
    frequency = 10_000.0 ** (-np.arange(half, dtype=np.float64) / half)
    whole = np.arange(int(TIMESTEPS) + 1)[:, None] * frequency
    cos_table, sin_table = (jnp.asarray(f(whole), jnp.float32) for f in (np.cos, np.sin))
    t = t.astype(jnp.float32)
    floor = jnp.clip(jnp.floor(jax.lax.stop_gradient(t)), 0.0, TIMESTEPS)
    index = floor.astype(jnp.int32)
    angle = (t - floor)[..., None] * jnp.asarray(frequency, jnp.float32).reshape((1,) * t.ndim + (-1,))
    cos, sin = cos_table[index], sin_table[index]
    return jnp.concatenate(
        [cos * jnp.cos(angle) - sin * jnp.sin(angle), sin * jnp.cos(angle) + cos * jnp.sin(angle)], axis=-1
    )


class Embeddings(nn.Module):
    """Patch, text and time embeddings (docs/method.md, section 2.2)."""

    cfg: WanConfig
    with_text: bool = True

    def setup(self):
        cfg = self.cfg
        text_init, time_init = nn.initializers.normal(cfg.text_init), nn.initializers.normal(cfg.time_init)
        self.patch = dense(cfg.dim, cfg)
        if self.with_text:
            self.text_in, self.text_out = (dense(cfg.dim, cfg, text_init) for _ in range(2))
        self.time_in, self.time_out = (float32_dense(cfg.dim, cfg, time_init) for _ in range(2))
        self.time_projection = float32_dense(6 * cfg.dim, cfg)

    def tokens(self, x_BTHWC: Float[Array, "B T H W C"]) -> Float32[Array, "B S D"]:
        """Latents -> [B, T*h*w, D] float32, frame-major."""
        p, dtype = self.cfg.patch, jnp.dtype(self.cfg.dtype)
        x = rearrange(x_BTHWC.astype(dtype), "b t (h p) (w q) c -> b (t h w) (p q c)", p=p, q=p)
        return self.patch(x).astype(jnp.float32)

    def text(self, text_BMC: Float[Array, "B M C"]) -> Float[Array, "B M D"]:
        """Encoder rows -> [B, M, D]; padded rows become the constant MLP(0) and are attended."""
        return self.text_out(nn.gelu(self.text_in(text_BMC.astype(jnp.dtype(self.cfg.dtype))), approximate=True))

    def time(
        self, sigma_BT: Float[Array, "B _"], extra_BTD: Float[Array, "B T D"] | None = None
    ) -> tuple[Float32[Array, "B _ D"], Float32[Array, "B _ 6 D"]]:
        """Noise levels -> (e [B, T, D], e0 [B, T, 6, D]) float32; ``extra`` is added to e (fusion "adaln")."""
        e = self.time_out(nn.silu(self.time_in(sinusoid(sigma_BT * TIMESTEPS, self.cfg.freq_dim))))
        if extra_BTD is not None:
            e = e + extra_BTD.astype(jnp.float32)
        return e, rearrange(self.time_projection(nn.silu(e)), "b t (s d) -> b t s d", s=6)


class Head(nn.Module):
    """Final modulated LayerNorm and projection to patches; the vector of a patch is (p_h, p_w, c)."""

    cfg: WanConfig

    @nn.compact
    def __call__(
        self, x_BSD: Float[Array, "B S D"], e_BTD: Float[Array, "B _ D"], frames: int, grid: tuple[int, int]
    ) -> Float32[Array, "B T H W C"]:
        cfg = self.cfg
        init = nn.initializers.normal(cfg.dim**-0.5)
        table = parameter(self, "modulation", init, (2, cfg.dim))
        m = table[None, None] + e_BTD[:, :, None]
        h = settled(modulate(layer_norm(cfg.eps)(x_BSD), m[:, :, 0], m[:, :, 1]))
        return rearrange(
            float32_dense(cfg.patch**2 * cfg.channels, cfg, nn.initializers.zeros, name="projection")(h),
            "b (t h w) (p q c) -> b t (h p) (w q) c",
            t=frames,
            h=grid[0],
            w=grid[1],
            p=cfg.patch,
            q=cfg.patch,
        )
