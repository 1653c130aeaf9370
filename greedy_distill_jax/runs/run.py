"""A trained run, loaded: network, weights, codec and text encoder, ready to sample."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Key, UInt8

from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.config import Settings
from greedy_distill_jax.config.settings import stored_settings
from greedy_distill_jax.data.sources.moving_shapes import is_shapes
from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.distribution.compile_cache import use_compile_cache
from greedy_distill_jax.errors import UserError, about
from greedy_distill_jax.models.students.base import StreamingModel
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.models.wan.linear import compute_precision
from greedy_distill_jax.runs.teacher_sampler import TeacherSampler
from greedy_distill_jax.storage.checkpoint import Checkpointer, read_run
from greedy_distill_jax.streaming.causal import CausalStreamer
from greedy_distill_jax.streaming.etm_sdd import Streamer
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.streaming.session import Session
from greedy_distill_jax.text.hashed_words import HashWordEncoder, words_of
from greedy_distill_jax.text.load import load_text_encoder
from greedy_distill_jax.text.protocol import TextEncoder
from greedy_distill_jax.text.vocabulary import never_seen, unknown_words
from greedy_distill_jax.weights import pipeline
from greedy_distill_jax.weights.source import ENCODER

NOT_ARCHITECTURE = ("dtype", "gradient_dtype", "remat", "gate_init", "text_init", "time_init")


def architecture(model: Teacher | StreamingModel, *, defaults: bool = False) -> dict[str, Any]:
    """What makes two checkpoints interchangeable, as JSON: sizes and meanings, not precision or initialisation.

    Args:
      model: any network.
      defaults: those of its configuration instead.
    """
    fields = json.loads(json.dumps(dataclasses.asdict(type(model.cfg)() if defaults else model.cfg)))
    wan = fields.get("base", fields)
    for name in NOT_ARCHITECTURE:
        wan.pop(name)
    return {"kind": type(model).__name__.lower(), **fields}


def data_source(settings: Settings, split: str, *, frames: int, seed: int):
    """(source, codec) of ``config.data``; clips have a size of their own."""
    size = settings.data.size if is_shapes(settings.data.source) else None
    return load_source(settings.data.source, split, size=size, frames=frames, seed=seed)


def is_trained(meta: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of a training, not of imported weights."""
    return "train_cpu_s" in meta


@dataclasses.dataclass
class Run:
    """Everything needed to sample.

    Attributes:
      settings: that the run was trained with.
      model: the network's functions.
      params: the averaged (EMA) weights.
      codec: None for converted weights, which come without one.
      encoder: of prompts; None where only weights were asked for (``needs_codec=False``) and the text is not embedded
        here.
      latent_shape: (T, H, W, C) of a training example.
      meta: what the checkpoint was saved with.
      told: what was said about prompts; it is said once.
    """

    settings: Settings
    model: Teacher | StreamingModel
    params: Any
    codec: VideoCodec | None
    encoder: TextEncoder | None
    latent_shape: tuple[int, ...]
    meta: dict[str, Any]
    told: set[str] = dataclasses.field(default_factory=set, repr=False)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        step: int | None = None,
        *,
        needs_codec: bool = True,
        text: str | None = None,
        codec: str | Path | None = None,
        sharding=None,
    ) -> "Run":
        """Loads the latest (or the given) checkpoint of a run directory or of converted weights.

        Args:
          directory: the --workdir of a training command, or what `convert import` wrote.
          step: None for the newest that is not damaged.
          needs_codec: False accepts converted weights without a codec (nothing can be decoded then) and opens no text
            store.
          text: what encodes prompts, see ``text.load.load_text_encoder``; None for what the run was trained with.
          codec: path of the codec, see ``weights.pipeline.load_codec``; None for the run's own.
          sharding: of the parameters, as for ``Checkpointer.restore_subtree``; None for the default device.

        Raises:
          UserError: no run, no finished checkpoint, or a codec or a text encoder that is missing; its field is the
            argument's name.
        """
        directory = Path(directory).expanduser()
        if not (directory / "checkpoints").is_dir():
            raise UserError(
                f"{directory} holds no run of greedy_distill_jax (no checkpoints folder); give the --workdir of a "
                f"training command, or the folder that `python -m greedy_distill_jax.convert import` makes of other "
                f"weights.",
                "directory",
            )

        def read(checkpoints: Checkpointer, step: int):
            meta = checkpoints.meta(step)
            with checkpoints.agreed(step, "config"):
                settings, network = stored_settings(meta["config"]), meta["network"]
            return meta, settings, checkpoints.restore_subtree(step, f"nets/{network}/ema", sharding=sharding)

        with about("directory"):
            meta, settings, params = read_run(directory / "checkpoints", step, read)
        wan = settings.wan
        model = make_student(settings.student_config) if settings.is_student else Teacher(wan)
        spec, encoder = settings.data.text if text is None else text, None
        foreign = not spec and meta.get("source", {}).get("text") == ENCODER
        if foreign and needs_codec:
            raise UserError(
                f"{directory} holds weights that were trained with a text encoder, and no words are embedded for them; "
                "name a text store or a model folder with text_encoder/ for the prompts.",
                "text",
            )
        if needs_codec or not (spec or foreign):
            with about("directory" if text is None else "text"):
                encoder = load_text_encoder(spec, text_len=wan.text_len, text_dim=wan.text_dim)
        if codec is not None:
            with about("codec"):
                codec = pipeline.moved_codec(directory, codec)
        elif pipeline.saved_codec(directory) or "source" not in meta:
            with about("directory"):
                codec = pipeline.load_codec(directory)
        elif needs_codec:
            raise UserError(
                f"{directory} holds converted weights without a codec, so nothing can be decoded; train a student from "
                f"them (config.teacher_from), give the directory of a trained run, or name a codec, such as its "
                "codec.npz.",
                "codec",
            )
        return cls(settings, model, params, codec, encoder, tuple(meta["latent_shape"]), meta)

    @property
    def fingerprint(self) -> str:
        """Tells this checkpoint from any other run's or step's (16 hexadecimal digits of what it was saved with)."""
        return hashlib.sha256(json.dumps(self.meta, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def trained(self) -> bool:
        """Trained here, not imported."""
        return is_trained(self.meta)

    @property
    def is_student(self) -> bool:
        """Streams chunk by chunk; a teacher makes whole videos."""
        return isinstance(self.model, StreamingModel)

    def text(self, prompts: Sequence[str]) -> jax.Array:
        """Encoder rows [B, M, C] of a list of prompts; TypeError for a single text, ValueError for none.

        What ``check_words`` has to say about them is said.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts is the single text {prompts!r}; give a list of them: [{prompts!r}].")
        if not len(prompts):
            raise ValueError("there are no prompts; give one for each video.")
        self.check_words(prompts)
        return jnp.asarray(self.encoder(list(prompts)))

    def check_words(self, prompts: Sequence[str], *, empty: bool = True) -> None:
        """Warns on standard error of prompts that the network cannot follow: a line each, once.

        Words that no caption of its training has are named where the words are hashed and the run knows its captions;
        other encoders give every word a meaning.

        Args:
          prompts: that are asked for.
          empty: also warn of one without a word.
        """
        hashed, known = isinstance(self.encoder, HashWordEncoder), self.meta.get("words")
        wordless = [prompt for prompt in prompts if empty and not (words_of(prompt) if hashed else prompt.strip())]
        unknown = unknown_words(prompts, known, self.encoder.text_len) if hashed and known is not None else []
        found = [f"prompt {prompt!r} has no word: its video follows no caption" for prompt in wordless]
        if new := [word for word in unknown if word not in self.told]:
            found.append(never_seen(new))
        for warning in dict.fromkeys(found):
            if warning not in self.told:
                print(f"warning: {warning}.", file=sys.stderr)
        self.told |= {*found, *unknown}

    def streamer(self, steps: Any = None, context_sigma: Any = None) -> Streamer | CausalStreamer:
        """The student's streaming functions with this run's step plan.

        ``steps`` and ``context_sigma`` change it, see ``StepPlan.parse``.
        """
        if not self.is_student:
            raise UserError("a teacher makes whole videos and cannot stream; give a student's run", "directory")
        chosen, trained = self.settings.plan_with(steps, context_sigma), self.settings.plan
        chunks = max(len(chosen.sigmas), len(trained.sigmas))
        last = [plan.last_sigmas(chunks).tolist() for plan in (chosen, trained)]
        if self.model.cfg.context == "last_step_kv" and last[0] != last[1]:
            raise UserError(
                f"this student keeps the keys of its last denoising step and was trained for last noise levels "
                f"{last[1]}, not {last[0]}; sample it with the steps of its config",
                "steps",
            )
        return make_streamer(self.model, chosen)

    def teacher_sampler(
        self,
        *,
        solver: str | None = None,
        steps: int | None = None,
        shift: float | int | None = None,
        guidance: float | int | None = None,
        negative_prompt: str | None = None,
    ) -> TeacherSampler:
        """Returns the teacher's way of sampling: the run's own, except for what is given.

        Args:
          solver, steps, shift, guidance: as in ``TeacherSampler``; None for those of ``config.sample``.
          negative_prompt: of the unconditional branch; None for ``config.data.negative_prompt``.
        """
        own, negative = self.settings.sample, negative_prompt
        negative = self.settings.data.negative_prompt if negative is None else negative
        self.check_words([negative], empty=False)
        return TeacherSampler(
            self.model.cfg,
            self.params,
            jnp.asarray(self.encoder([negative])),
            solver=own.sampler if solver is None else solver,
            steps=own.steps if steps is None else steps,
            shift=own.shift if shift is None else shift,
            guidance=own.guidance if guidance is None else guidance,
        )

    def computing(self) -> "Run":
        """The same run with kernels in the dtype that they are used in, which changes nothing that is sampled."""
        return dataclasses.replace(self, params=compute_precision(self.params, self.settings.wan.dtype))

    def session(
        self,
        prompts: Sequence[str],
        *,
        seed: int | Key[Array, "*B"] = 0,
        steps: Any = None,
        context_sigma: Any = None,
        weights: str = "compute",
    ) -> Session:
        """Opens a stream of the student, one video per prompt.

        Where jax keeps no compiled programs yet, it does from here on, in the folder ``config.compile_cache``.

        Args:
          prompts: one for each video.
          seed: of the noise, as for ``Session``.
          steps, context_sigma: as for ``streamer``.
          weights: as for ``Session``. Several sessions share them if they are opened on ``computing()``.
        """
        if jax.config.jax_compilation_cache_dir is None:
            use_compile_cache(self.settings.compile_cache)
        streamer = self.streamer(steps, context_sigma)
        options = dict(latent_shape=self.latent_shape[1:], weights=weights)
        return Session(streamer, self.params, self.codec, self.text, prompts, seed=seed, **options)

    def sample_latents(
        self,
        prompts: Sequence[str],
        *,
        frames: int | None = None,
        steps: Any = None,
        seed: int | Key[Array, "*B"] = 0,
    ) -> Float32[np.ndarray, "B T H W C"]:
        """Returns latents of so many latent frames; the teacher denoises all together, the student streams them.

        Args:
          prompts: one for each video.
          frames: latent frames; None for as many as the run was trained on.
          steps: network evaluations of a teacher's video, or see ``streamer``; None for the run's own.
          seed: of the noise, as for ``Session``.
        """
        frames = frames or self.latent_shape[0]
        if not self.is_student:
            shape = (frames, *self.latent_shape[1:])
            return self.teacher_sampler(steps=steps).sample(self.text(prompts), shape, seed)
        chunks = self.model.chunks_of(frames)
        session = self.session(prompts, seed=seed, steps=steps)
        session.prepare(chunks, frames=False, switches=False)
        return np.concatenate([np.asarray(session.next_latents()) for _ in range(chunks)], axis=1)

    def sample_videos(self, prompts: Sequence[str], **options) -> UInt8[np.ndarray, "B T H W 3"]:
        """Returns decoded videos; options as for ``sample_latents``."""
        return self.codec.decode(self.sample_latents(prompts, **options))
