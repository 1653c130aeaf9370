"""A trained run, loaded: network, weights, codec and text encoder, ready to sample."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from greedy_distill_jax.config import keys as configuration
from greedy_distill_jax.storage.checkpoint import load_meta, load_params
from greedy_distill_jax.data.sources.moving_shapes import is_shapes
from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.text.prompts import WAN_NEGATIVE_PROMPT
from greedy_distill_jax.text.protocol import TextEncoder
from greedy_distill_jax.text.store import TextStore
from greedy_distill_jax.text.table import TextTable
from greedy_distill_jax.text.load import load_text_encoder
from greedy_distill_jax.diffusion import guidance
from greedy_distill_jax.diffusion import noise_levels
from greedy_distill_jax.diffusion import solvers
from greedy_distill_jax.weights import pipeline
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.models.students.base import StreamingModel
from greedy_distill_jax.streaming.etm_sdd import Streamer
from greedy_distill_jax.streaming.loop import Sampling
from greedy_distill_jax.streaming.causal import CausalStreamer
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.errors import UserError

NOT_ARCHITECTURE = ("dtype", "remat", "gate_init", "text_init", "time_init")


def architecture(model: Teacher | StreamingModel) -> dict[str, Any]:
    """What makes two checkpoints interchangeable, as JSON: sizes and meanings, not precision or initialisation."""
    fields = json.loads(json.dumps(dataclasses.asdict(model.cfg)))
    wan = fields.get("base", fields)
    for name in NOT_ARCHITECTURE:
        wan.pop(name)
    return {"kind": type(model).__name__.lower(), **fields}


def data_source(config: ConfigDict, split: str, *, frames: int, seed: int):
    """(source, codec) of ``config.data``; clips have a size of their own."""
    size = config.data.size if is_shapes(config.data.source) else None
    return load_source(config.data.source, split, size=size, frames=frames, seed=seed)


@dataclasses.dataclass
class Run:
    """Everything needed to sample. ``params`` are the averaged (EMA) weights; ``latent_shape`` is (T, H, W, C).

    ``codec`` is None for converted weights, which come without one. ``encoder`` is None where only weights were asked
    for (``needs_codec=False``) and the text is not embedded here.
    """

    config: ConfigDict
    model: Teacher | StreamingModel
    params: Any
    codec: VideoCodec | None
    encoder: TextEncoder | None
    latent_shape: tuple[int, ...]
    meta: dict[str, Any]

    @classmethod
    def load(
        cls, directory: str | Path, step: int | None = None, *, needs_codec: bool = True, text: str | None = None,
        codec: str | Path | None = None, sharding=None,
    ) -> "Run":  # fmt: skip
        """The latest (or the given) checkpoint of a run directory or of converted weights.

        Args:
          directory: the --workdir of a training command, or what `convert import` wrote.
          step: None for the newest.
          needs_codec: False accepts converted weights without a codec (nothing can be decoded then) and opens no text
            store.
          text: what encodes prompts, see ``data.text.load_text_encoder``; None for what the run was trained with.
          codec: path of the codec, see ``export.pipeline.load_codec``; None for the run's own.
          sharding: of the parameters, as for ``checkpoint.load_params``; None for the default device.

        Raises:
          UserError: no run, no finished checkpoint, or a codec that is missing.
        """
        directory = Path(directory).expanduser()
        if not (directory / "checkpoints").is_dir():
            raise UserError(
                f"{directory} holds no run of greedy_distill_jax (no checkpoints folder); give the --workdir of a "
                f"training command, or the folder that `python -m greedy_distill_jax.convert import` makes of other "
                f"weights."
            )
        meta = load_meta(directory / "checkpoints", step=step)
        config = configuration.base()
        with config.unlocked():
            stored = json.loads(meta["config"])
            config.losses, config.critic.losses = ConfigDict(), ConfigDict()  # the run's, not beside the defaults
            config.update(ConfigDict(stored))
        wan = configuration.wan_config(config)
        model = Teacher(wan) if config.stage == "teacher" else make_student(configuration.student_config(config))
        params = load_params(directory / "checkpoints", "ema", step=step, sharding=sharding)
        spec, encoder = config.data.text if text is None else text, None
        if needs_codec or not spec:
            encoder = load_text_encoder(spec, text_len=wan.text_len, text_dim=wan.text_dim)
        if codec is not None:
            codec = pipeline.moved_codec(directory, codec)
        elif pipeline.saved_codec(directory) or "source" not in meta:
            codec = pipeline.load_codec(directory)
        elif needs_codec:
            raise UserError(
                f"{directory} holds converted weights without a codec, so nothing can be decoded; train a student from "
                f"them (config.teacher_from), give the --workdir of a training command, or name a codec to the command "
                f"sample with --codec."
            )
        return cls(config, model, params, codec, encoder, tuple(meta["latent_shape"]), meta)

    @classmethod
    def from_model_folder(
        cls, folder: str | Path, codec: VideoCodec, prompts: Sequence[str], *, height: int, width: int, frames: int,
        negative: str = WAN_NEGATIVE_PROMPT, dtype: str = "bfloat16", text: str | None = None,
    ) -> "Run":  # fmt: skip
        """The teacher of a model folder in the layout of diffusers, for given prompts and sizes.

        The text encoder, which may be larger than the transformer, is gone when the transformer is loaded.

        Args:
          folder: with `transformer/`, and `text_encoder/` and `tokenizer/` unless ``text`` is given.
          codec: turns its latents into pixels (``export.pipeline.load_codec``).
          prompts: all that will be asked for.
          height, width, frames: of the videos, in pixels and frames of video.
          negative: prompt of the unconditional branch.
          dtype: to compute in, "bfloat16" or "float32".
          text: a text store or another model folder; None for the folder's own encoder.

        Raises:
          UserError: an incomplete folder, or parts and sizes that do not fit each other.
        """
        cfg = pipeline.transformer_config(folder, dtype=dtype)
        latent_shape = (latent_frames(codec, frames), *codec.latent_shape(height, width))
        if latent_shape[-1] != cfg.channels:
            raise UserError(
                f"model folder {folder}: the latents of its codec have {latent_shape[-1]} channels, the transformer "
                f"takes {cfg.channels}; give a folder whose parts belong together"
            )
        if latent_shape[1] % cfg.patch or latent_shape[2] % cfg.patch:
            side = height // latent_shape[1] * cfg.patch
            raise UserError(f"--height {height} --width {width}: both must be multiples of {side} pixels")
        encoder = load_text_encoder(text or folder, text_len=cfg.text_len, text_dim=cfg.text_dim)
        if not isinstance(encoder, TextStore):
            encoder = TextTable(encoder, [*prompts, negative])
        cfg, params = pipeline.load_transformer(folder, dtype=dtype)
        config = configuration.base()
        config.model.update(dataclasses.asdict(cfg))
        config.data.frames, config.data.negative_prompt, config.log.fps = latent_shape[0], negative, 16
        config.sample.update(sampler="unipc", steps=50, shift=pipeline.read_shift(folder), guidance=5.0)
        return cls(config, Teacher(cfg), params, codec, encoder, latent_shape, {})

    @property
    def fingerprint(self) -> str:
        """Tells this checkpoint from any other run's or step's (16 hexadecimal digits of what it was saved with)."""
        return hashlib.sha256(json.dumps(self.meta, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def is_student(self) -> bool:
        """Streams chunk by chunk; a teacher makes whole videos."""
        return isinstance(self.model, StreamingModel)

    def text(self, prompts: Sequence[str]) -> jax.Array:
        """Encoder rows [B, M, C]."""
        return jnp.asarray(self.encoder(list(prompts)))

    def streamer(self, steps: int | None = None, first_steps: int | None = None) -> Streamer | CausalStreamer:
        """The student's streaming functions with this run's sampling."""
        if not self.is_student:
            raise UserError("A teacher makes whole videos and cannot stream; give a student's run directory.")
        chosen, trained = configuration.sampling(self.config, steps, first_steps), configuration.sampling(self.config)
        last = [(s.sigmas[0][-1], s.sigmas[-1][-1]) for s in (chosen, trained)]
        if self.model.cfg.context == "last_step_kv" and last[0] != last[1]:
            raise UserError(
                f"This student keeps the keys of its last denoising step and was trained for last noise levels "
                f"{last[1]}, not {last[0]}; sample it with the steps of its config."
            )
        return make_streamer(self.model, chosen)

    @functools.cached_property
    def _teacher_sampler(self):
        @functools.partial(jax.jit, static_argnames=("solver", "steps", "shift", "scale"))
        def sample(params, noise, text, null, *, solver, steps, shift, scale):
            net = guidance.guided(functools.partial(self.model, params), text, null, scale)
            return solvers.solve(solver, net, noise, steps=steps, shift=shift)

        return sample

    def denoise(self, noise, text, steps: int | None = None) -> jax.Array:
        """The teacher's latents [B, T, H, W, C] from noise of that shape and text rows [B, M, D].

        Solver, shift and guidance are those of ``config.sample``, the unconditional prompt is
        ``config.data.negative_prompt``; ``steps`` overrides the number of steps.
        """
        s = self.config.sample
        null = jnp.broadcast_to(self.text([self.config.data.negative_prompt]), text.shape)
        return self._teacher_sampler(
            self.params, noise, text, null, solver=s.sampler, steps=steps or s.steps, shift=s.shift, scale=s.guidance
        )

    def trajectories(self, noise, text, kept: tuple[float, ...], steps: int, shift: float):
        """The teacher's ODE by Euler's method: (latents, states [K, B, T, H, W, C] at the levels ``kept``).

        Noise, text and guidance are as for ``denoise``. The levels are those of ``steps`` uniform steps under
        ``shift``, with ``kept`` in between.
        """
        levels = tuple(sorted({*noise_levels.uniform_steps(steps, shift), *kept}, reverse=True))
        null = jnp.broadcast_to(self.text([self.config.data.negative_prompt]), text.shape)
        return self._ode(self.params, noise, text, null, levels=levels, kept=kept, scale=self.config.sample.guidance)

    @functools.cached_property
    def _ode(self):
        @functools.partial(jax.jit, static_argnames=("levels", "kept", "scale"))
        def follow(params, noise, text, null, *, levels, kept, scale):
            net = guidance.guided(functools.partial(self.model, params), text, null, scale)
            return solvers.euler_states(net, noise, levels, kept)

        return follow

    def sample_latents(self, prompts: Sequence[str], *, frames: int | None = None, steps: int | None = None,
                       first_steps: int | None = None, seed: int = 0) -> np.ndarray:  # fmt: skip
        """Latents [B, frames, H, W, C]; the teacher denoises all frames together, the student streams them."""
        frames = frames or self.latent_shape[0]
        key = jax.random.key(seed)
        text = self.text(prompts)
        if not self.is_student:
            noise = jax.random.normal(key, (len(prompts), frames, *self.latent_shape[1:]), jnp.float32)
            return np.asarray(self.denoise(noise, text, steps))
        self.model.chunks_of(frames)
        out, (state, step) = [], self.open_stream(text, key, steps, first_steps)
        for _ in range(frames // self.model.cfg.chunk):
            state, x = step(self.params, state)
            out.append(np.asarray(x))
        return np.concatenate(out, axis=1)

    def open_stream(self, text, key, steps: int | None = None, first_steps: int | None = None):
        """(initial state, jitted step with a donated state) of a student's stream."""
        return open_stream(self.streamer(steps, first_steps), self.params, text, key, self.latent_shape[1:])

    def sample_videos(self, prompts: Sequence[str], **options) -> np.ndarray:
        """uint8 videos [B, T, H, W, 3]; options as for ``sample_latents``."""
        return self.codec.decode(self.sample_latents(prompts, **options))


def latent_frames(codec: VideoCodec, frames: int, option: str = "--frames") -> int:
    """T of a video of so many frames, of which the first latent frame is one; UserError if they do not divide."""
    stride = codec.temporal_stride
    if frames < 1 or (frames - 1) % stride:
        near = 1 + max(frames - 1, 0) // stride * stride
        raise UserError(f"{option} {frames}: the codec makes 1 + {stride} k frames, such as {near} or {near + stride}")
    return 1 + (frames - 1) // stride


def open_stream(
    streamer: Streamer | CausalStreamer, params, text_BMC, key, latent_shape: tuple[int, int, int]
):  # fmt: skip
    """(initial state, jitted step with a donated state) of a stream of latents (H, W, C) for prompts [B, M, C].

    Streams of the same student and sampling share their programs.
    """
    init, step = _jitted_stream(streamer.cfg, streamer.sampling)
    return init(params, text_BMC, key, tuple(latent_shape)), step


@functools.lru_cache(maxsize=8)
def _jitted_stream(student_config, sampling: Sampling):
    streamer = make_streamer(make_student(student_config), sampling)
    return jax.jit(streamer.init, static_argnums=3), jax.jit(streamer.step, donate_argnums=1)
