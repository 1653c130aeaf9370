"""The networks of `torch_student`: ETM, SDD and what they are made of, in PyTorch.

`write` joins both files into the one that lies in the folder of an exported student.
"""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIGMA_FLOOR = 0.05  # below it the velocity of an x0-predicting head blends into x itself
THETA = 10_000.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and options, as in config.json."""

    dim: int
    ffn_dim: int
    num_heads: int
    channels: int
    patch: int
    freq_dim: int
    text_dim: int
    eps: float
    prediction: str  # of the head: "velocity" or "x0"
    etm_layers: int  # number of blocks
    sdd_layers: int
    fusion: str  # how z enters SDD
    chunk: int  # latent frames made together
    window: int  # slots ETM sees, its own included
    sink: int  # first slots that stay visible
    rope_mode: str  # time positions: "clamped" below rope_frames, "absolute" or "fixed"
    rope_frames: int
    anchor: bool  # SDD sees frame 0
    context: str  # keys of the previous chunk: a pass over it as it is kept ("fused": in the next step), "last_step_kv"
    etm_input: str = "kept"  # ETM reads a finished chunk as it is "kept", or "clean"
    context_weights: str = "shared"  # of that pass: SDD's, or its "own" (`sdd_context.`)

    @classmethod
    def from_json(cls, architecture: dict) -> "Config":
        """From the "architecture" of config.json."""
        depths = {name: len(architecture[name]) for name in ("etm_layers", "sdd_layers")}
        flat = {**architecture["base"], **architecture, **depths}
        return cls(**{field.name: flat[field.name] for field in dataclasses.fields(cls) if field.name in flat})

    def sdd_position(self, i: int) -> int:
        """Time position (in chunks) of SDD's chunk i; the chunk before it is one less."""
        furthest = {"fixed": 1, "absolute": i, "clamped": max(0, self.rope_frames // self.chunk - 2)}[self.rope_mode]
        return min(i - 1, furthest) + 1 if i else 0

    def sdd_keys(self, i: int) -> list[tuple[int, int]]:
        """(chunk, time position) of what SDD's chunk i sees besides itself."""
        first, previous = [(0, 0)] * (i == 1 or (i > 1 and self.anchor)), (i - 1, self.sdd_position(i) - 1)
        return first + [previous] * (i >= 2)

    def etm_keys(self, j: int) -> list[tuple[int, int]]:
        """(slot, time position) of what ETM's slot j sees, itself last."""
        reach, absolute = self.window - 1, self.rope_mode == "absolute"
        first = max(0, j - reach)  # a sink outside the window sits right before it, however far it is
        sinks = [(s, s if absolute else j - min(j - s, self.sink + reach - s)) for s in range(min(self.sink, first))]
        return sinks + [(a, a) for a in range(first, j + 1)]


class Ropes:
    """(cos, sin) [2, tokens, head_dim / 2] of chunks at chunk positions; remembered while in use."""

    def __init__(self, cfg: Config, grid: tuple[int, int], device):
        self.cfg, self.grid, self.device, self._known = cfg, grid, device, {}

    def __call__(self, *positions: int) -> Tensor:
        """One chunk behind the other, a tensor of its own: `torch.compile` has a graph for inputs that are the same."""
        return torch.cat([self._of(position) for position in positions], dim=1)

    def _of(self, position: int) -> Tensor:
        """From float64 angles; time gets the channel pairs that height and width (a third each) leave."""
        if position not in self._known:
            frames, pairs, angles = self.cfg.chunk, self.cfg.dim // self.cfg.num_heads // 2, []
            axes = ((position * frames, frames), (0, self.grid[0]), (0, self.grid[1]))
            for axis, (start, size) in enumerate(axes):
                count = pairs // 3 if axis else pairs - 2 * (pairs // 3)
                frequency = THETA ** (-torch.arange(count, dtype=torch.float64, device=self.device) / count)
                shape = [size if n == axis else 1 for n in range(3)]
                steps = torch.arange(start, start + size, dtype=torch.float64, device=self.device).reshape(*shape, 1)
                angles.append((steps * frequency).expand(frames, *self.grid, count))
            angle = torch.cat(angles, dim=-1).flatten(0, 2)
            if len(self._known) > 256:  # absolute positions never come back
                self._known.clear()
            self._known[position] = torch.stack([angle.cos(), angle.sin()]).float()
        return self._known[position]


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates the channel pairs (2j, 2j + 1) of [B, tokens, heads, head_dim] in float32."""
    cos, sin = (r[None, :, None] for r in rope)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class Float32(nn.Module):
    """A module whose own parameters, but not those of its children, stay float32 whatever it is converted to."""

    def _apply(self, fn, recurse=True):
        for child in self.children() if recurse else ():
            child._apply(fn)

        def same_dtype(x: Tensor) -> Tensor:
            y = fn(x)
            return y if y.dtype == x.dtype else x.to(y.device)

        return super()._apply(same_dtype, recurse=False)


class Linear(nn.Linear):
    """A linear layer that runs in the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return super().forward(x.to(self.weight.dtype))


class Linear32(Float32, Linear):
    """A linear layer that runs in float32."""


class LayerNorm(Float32, nn.LayerNorm):
    """LayerNorm in float32."""


class RMSNorm(Float32, nn.RMSNorm):
    """RMSNorm over the full width, before the head split, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype."""
        return super().forward(x.float()).to(x.dtype)


KeyValue = tuple[Tensor, Tensor]  # [B, tokens, heads, head_dim] each; keys normed, not rotated


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over the keys of `mask` [1, keys]; the others [B, tokens, heads, head_dim]."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)


class Attention(nn.Module):
    """q, k, v, o and the norms of q and k; optionally a second key-value pair for ETM's output z."""

    def __init__(self, cfg: Config, with_z: bool = False):
        super().__init__()
        self.heads = cfg.num_heads
        self.q, self.k, self.v, self.o = (Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.dim, cfg.eps), RMSNorm(cfg.dim, cfg.eps)
        if with_z:
            self.z_k, self.z_v = Linear(cfg.dim, cfg.dim), Linear(cfg.dim, cfg.dim)
            self.norm_z = RMSNorm(cfg.dim, cfg.eps)

    def query(self, x: Tensor) -> Tensor:
        """[B, tokens, heads, head_dim]."""
        return self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))

    def key_value(self, x: Tensor) -> KeyValue:
        """Of tokens or of text rows."""
        return tuple(y.unflatten(-1, (self.heads, -1)) for y in (self.norm_k(self.k(x)), self.v(x)))

    def z_key_value(self, z: Tensor) -> KeyValue:
        """Of ETM's output, by its own linears and norm."""
        return tuple(y.unflatten(-1, (self.heads, -1)) for y in (self.norm_z(self.z_k(z)), self.z_v(z)))

    def out(self, x: Tensor) -> Tensor:
        """Output projection."""
        return self.o(x.flatten(2))


class View(NamedTuple):
    """What the self-attention of one chunk looks at, the same in all layers; in a stream only its tensors change."""

    rope: Tensor  # of the chunk itself
    seen: list[int]  # which of the chunks [cached | of the same call] it sees, itself excluded
    seen_rope: Tensor | None  # of those
    mask: Tensor | None = None  # [1, keys] of those, its own and z's; None for all


class Block(Float32):
    """One Wan block: modulated self-attention, cross-attention, modulated feed-forward."""

    def __init__(self, cfg: Config, fusion: str = "none"):
        super().__init__()
        self.fusion, dim = fusion, cfg.dim
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.self_attn = Attention(cfg, with_z=fusion == "selfkv")
        self.cross_attn = Attention(cfg, with_z=fusion == "xattn2")
        self.ffn = nn.Sequential(Linear(dim, cfg.ffn_dim), nn.GELU("tanh"), Linear(cfg.ffn_dim, dim))
        self.norm1, self.norm2 = (LayerNorm(dim, cfg.eps, elementwise_affine=False) for _ in range(2))
        self.norm3 = LayerNorm(dim, cfg.eps)
        if fusion == "xattn2":
            self.z_gate = nn.Parameter(torch.zeros(cfg.num_heads))

    def project_z(self, z: Tensor, rope_z: Tensor) -> KeyValue | None:
        """Keys and values of one chunk's z, once per chunk."""
        if self.fusion == "selfkv":
            return self.self_attn.z_key_value(z)
        if self.fusion == "xattn2":  # aligned with the chunk's own tokens in space
            k, v = self.cross_attn.z_key_value(z)
            return rotate(k, rope_z), v
        return self.cross_attn.key_value(z) if self.fusion == "replace" else None

    def forward(self, x, e0, views: list[View], text: KeyValue | None, cache: list[KeyValue], z: list, rope_z: Tensor):
        """One layer over the chunks of a call: (x, the chunks' own keys and values).

        x [B, chunks, tokens, D] float32; e0 [B, chunks, tokens or 1, 6, D] float32 modulation; `text` None with fusion
        "replace"; `cache`: keys and values of chunks of earlier calls; `z` per chunk; `rope_z`: that of position 0.
        """
        dtype, count = self.self_attn.q.weight.dtype, len(views)
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation[:, None, None] + e0).unbind(-2)
        split = lambda y: y.unflatten(1, (count, -1)).unbind(1)  # noqa: E731 (one line, used four times)
        h = (self.norm1(x) * (1 + scale1) + shift1).to(dtype).flatten(1, 2)
        queries, out = split(self.self_attn.query(h)), []
        own = list(zip(*(split(y) for y in self.self_attn.key_value(h)), strict=True))
        for n, view in enumerate(views):
            there = [*cache, *own]
            keys, values = ([there[i][part] for i in view.seen] for part in (0, 1))
            keys = [rotate(torch.cat(keys, dim=1), view.seen_rope)] if keys else []
            for k, v in [own[n], z[n]] if self.fusion == "selfkv" else [own[n]]:
                keys.append(rotate(k, view.rope))
                values.append(v)
            query = rotate(queries[n], view.rope)
            out.append(attend(query, torch.cat(keys, dim=1), torch.cat(values, dim=1), view.mask))
        h = self.self_attn.out(torch.cat(out, dim=1)).float()
        x = x + h.unflatten(1, (count, -1)) * gate1

        q = self.cross_attn.query(self.norm3(x).to(dtype).flatten(1, 2))
        if self.fusion == "replace":
            out = torch.cat([attend(y, *z[n]) for n, y in enumerate(split(q))], dim=1)
        else:
            out = attend(q, *text)
        if self.fusion == "xattn2":
            second = torch.cat([attend(rotate(y, rope_z), *z[n]) for n, y in enumerate(split(q))], dim=1)
            out = out + (self.z_gate[:, None] * second.float()).to(out.dtype)
        x = x + self.cross_attn.out(out).float().unflatten(1, (count, -1))

        h = (self.norm2(x) * (1 + scale2) + shift2).to(dtype)
        return x + self.ffn(h).float() * gate2, own


class Head(Float32):
    """Final modulated LayerNorm and projection to patches."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 2, cfg.dim))
        self.norm = LayerNorm(cfg.dim, cfg.eps, elementwise_affine=False)
        self.head = Linear32(cfg.dim, cfg.patch**2 * cfg.channels)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, chunks, tokens, D], e [B, chunks, tokens or 1, D] -> [B, chunks, tokens, p * p * C] float32."""
        shift, scale = (self.modulation[:, None, None] + e[..., None, :]).unbind(-2)
        return self.head(self.norm(x) * (1 + scale) + shift).float()


class Backbone(nn.Module):
    """Embeddings and blocks, common to ETM and SDD."""

    def __init__(self, cfg: Config, layers: int, fusion: str):
        super().__init__()
        self.cfg, self.fusion, dim = cfg, fusion, cfg.dim
        self.patch_embedding = nn.Conv3d(cfg.channels, dim, (1, cfg.patch, cfg.patch), (1, cfg.patch, cfg.patch))
        if fusion != "replace":
            self.text_embedding = nn.Sequential(Linear(cfg.text_dim, dim), nn.GELU("tanh"), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear32(cfg.freq_dim, dim), nn.SiLU(), Linear32(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(cfg, fusion) for _ in range(layers))

    def tokens(self, x: Tensor) -> Tensor:
        """[B, chunks * g, C, H, W] -> [B, chunks, tokens, D] float32."""
        y = self.patch_embedding(x.transpose(1, 2).to(self.patch_embedding.weight.dtype)).float()
        return y.permute(0, 2, 3, 4, 1).flatten(1, 3).unflatten(1, (x.shape[1] // self.cfg.chunk, -1))

    def time(self, sigma: Tensor, tokens: int, extra: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise levels [B, chunks * g] -> e [B, chunks, tokens or 1, D], e0 [B, chunks, tokens or 1, 6, D]."""
        half, g = self.cfg.freq_dim // 2, self.cfg.chunk
        frequency = THETA ** (-torch.arange(half, dtype=torch.float64, device=sigma.device) / half)
        angle = (sigma.float() * 1000.0).double()[..., None] * frequency
        e = self.time_embedding(torch.cat([angle.cos(), angle.sin()], dim=-1))
        if extra is not None:
            e = e + extra.to(e.dtype).repeat_interleave(g, dim=1)
        e0 = self.time_projection(e).float().unflatten(-1, (6, -1))
        # Per chunk and token; a chunk of one frame broadcasts over its tokens.
        e, e0 = (y.unflatten(1, (-1, g)) for y in (e.float(), e0))
        return (e, e0) if g == 1 else tuple(y.repeat_interleave(tokens // g, dim=2) for y in (e, e0))

    def project_text(self, text: Tensor) -> list[KeyValue | None]:
        """Keys and values of the text rows per layer, once per prompt. Padded rows are attended, as in Wan."""
        if self.fusion == "replace":
            return [None] * len(self.blocks)
        rows = self.text_embedding(text)
        return [block.cross_attn.key_value(rows) for block in self.blocks]

    def run(self, x, e0, views, text, caches, z, rope_z=None) -> tuple[Tensor, list[list[KeyValue]]]:
        """All blocks, with `text`, `caches` and `z` per layer: (x, own keys and values per layer and chunk)."""
        own = []
        for block, *layer in zip(self.blocks, text, caches, z, strict=True):
            x, keys_and_values = block(x, e0, views, *layer, rope_z)
            own.append(keys_and_values)
        return x, own


class ETM(Float32, Backbone):
    """Efficient temporal module: slot j reads chunk j - 1 (slot 0 a learned vector) and gives z for chunk j."""

    def __init__(self, cfg: Config):
        super().__init__(cfg, cfg.etm_layers, "none")
        self.bos, self.norm = nn.Parameter(torch.zeros(cfg.dim)), LayerNorm(cfg.dim, cfg.eps)

    def forward(self, previous, sigma, is_first, views, text, caches):
        """z [B, slots, tokens, D] float32 of slots (`is_first` [slots]: number 0), their keys and values per layer."""
        x = torch.where(is_first[:, None, None], self.bos, self.tokens(previous))
        no_z = [[None] * len(views)] * len(self.blocks)
        x, own = self.run(x, self.time(sigma, x.shape[2])[1], views, text, caches, no_z)
        return self.norm(x), own


class SDD(Backbone):
    """Streaming diffusion decoder: the velocity of noisy chunks given their neighbours and z; None without a head."""

    def __init__(self, cfg: Config, with_head: bool = True):
        super().__init__(cfg, cfg.sdd_layers, cfg.fusion)
        if cfg.fusion in ("add", "concat", "adaln"):
            self.z_in = Linear(2 * cfg.dim if cfg.fusion == "concat" else cfg.dim, cfg.dim)
        self.head = Head(cfg) if with_head else None

    def project_z(self, z: Tensor, rope_z: Tensor) -> list[list[KeyValue | None]]:
        """Per layer and chunk what the blocks attend to of z [B, chunks, tokens, D]."""
        return [[block.project_z(one, rope_z) for one in z.unbind(1)] for block in self.blocks]

    def forward(self, x, sigma, views, text, caches, z, z_kv, rope_z):
        """(velocity [B, chunks * g, C, H, W] float32, own keys and values per layer and chunk).

        x like the velocity; sigma [B, chunks * g]; z [B, chunks, tokens, D] of these chunks, z_kv its `project_z`.
        """
        cfg, tokens, extra = self.cfg, self.tokens(x), None
        if cfg.fusion == "add":
            tokens = tokens + self.z_in(z).float()
        elif cfg.fusion == "concat":
            tokens = self.z_in(torch.cat([tokens, z], dim=-1)).float()
        elif cfg.fusion == "adaln":
            extra = self.z_in(z.mean(dim=2))
        e, e0 = self.time(sigma, tokens.shape[2], extra)
        y, own = self.run(tokens, e0, views, text, caches, z_kv, rope_z)
        if not self.head:
            return None, own
        h, w, p = x.shape[-2] // cfg.patch, x.shape[-1] // cfg.patch, cfg.patch
        y = self.head(y, e).flatten(1, 2).unflatten(1, (-1, h, w)).unflatten(-1, (p, p, cfg.channels))
        y = y.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        if cfg.prediction == "x0":
            y = (x.float() - y) / sigma.clamp_min(SIGMA_FLOOR)[..., None, None, None]
        return y, own
