"""A streaming video student (ETM + SDD) in PyTorch: one file, needs torch and safetensors only.

This file lies in a folder with `config.json` and `*.safetensors` and belongs to them:

    import torch
    from torch_student import Student

    student = Student.from_pretrained("FOLDER", device="cuda", dtype=torch.bfloat16).eval()
    student.compile()                             # optional: torch.compile, a fixed number of graphs
    stream = student.stream(text, (H, W))         # text [B, M, text_dim]: rows of the text encoder the model knows
    for _ in range(240):
        latents = stream.step()                   # [B, g, C, H, W], clean; decode them with your VAE
        stream.switch_prompt(other_text)          # optional, at any chunk
        stream.give(clean)                        # optional: the next chunks are these
    velocity = student(noisy, sigma, text, clean) # all frames of a known video at once (teacher forcing)

What it computes. A video is made in chunks of g = `chunk` latent frames. **ETM**, a causal transformer over the chunks
made so far (a sliding window of them), gives z for the next chunk. **SDD**, a diffusion transformer, denoises that
chunk from noise; its self-attention sees the first chunk, the previous chunk, itself (and z, depending on `fusion`).
`step` and the parallel `forward` give the same numbers. Names of parameters under `etm.` and `sdd*.` are Wan2.1's.

Conventions. Latents are [B, T, C, H, W]. Noise level sigma in [0, 1]: x = (1 - sigma) clean + sigma noise, and the
network's velocity is noise - clean. Matmuls run in `dtype`, that of `.half()`, `.bfloat16()` or `.to(dtype)`; norms,
modulation, residual stream, time embedding, head, rotary positions, sampler and all results are float32, and what these
need is held so. Noise comes from `generator` or is passed in: same noise in, same frames out.
"""

import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedy_distill_jax.weights.torch_networks import ETM, SDD, Backbone, Config, KeyValue, Ropes, View


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
        with torch.device("meta"):
            student = cls(Config.from_json(config["architecture"]), config.get("plan"))
        student.to(dtype or getattr(torch, config["architecture"]["base"]["dtype"]))
        state, dtypes = {}, {name: parameter.dtype for name, parameter in student.named_parameters()}
        for file in sorted(Path(folder).glob("*.safetensors")):
            state |= {name: x.to(dtypes.get(name)) for name, x in load_file(file, device=str(device)).items()}
        student.load_state_dict(state, assign=True)
        return student

    def compile(self, **options) -> None:
        """`torch.compile`, with its options, of what streams call.

        A stream, however long and with whatever prompts of as many rows, compiles each network twice: for its first
        chunks, which see less than later ones, and for all others.
        """
        for net in self.children():
            net.compile(**options)

    def _ropes(self, shape: tuple[int, ...], device) -> Ropes:
        """For latents [..., H, W]; ValueError for a size that has no whole patches."""
        height, width = shape[-2:]
        if height % self.cfg.patch or width % self.cfg.patch:
            raise ValueError(f"latents of {height}x{width} do not divide into patches of {self.cfg.patch}")
        return Ropes(self.cfg, (height // self.cfg.patch, width // self.cfg.patch), device)

    def forward(self, noisy, sigma, text, history, history_sigma=None, sdd_history=None, sdd_history_sigma=None):
        """Velocity [B, T, C, H, W] float32 of all chunks at once, each given the history before it.

        noisy [B, T, C, H, W] (T a multiple of the chunk) at levels sigma [B, T]; text [B, M, text_dim]; history like
        noisy (the last chunk is not used) at levels history_sigma, 0 by default. sdd_history: what SDD's keys come
        from, where that differs (context "last_step_kv").
        """
        cfg, g, count = self.cfg, self.cfg.chunk, noisy.shape[1] // self.cfg.chunk
        _check("text", text, (len(noisy), None, cfg.text_dim))
        for name, given, shape in (
            ("noisy", noisy, (None, count * g, cfg.channels, None, None)),
            ("sigma", sigma, noisy.shape[:2]),
            ("history", history, noisy.shape),
            ("history_sigma", history_sigma, noisy.shape[:2]),
            ("sdd_history", sdd_history, noisy.shape),
            ("sdd_history_sigma", sdd_history_sigma, noisy.shape[:2]),
        ):
            if given is not None:
                _check(name, given, shape)
        ropes = self._ropes(noisy.shape, noisy.device)
        rope_z = ropes(0)

        def views(position, seen):
            """Of all chunks, given (chunk, time position) pairs of what each sees."""
            pairs = [(position(n), *zip(*seen(n), strict=True)) for n in range(count)]
            return [View(ropes(own), list(*at[:1]), ropes(*at[1]) if at else None) for own, *at in pairs]

        level = torch.zeros_like(sigma) if history_sigma is None else history_sigma
        before, before_level = F.pad(history[:, :-g], (0,) * 6 + (g, 0)), F.pad(level[:, :-g], (g, 0))
        args = views(int, lambda j: cfg.etm_keys(j)[:-1]), self.etm.project_text(text), [[]] * len(self.etm.blocks)
        z, _ = self.etm(before, before_level, torch.arange(count, device=noisy.device) == 0, *args)
        clean = history if sdd_history is None else sdd_history
        level = level if sdd_history_sigma is None else sdd_history_sigma
        caches, seen = [[]] * len(self.sdd.blocks), views(cfg.sdd_position, cfg.sdd_keys)
        if count > 1:  # the clean chunks do not depend on the noisy ones
            net, past = self.sdd_context or self.sdd, z[:, :-1]
            args = net.project_text(text), caches, past, net.project_z(past, rope_z), rope_z
            caches = net(clean[:, :-g].float(), level[:, :-g], seen[:-1], *args)[1]
        args = self.sdd.project_text(text), caches, z, self.sdd.project_z(z, rope_z), rope_z
        return self.sdd(noisy.float(), sigma, seen, *args)[0]

    def stream(self, text: Tensor, size: tuple[int, int], **options) -> "Stream":
        """A new video for every row of text [B, M, text_dim], of latents of size (H, W); options as for `Stream`."""
        return Stream(self, text, size, **options)


def _check(name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    """ValueError for another shape; None stands for any size."""
    if x.ndim != len(shape) or any(wanted not in (None, size) for size, wanted in zip(x.shape, shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} is of shape {list(x.shape)}; give [{wanted}]")


class Cache:
    """Keys and values, per layer, of the first `sink` and the last `ring` chunks of a stream."""

    def __init__(self, net: Backbone, sink: int, ring: int, batch: int, tokens: int):
        weight = net.blocks[0].self_attn.q.weight
        shape = (batch, tokens, net.cfg.num_heads, net.cfg.dim // net.cfg.num_heads)
        new = lambda: tuple(weight.new_zeros(shape) for _ in range(2))  # noqa: E731 (a tensor of its own for each)
        self.layers = [[new() for _ in range(sink + ring)] for _ in net.blocks]
        self.sink, self.slots, self.filled, self.tokens = sink, sink + ring, 0, tokens

    def push(self, own: list[list[KeyValue]]) -> None:
        """Takes in the chunk just made; the oldest behind the sink goes."""
        for layer, (key_value,) in zip(self.layers, own, strict=True):
            if self.filled < self.slots:
                layer[self.filled] = key_value
            elif self.slots > self.sink:
                layer[self.sink :] = [*layer[self.sink + 1 :], key_value]
        self.filled = min(self.filled + 1, self.slots)

    def view(self, ropes: Ropes, position: int, seen: list[int], own: int) -> View:
        """Of the next chunk, at a time position, given those of the chunks held; `own`: its keys in chunks."""
        mask, empty = None, self.slots - self.filled
        if empty:
            held = torch.arange(self.slots + own, device=ropes.device)
            mask = ((held < self.filled) | (held >= self.slots)).repeat_interleave(self.tokens)[None]
        seen_rope = ropes(*seen, *[0] * empty) if self.slots else None
        return View(ropes(position), list(range(self.slots)), seen_rope, mask)


class Stream:
    """A video in the making; its memory does not grow.

    plan: the steps, by default those of config.json. "sigmas": per chunk a decreasing list of noise levels, the last
    one for all further chunks; "sampler": "euler" follows the flow, "renoise" predicts x0 and adds fresh noise.
    """

    def __init__(self, student: Student, text: Tensor, size: tuple[int, int], plan: dict | None = None, generator=None):
        cfg, self.plan = student.cfg, {**student.plan, **(plan or {})}
        self.student, self.generator, self.index, self._batch = student, generator, 0, len(text)
        self._ropes = student._ropes(size, text.device)
        trained = student.plan.get("context_sigmas", self.plan["context_sigmas"])
        if list(self.plan["context_sigmas"]) != list(trained):
            raise ValueError(f"context_sigmas of plan are not those of the student, {trained}; leave them out")
        self.switch_prompt(text)
        self._kept = torch.zeros(self._batch, cfg.chunk, cfg.channels, *size, device=text.device), 0.0
        shape = self._batch, cfg.chunk * self._ropes.grid[0] * self._ropes.grid[1]
        self._etm = Cache(student.etm, cfg.sink, cfg.window - 1, *shape)
        self._sdd = Cache(student.sdd, int(cfg.anchor), 1, *shape)
        self._read, self._pending = self._kept, None  # as ETM reads it; context "fused": the call whose pass is due
        self._given: list[Tensor] = []  # chunks that come before any that is made

    @torch.no_grad()
    def switch_prompt(self, text: Tensor) -> None:
        """From the next chunk on another text [B, M, text_dim]; the visual history stays."""
        _check("text", text, (self._batch, None, self.student.cfg.text_dim))
        self._text = {net: net.project_text(text) for net in self.student.children()}

    def give(self, latents: Tensor) -> None:
        """Makes the next chunks be these, clean: a first frame, the beginning of a video, what another model made.

        latents: [B, T, C, H, W], T a multiple of the chunk; ValueError for others. `step` hands them out, then what it
        makes behind them.
        """
        (batch, g, *size), given = self._kept[0].shape, list(latents.shape)
        if latents.ndim != 5 or [given[0], *given[2:]] != [batch, *size] or not given[1] or given[1] % g:
            wanted = f"[{batch}, T, {', '.join(map(str, size))}], T a multiple of {g}"
            raise ValueError(f"latents are of shape {given}; give {wanted}")
        chunks = latents.detach().to(self._kept[0].device, torch.float32).split(g, dim=1)
        self._given += [x.clone(memory_format=torch.contiguous_format) for x in chunks]

    @torch.no_grad()
    def step(self, noise: list[Tensor] | None = None) -> Tensor:
        """The next clean chunk [B, g, C, H, W] float32.

        noise: [B, g, C, H, W] each: what the chunk starts from, with "renoise" one more per further step, and at the
        end what it is kept with, where its context has a noise level. ValueError for others, or another number. A given
        chunk takes the last alone, before it one for its keys with context "last_step_kv".
        """
        cfg, i, shape, device = self.student.cfg, self.index, self._kept[0].shape, self._kept[0].device
        sigmas, level = (self.plan[name][: i + 1][-1] for name in ("sigmas", "context_sigmas"))
        last_kv, steps = cfg.context == "last_step_kv", len(sigmas) if self.plan["sampler"] == "renoise" else 1
        noise = self._noise(noise, (last_kv if self._given else steps) + bool(level))
        if self._pending:
            self._sdd.push(self._pending(*self._kept)[1])
        z, sdd, context = self._think(), self.student.sdd, self.student.sdd_context or self.student.sdd
        positions, rope_z = [position for _, position in cfg.sdd_keys(i)], self._ropes(0)
        view = [self._sdd.view(self._ropes, cfg.sdd_position(i), positions, 1 + (cfg.fusion == "selfkv"))]
        z_kv = {net: net.project_z(z, rope_z) for net in {sdd, context}}

        def call(x, sigma, net=sdd):
            sigma = torch.full(shape[:2], sigma, device=device)
            return net(x, sigma, view, self._text[net], self._sdd.layers, z, z_kv[net], rope_z)

        if self._given:
            x = self._given.pop(0)
            own = call((1 - sigmas[-1]) * x + sigmas[-1] * next(noise), sigmas[-1])[1] if last_kv else None
        else:
            x, own = self._denoise(call, sigmas, noise)
        self._kept, self.index = ((1 - level) * x + level * next(noise) if level else x, level), i + 1
        self._read = self._kept if cfg.etm_input == "kept" else (x, 0.0)
        self._pending = call if cfg.context == "fused" else None
        if not self._pending:
            self._sdd.push(own if last_kv else call(*self._kept, context)[1])
        return x

    def _denoise(self, call, sigmas: list[float], noise):
        """(A clean chunk, the keys and values of its last call)."""
        x = next(noise)
        for sigma, after in itertools.pairwise([*sigmas, 0.0]):
            velocity, own = call(x, sigma)
            if self.plan["sampler"] == "euler":
                x = x + (after - sigma) * velocity
            else:
                x = x - sigma * velocity
                x = (1 - after) * x + after * next(noise) if after else x
        return x, own

    def _noise(self, given: list[Tensor] | None, count: int):
        """An iterator over the noise of the next chunk."""
        shape, device = self._kept[0].shape, self._kept[0].device
        if given is None:
            return (torch.randn(shape, generator=self.generator, device=device) for _ in range(count))
        if len(given) != count:
            raise ValueError(f"noise has {len(given)} tensors; chunk {self.index} takes {count} of {list(shape)}")
        for n, x in enumerate(given):
            _check(f"noise[{n}]", x, shape)
        return (x.to(device, torch.float32).contiguous() for x in given)

    def _think(self) -> Tensor:
        """ETM's z [B, 1, tokens, D] for the next chunk; keeps the keys later slots will look at."""
        net, (previous, level) = self.student.etm, self._read
        sigma, is_first = torch.full_like(previous[:, :, 0, 0, 0], level), torch.tensor([not self.index])
        *seen, (_, own) = sorted(self.student.cfg.etm_keys(self.index))
        view = [self._etm.view(self._ropes, own, [position for _, position in seen], 1)]
        z, own = net(previous, sigma, is_first.to(previous.device), view, self._text[net], self._etm.layers)
        self._etm.push(own)
        return z
