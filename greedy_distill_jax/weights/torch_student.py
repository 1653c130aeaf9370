"""A streaming video student (ETM + SDD) in PyTorch: one file, needs torch and safetensors only.

This file lies in a folder with `config.json` and `*.safetensors` and belongs to them:

    import torch
    from torch_student import Student

    student = Student.from_pretrained("FOLDER", device="cuda", dtype=torch.bfloat16).eval()
    stream = student.stream(text, (H, W))         # text [B, M, text_dim]: rows of the text encoder the model knows
    for _ in range(240):
        latents = stream.step()                   # [B, g, C, H, W], clean; decode them with your VAE
        stream.switch_prompt(other_text)          # optional, at any chunk
    velocity = student(noisy, sigma, text, clean) # all frames of a known video at once (teacher forcing)

What it computes. A video is made in chunks of g = `chunk` latent frames. **ETM**, a causal transformer over the chunks
made so far (a sliding window of them), gives z for the next chunk. **SDD**, a diffusion transformer, denoises that
chunk from noise; its self-attention sees the first chunk, the previous chunk, itself (and z, depending on `fusion`).
`step` and the parallel `forward` give the same numbers. Names of parameters under `etm.` and `sdd*.` are Wan2.1's.

Conventions. Latents are [B, T, C, H, W]. Noise level sigma in [0, 1]: x = (1 - sigma) clean + sigma noise, and the
network's velocity is noise - clean. Matmuls run in `dtype`; norms, modulation, residual stream, time embedding, head,
rotary positions and sampler in float32. Noise comes from `generator` or is passed in: same noise in, same frames out.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIGMA_FLOOR = 0.05  # below it the velocity of an x0-predicting head blends into x itself
THETA = 10_000.0
FLOAT32 = ("time_embedding", "time_projection", "head")  # layers that are float32 whatever the others are, as in Wan


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

    def sdd_positions(self, i: int) -> tuple[int, int]:
        """Time positions (in chunks) of the previous and of the current chunk i."""
        furthest = {"fixed": 1, "absolute": i, "clamped": max(0, self.rope_frames // self.chunk - 2)}[self.rope_mode]
        previous = min(max(i - 1, 0), furthest)
        return previous, previous + 1 if i else 0

    def etm_keys(self, j: int) -> list[tuple[int, int]]:
        """(slot, time position) of what ETM's slot j sees, itself last."""
        reach, absolute = self.window - 1, self.rope_mode == "absolute"
        first = max(0, j - reach)  # a sink outside the window sits right before it, however far it is
        sinks = [(s, s if absolute else j - min(j - s, self.sink + reach - s)) for s in range(min(self.sink, first))]
        return sinks + [(a, a) for a in range(first, j + 1)]


class Ropes:
    """(cos, sin) [tokens, head_dim / 2] of chunks at chunk positions, from float64 angles; remembered while in use."""

    def __init__(self, cfg: Config, grid: tuple[int, int], device):
        self.cfg, self.grid, self.device, self._known = cfg, grid, device, {}

    def __call__(self, position: int) -> tuple[Tensor, Tensor]:
        """Time gets the channel pairs that height and width (a third each) leave."""
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
            self._known[position] = angle.cos().float(), angle.sin().float()
        return self._known[position]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the channel pairs (2j, 2j + 1) of [B, tokens, heads, head_dim] in float32."""
    cos, sin = (r[None, :, None] for r in rope)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class Linear(nn.Linear):
    """A linear layer that runs in the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return super().forward(x.to(self.weight.dtype))


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the full width, before the head split, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype."""
        return super().forward(x.float()).to(x.dtype)


KeyValue = tuple[Tensor, Tensor]  # [B, tokens, heads, head_dim] each; keys normed, not rotated


def attend(q: Tensor, key_values: list[KeyValue]) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over the concatenated keys; all [B, tokens, heads, head_dim]."""
    k, v = (torch.cat(x, dim=1) if len(x) > 1 else x[0] for x in zip(*key_values, strict=True))
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


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


class Chunk(NamedTuple):
    """What the self-attention of one chunk looks at, the same in all layers."""

    position: int  # of the chunk itself, in time
    seen: list[tuple[object, int]]  # (key, position): an int is a chunk of the same call, a string one of the cache


class Block(nn.Module):
    """One Wan block: modulated self-attention, cross-attention, modulated feed-forward."""

    def __init__(self, cfg: Config, fusion: str = "none"):
        super().__init__()
        self.fusion, dim = fusion, cfg.dim
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.self_attn = Attention(cfg, with_z=fusion == "selfkv")
        self.cross_attn = Attention(cfg, with_z=fusion == "xattn2")
        self.ffn = nn.Sequential(Linear(dim, cfg.ffn_dim), nn.GELU("tanh"), Linear(cfg.ffn_dim, dim))
        self.norm1, self.norm2 = (nn.LayerNorm(dim, cfg.eps, elementwise_affine=False) for _ in range(2))
        self.norm3 = nn.LayerNorm(dim, cfg.eps)
        if fusion == "xattn2":
            self.z_gate = nn.Parameter(torch.zeros(cfg.num_heads))

    def project_z(self, z: Tensor, ropes: Ropes) -> KeyValue | None:
        """Keys and values of one chunk's z, once per chunk."""
        if self.fusion == "selfkv":
            return self.self_attn.z_key_value(z)
        if self.fusion == "xattn2":  # aligned with the chunk's own tokens in space
            k, v = self.cross_attn.z_key_value(z)
            return rotate(k, ropes(0)), v
        return self.cross_attn.key_value(z) if self.fusion == "replace" else None

    def forward(self, x, e0, chunks: list[Chunk], ropes: Ropes, text: KeyValue | None, cache: dict, z: list):
        """One layer over the chunks of a call: (x, the chunks' own keys and values).

        x [B, chunks, tokens, D] float32; e0 [B, chunks, tokens or 1, 6, D] float32 modulation; `text` None with fusion
        "replace"; `cache` name -> keys and values of chunks of earlier calls; `z` per chunk.
        """
        dtype, count = self.self_attn.q.weight.dtype, len(chunks)
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation[:, None, None] + e0).unbind(-2)
        split = lambda y: y.unflatten(1, (count, -1)).unbind(1)  # noqa: E731 (one line, used four times)
        h = (self.norm1(x) * (1 + scale1) + shift1).to(dtype).flatten(1, 2)
        queries, out = split(self.self_attn.query(h)), []
        own = list(zip(*(split(y) for y in self.self_attn.key_value(h)), strict=True))
        for n, chunk in enumerate(chunks):
            seen = [(own[key] if isinstance(key, int) else cache[key], position) for key, position in chunk.seen]
            seen.append((own[n], chunk.position))
            if self.fusion == "selfkv":
                seen.append((z[n], chunk.position))
            rotated = [(rotate(k, ropes(position)), v) for (k, v), position in seen]
            out.append(attend(rotate(queries[n], ropes(chunk.position)), rotated))
        h = self.self_attn.out(torch.cat(out, dim=1)).float()
        x = x + h.unflatten(1, (count, -1)) * gate1

        q = self.cross_attn.query(self.norm3(x).to(dtype).flatten(1, 2))
        if self.fusion == "replace":
            out = torch.cat([attend(y, [z[n]]) for n, y in enumerate(split(q))], dim=1)
        else:
            out = attend(q, [text])
        if self.fusion == "xattn2":
            second = torch.cat([attend(rotate(y, ropes(0)), [z[n]]) for n, y in enumerate(split(q))], dim=1)
            out = out + (self.z_gate[:, None] * second.float()).to(out.dtype)
        x = x + self.cross_attn.out(out).float().unflatten(1, (count, -1))

        h = (self.norm2(x) * (1 + scale2) + shift2).to(dtype)
        return x + self.ffn(h).float() * gate2, own


class Head(nn.Module):
    """Final modulated LayerNorm and projection to patches."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 2, cfg.dim))
        self.norm = nn.LayerNorm(cfg.dim, cfg.eps, elementwise_affine=False)
        self.head = Linear(cfg.dim, cfg.patch**2 * cfg.channels)

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
        self.time_embedding = nn.Sequential(Linear(cfg.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
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

    def run(self, x, e0, chunks, ropes, text, caches, z) -> tuple[Tensor, list[list[KeyValue]]]:
        """All blocks, with `text`, `caches` and `z` per layer: (x, own keys and values per layer and chunk)."""
        own = []
        for block, *layer in zip(self.blocks, text, caches, z, strict=True):
            x, keys_and_values = block(x, e0, chunks, ropes, *layer)
            own.append(keys_and_values)
        return x, own


class ETM(Backbone):
    """Efficient temporal module: slot j reads chunk j - 1 (slot 0 a learned vector) and gives z for chunk j."""

    def __init__(self, cfg: Config):
        super().__init__(cfg, cfg.etm_layers, "none")
        self.bos, self.norm = nn.Parameter(torch.zeros(cfg.dim)), nn.LayerNorm(cfg.dim, cfg.eps)

    def forward(self, previous, sigma, chunks, ropes, text, caches):
        """z [B, slots, tokens, D] float32 of consecutive slots, and their keys and values per layer and slot."""
        x = self.tokens(previous)
        if chunks[0].position == 0:
            x = torch.cat([self.bos.float().expand_as(x[:, :1]), x[:, 1:]], dim=1)
        no_z = [[None] * len(chunks)] * len(self.blocks)
        x, own = self.run(x, self.time(sigma, x.shape[2])[1], chunks, ropes, text, caches, no_z)
        return self.norm(x), own


class SDD(Backbone):
    """Streaming diffusion decoder: the velocity of noisy chunks given their neighbours and z; None without a head."""

    def __init__(self, cfg: Config, with_head: bool = True):
        super().__init__(cfg, cfg.sdd_layers, cfg.fusion)
        if cfg.fusion in ("add", "concat", "adaln"):
            self.z_in = Linear(2 * cfg.dim if cfg.fusion == "concat" else cfg.dim, cfg.dim)
        self.head = Head(cfg) if with_head else None

    def project_z(self, z: Tensor, ropes: Ropes) -> list[list[KeyValue | None]]:
        """Per layer and chunk what the blocks attend to of z [B, chunks, tokens, D]."""
        return [[block.project_z(one, ropes) for one in z.unbind(1)] for block in self.blocks]

    def forward(self, x, sigma, chunks, ropes, text, caches, z, z_kv):
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
        y, own = self.run(tokens, e0, chunks, ropes, text, caches, z_kv)
        if not self.head:
            return None, own
        h, w, p = x.shape[-2] // cfg.patch, x.shape[-1] // cfg.patch, cfg.patch
        y = self.head(y, e).flatten(1, 2).unflatten(1, (-1, h, w)).unflatten(-1, (p, p, cfg.channels))
        y = y.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        if cfg.prediction == "x0":
            y = (x.float() - y) / sigma.clamp_min(SIGMA_FLOOR)[..., None, None, None]
        return y, own


class Student(nn.Module):
    """ETM + SDD: `forward` for all frames of a known video, `stream` to make new ones."""

    def __init__(self, cfg: Config, plan: dict | None = None):
        super().__init__()
        self.cfg, self.plan, self.etm, self.sdd = cfg, plan or {}, ETM(cfg), SDD(cfg)
        self.sdd_context = SDD(cfg, with_head=False) if cfg.context_weights == "own" else None

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device="cpu", dtype: torch.dtype | None = None) -> "Student":
        """Reads config.json and the safetensors files beside it; RuntimeError for tensors that do not fit.

        `dtype` is that of matmuls and caches, by default the one of training; everything else is float32.
        """
        from safetensors.torch import load_file

        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        dtype = dtype or getattr(torch, config["architecture"]["base"]["dtype"])
        with torch.device("meta"):
            student = cls(Config.from_json(config["architecture"]), config.get("plan"))
        layers = [name for name, m in student.named_modules() if isinstance(m, nn.Linear | nn.Conv3d)]
        matmuls = [name for name in layers if not set(FLOAT32) & set(name.split("."))]
        state = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            for name, tensor in load_file(file, device=str(device)).items():
                state[name] = tensor.to(dtype if name.rpartition(".")[0] in matmuls else torch.float32)
        student.load_state_dict(state, assign=True)
        return student

    def _ropes(self, size: tuple[int, int], device) -> Ropes:
        if size[0] % self.cfg.patch or size[1] % self.cfg.patch:
            raise ValueError(f"latents of {size[0]}x{size[1]} do not divide into patches of {self.cfg.patch}")
        return Ropes(self.cfg, (size[0] // self.cfg.patch, size[1] // self.cfg.patch), device)

    def sdd_chunk(self, i: int, first: object, previous: object) -> Chunk:
        """What chunk i of SDD sees, given the keys under which the first and the previous chunk are found."""
        (before, current), sees_first = self.cfg.sdd_positions(i), i == 1 or (i > 1 and self.cfg.anchor)
        return Chunk(current, [(first, 0)] * sees_first + [(previous, before)] * (i >= 2))

    def forward(self, noisy, sigma, text, history, history_sigma=None, sdd_history=None, sdd_history_sigma=None):
        """Velocity [B, T, C, H, W] float32 of all chunks at once, each given the history before it.

        noisy [B, T, C, H, W] (T a multiple of the chunk) at levels sigma [B, T]; text [B, M, text_dim]; history like
        noisy (the last chunk is not used) at levels history_sigma, 0 by default. sdd_history: what SDD's keys come
        from, where that differs (context "last_step_kv").
        """
        g, count = self.cfg.chunk, noisy.shape[1] // self.cfg.chunk
        ropes = self._ropes(noisy.shape[-2:], noisy.device)
        level = torch.zeros_like(sigma) if history_sigma is None else history_sigma
        chunks = [Chunk(j, self.cfg.etm_keys(j)[:-1]) for j in range(count)]
        before, before_level = F.pad(history[:, :-g], (0,) * 6 + (g, 0)), F.pad(level[:, :-g], (g, 0))
        z, _ = self.etm(before, before_level, chunks, ropes, self.etm.project_text(text), [{}] * len(self.etm.blocks))
        clean = history if sdd_history is None else sdd_history
        level = level if sdd_history_sigma is None else sdd_history_sigma
        caches = [{}] * len(self.sdd.blocks)
        if count > 1:  # the clean chunks do not depend on the noisy ones
            net, seen = self.sdd_context or self.sdd, [self.sdd_chunk(i, 0, i - 1) for i in range(count - 1)]
            args = net.project_text(text), caches, z[:, :-1], net.project_z(z[:, :-1], ropes)
            _, own = net(clean[:, :-g].float(), level[:, :-g], seen, ropes, *args)
            caches = [{str(i): kv for i, kv in enumerate(layer)} for layer in own]
        chunks = [self.sdd_chunk(i, "0", str(i - 1)) for i in range(count)]
        args = self.sdd.project_text(text), caches, z, self.sdd.project_z(z, ropes)
        return self.sdd(noisy.float(), sigma, chunks, ropes, *args)[0]

    def stream(self, text: Tensor, size: tuple[int, int], **options) -> "Stream":
        """A new video for every row of text [B, M, text_dim], of latents of size (H, W); options as for `Stream`."""
        return Stream(self, text, size, **options)


class Stream:
    """A video in the making; its memory does not grow.

    plan: the steps, by default those of config.json. "sigmas": per chunk a decreasing list of noise levels, the last
    one for all further chunks; "sampler": "euler" follows the flow, "renoise" predicts x0 and adds fresh noise.
    """

    def __init__(self, student: Student, text: Tensor, size: tuple[int, int], plan: dict | None = None, generator=None):
        self.student, self.plan, self.generator, self.index = student, {**student.plan, **(plan or {})}, generator, 0
        self._ropes = student._ropes(size, text.device)
        trained = student.plan.get("context_sigmas", self.plan["context_sigmas"])
        if list(self.plan["context_sigmas"]) != list(trained):
            raise ValueError(f"context_sigmas of plan are not those of the student, {trained}; leave them out")
        self._kept = torch.zeros(text.shape[0], student.cfg.chunk, student.cfg.channels, *size, device=text.device), 0.0
        self._etm, self._sdd = ([{} for _ in part.blocks] for part in (student.etm, student.sdd))
        self._read, self._pending = self._kept, None  # as ETM reads it; context "fused": the call whose pass is due
        self.switch_prompt(text)

    @torch.inference_mode()
    def switch_prompt(self, text: Tensor) -> None:
        """From the next chunk on another text; the visual history stays."""
        self._text = {net: net.project_text(text) for net in self.student.children()}

    @torch.inference_mode()
    def step(self, noise: list[Tensor] | None = None) -> Tensor:
        """The next clean chunk [B, g, C, H, W] float32.

        noise: [B, g, C, H, W] each: what the chunk starts from, with "renoise" one more per further step, and at the
        end what it is kept with, where its context has a noise level.
        """
        cfg, i, shape, device = self.student.cfg, self.index, self._kept[0].shape, self._kept[0].device
        if self._pending:
            self._remember(self._pending(*self._kept)[1])
        z, sdd, context = self._think(), self.student.sdd, self.student.sdd_context or self.student.sdd
        z_kv = {net: net.project_z(z, self._ropes) for net in {sdd, context}}
        chunk = [self.student.sdd_chunk(i, "first", "previous")]

        def call(x, sigma, net=sdd):
            sigma = torch.full(shape[:2], sigma, device=device)
            return net(x, sigma, chunk, self._ropes, self._text[net], self._sdd, z, z_kv[net])

        def draw(n):
            return noise[n].float() if noise else torch.randn(shape, generator=self.generator, device=device)

        sigmas, level = (self.plan[name][: i + 1][-1] for name in ("sigmas", "context_sigmas"))
        sigmas, x = [*sigmas, 0.0], draw(0)
        for n, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
            velocity, own = call(x, sigma)
            if self.plan["sampler"] == "euler":
                x = x + (after - sigma) * velocity
            else:
                x = x - sigma * velocity
                x = (1 - after) * x + after * draw(n + 1) if after else x
        self._kept, self.index = ((1 - level) * x + level * draw(-1) if level else x, level), i + 1
        self._read = self._kept if cfg.etm_input == "kept" else (x, 0.0)
        self._pending = call if cfg.context == "fused" else None
        if not self._pending:
            self._remember(own if cfg.context == "last_step_kv" else call(*self._kept, context)[1])
        return x

    def _think(self) -> Tensor:
        """ETM's z [B, 1, tokens, D] for the next chunk; keeps the keys later slots will look at."""
        cfg, j = self.student.cfg, self.index
        chunk = Chunk(j, [(str(slot), position) for slot, position in cfg.etm_keys(j)[:-1]])
        previous, sigma = self._read[0], torch.full_like(self._read[0][:, :, 0, 0, 0], self._read[1])
        z, own = self.student.etm(previous, sigma, [chunk], self._ropes, self._text[self.student.etm], self._etm)
        kept = {str(slot) for slot, _ in cfg.etm_keys(j + 1)}
        for layer, (key_value,) in enumerate(own):
            cache = {**self._etm[layer], str(j): key_value}
            self._etm[layer] = {slot: kv for slot, kv in cache.items() if slot in kept}
        return z

    def _remember(self, own: list[list[KeyValue]]) -> None:
        """The keys and values of the chunk just made become "previous", those of chunk 0 also "first"."""
        for cache, (key_value,) in zip(self._sdd, own, strict=True):
            cache.setdefault("first", key_value)
            cache["previous"] = key_value
