"""A trained run, loaded: network, weights, codec and text encoder, ready to sample."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from greedy_distill_jax import config as configuration
from greedy_distill_jax.checkpoint import load_meta, load_params
from greedy_distill_jax.data.loader import is_shapes, load_source
from greedy_distill_jax.data.text import HashWordEncoder
from greedy_distill_jax.diffusion import guidance, solvers
from greedy_distill_jax.models.causal import make_student
from greedy_distill_jax.models.codec import PatchCodec
from greedy_distill_jax.models.dit import Teacher
from greedy_distill_jax.models.student import StreamingModel
from greedy_distill_jax.stream import Sampling, Streamer
from greedy_distill_jax.stream_causal import CausalStreamer, make_streamer
from greedy_distill_jax.types import UserError

CODEC = "codec.npz"
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

    ``codec`` is None for converted weights, which come without one.
    """

    config: ConfigDict
    model: Teacher | StreamingModel
    params: Any
    codec: PatchCodec | None
    encoder: HashWordEncoder
    latent_shape: tuple[int, ...]
    meta: dict[str, Any]

    @classmethod
    def load(cls, directory: str | Path, step: int | None = None, *, needs_codec: bool = True) -> "Run":
        """The latest (or the given) checkpoint of a run directory or of converted weights.

        Args:
          directory: the --workdir of a training command, or what `convert import` wrote.
          step: None for the newest.
          needs_codec: False accepts converted weights without a codec (nothing can be decoded then).

        Raises:
          UserError: no run, no finished checkpoint, or a codec that is missing.
        """
        directory = Path(directory).expanduser()
        if not (directory / "checkpoints").is_dir():
            raise UserError(
                f"{directory} holds no run of greedy_distill_jax (no checkpoints folder); give the --workdir of a "
                f"training command."
            )
        meta = load_meta(directory / "checkpoints", step=step)
        config = configuration.base()
        with config.unlocked():
            stored = json.loads(meta["config"])
            config.losses, config.critic.losses = ConfigDict(), ConfigDict()  # the run's, not beside the defaults
            config.update(ConfigDict(stored))
        wan = configuration.wan_config(config)
        model = Teacher(wan) if config.stage == "teacher" else make_student(configuration.student_config(config))
        params = load_params(directory / "checkpoints", "ema", step=step)
        encoder = HashWordEncoder(wan.text_len, wan.text_dim)
        codec = None
        if (directory / CODEC).exists() or "source" not in meta:
            codec = PatchCodec.load(directory / CODEC)
        elif needs_codec:
            raise UserError(
                f"{directory} holds converted weights without a codec, so nothing can be decoded; train a student from "
                f"them (config.teacher_from), or give the --workdir of a training command."
            )
        return cls(config, model, params, codec, encoder, tuple(meta["latent_shape"]), meta)

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

        Solver, shift and guidance are those of ``config.sample``; ``steps`` overrides its number of steps.
        """
        s = self.config.sample
        null = jnp.broadcast_to(self.text([""]), text.shape)
        return self._teacher_sampler(
            self.params, noise, text, null, solver=s.sampler, steps=steps or s.steps, shift=s.shift, scale=s.guidance
        )

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
        streamer = self.streamer(steps, first_steps)
        state = jax.jit(streamer.init, static_argnums=3)(self.params, text, key, self.latent_shape[1:])
        return state, _jitted_step(self.model.cfg, streamer.sampling)

    def sample_videos(self, prompts: Sequence[str], **options) -> np.ndarray:
        """uint8 videos [B, T, H, W, 3]; options as for ``sample_latents``."""
        return self.codec.decode(self.sample_latents(prompts, **options))


@functools.lru_cache(maxsize=8)
def _jitted_step(student_config, sampling: Sampling):
    return jax.jit(make_streamer(make_student(student_config), sampling).step, donate_argnums=1)
