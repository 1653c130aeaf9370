"""A stream as the person who watches it has it: prompts, frames of video, and another prompt at any time."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Key, UInt8

from greedy_distill_jax.codecs.protocol import StreamDecoder, VideoCodec, on_host
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.distribution.compile_cache import compiled_ahead
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.models.wan.linear import compute_precision
from greedy_distill_jax.ops.attention import backends
from greedy_distill_jax.ops.attention.backends.record import Backend
from greedy_distill_jax.streaming.causal import CausalStreamer
from greedy_distill_jax.streaming.etm_sdd import Streamer
from greedy_distill_jax.streaming.loop import noise_keys
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.streaming.timeline import Timeline, check_switches

WEIGHTS = ("compute", "float32")  # dtypes of a stream's kernels


class Step(NamedTuple):
    """A chunk in two programs: whoever waits for the chunk need not wait for what later ones need of it.

    Attributes:
      make: ``(params, state) -> (state, chunk)``, of which ``chunk.x0`` are the latents [B, g, H, W, C].
      finish: ``(params, state, chunk) -> state``.
    """

    make: Callable[..., Any]
    finish: Callable[..., Any]

    def __call__(self, params: Any, state: Any) -> tuple[Any, Float32[Array, "B g H W C"]]:
        """Both: (state, latents)."""
        state, chunk = self.make(params, state)
        return self.finish(params, state, chunk), chunk.x0


class Programs(NamedTuple):
    """The compiled functions of a streamer; states are donated, so that a stream exists once in memory.

    Attributes:
      init: ``(params, text [B, M, D], key, latent shape (H, W, C)) -> state``.
      filling: the step of a stream's first ``warm_up`` chunks. It serves all others, too, only slower.
      steady: the step of all others: no slot is empty, nothing is hidden, and the number of denoising calls is fixed.
      switch_prompt: ``(params, state, text [B, M, D]) -> state``.
      observe: ``(params, state, x0 [B, g, H, W, C]) -> state``, a given chunk in place of the next one.
      warm_up: see ``Streamer.warm_up``.
    """

    init: Callable[..., Any]
    filling: Step
    steady: Step
    switch_prompt: Callable[..., Any]
    observe: Callable[..., Any]
    warm_up: int

    def step(self, made: int) -> Step:
        """The step of a stream that has made so many chunks."""
        return self.filling if made < self.warm_up else self.steady

    def prepare(
        self,
        params: Any,
        state: Any,
        text: Float[Array, "B M D"],
        first: int,
        end: int | None,
        switches: bool,
    ) -> None:
        """Compiles what a stream needs to come this far, nothing of which is run; see ``Session.prepare``.

        Args:
          params, state, text: of the stream.
          first: number of the first chunk that it will make, behind those that it is given.
          end: number of the first chunk that it will not come to; None for no end.
          switches: whether prompts may be switched on the way.
        """
        end = math.inf if end is None else end
        needed = {self.filling: first < min(end, self.warm_up), self.steady: end > max(first, self.warm_up)}
        for step in (step for step, needs in needed.items() if needs):
            made = compiled_ahead(step.make, params, state)
            compiled_ahead(step.finish, params, *made)
        if switches:
            compiled_ahead(self.switch_prompt, params, state, text)


def programs(streamer: Streamer | CausalStreamer) -> Programs:
    """Returns the jitted functions that all streams of the same student and the same step plan share.

    They are compiled once for every shape of text and latents, and again after a backend of the attention op was
    registered.
    """
    return _programs(streamer.cfg, streamer.plan, backends.BACKENDS)


@functools.lru_cache(maxsize=8)
def _programs(student_config, plan: StepPlan, chosen_from: tuple[Backend, ...]) -> Programs:
    del chosen_from  # of the key only
    streamer = make_streamer(make_student(student_config), plan)
    filling, steady = (
        Step(jax.jit(s.make, donate_argnums=1), jax.jit(s.finish, donate_argnums=1))
        for s in (streamer, streamer.steady())
    )
    init, switch = jax.jit(streamer.init, static_argnums=3), jax.jit(streamer.switch_prompt, donate_argnums=1)

    def observe(params, state, x0):
        return streamer.observe(params, state, x0)[0]

    return Programs(init, filling, steady, switch, jax.jit(observe, donate_argnums=1), streamer.warm_up)


class Session:
    """One stream of videos, a video per prompt, made chunk by chunk for as long as somebody asks.

    Memory and the cost of a chunk do not depend on how many were made. ``next_latents`` and ``next_frames`` compute
    nothing ahead: a new prompt holds from the next chunk on. They hand a chunk out before the pass that later ones need
    of it; the device does that pass while the chunk is looked at. Nothing is compiled in mid-stream: every program is
    ready before the first chunk is handed out, see ``prepare``. A session is read either as latents or as frames of
    video, because the decoder of a video has to see every chunk. It belongs to one thread.

    Attributes:
      state: what the stream remembers; every chunk and every new prompt replaces it, the old one is donated.
    """

    def __init__(
        self,
        streamer: Streamer | CausalStreamer,
        params: Any,
        codec: VideoCodec | None,
        text: Callable[[Sequence[str]], Float[Array, "B M D"]],
        prompts: Sequence[str],
        *,
        seed: int | Key[Array, "*B"] = 0,
        latent_shape: tuple[int, int, int],
        weights: str = "compute",
    ):
        """Opens the stream.

        Args:
          streamer: of the student and its step plan.
          params: of the student.
          codec: that makes video of its latents; None where only latents are asked for.
          text: the encoder of prompts.
          prompts: a list, one for each video.
          seed: of the noise. A number gives every prompt the video that it gives alone (to rounding: a program for
            another number of videos adds in another order), equal prompts the same one; for others see
            ``loop.noise_keys``.
          latent_shape: (H, W, C) of a latent frame.
          weights: how kernels are held while the stream is open, of ``WEIGHTS``: in the dtype that they are used in,
            which changes no frame, or as ``params`` has them.

        Raises:
          UserError: unknown ``weights``.
        """
        if weights not in WEIGHTS:
            raise UserError(f"weights {weights!r} are unknown; choose from {', '.join(WEIGHTS)}", "weights")
        params = compute_precision(params, streamer.cfg.base.dtype) if weights == "compute" else params
        self._programs, self._params, self._codec, self._text = programs(streamer), params, codec, text
        self._videos, self._chunk, self._decoder, self._made = len(prompts), streamer.cfg.chunk, None, 0
        self._ahead: list[Array] | None = None  # frames that ``play`` has started and nobody has seen
        self._given: list[Array] = []  # chunks that come before any that is made
        self._ready, self._as_latents = 0, False  # chunks that need no compiler; whether any was read as latents
        keys, self._rows = noise_keys(seed, len(prompts)), text(prompts)
        self.state = self._programs.init(params, self._rows, keys, tuple(latent_shape))

    def prepare(self, chunks: int | None = None, *, frames: bool = True, switches: bool = True) -> None:
        """Compiles, or reads from jax's compilation cache, what chunks to come need; nothing of it is run.

        A stream has a program while its slots fill and another for all later chunks, and a decoder has two. Whoever
        asks for a chunk that was not prepared gets all of them first, so that no later chunk waits for a compiler;
        who knows how short the stream will be saves the time of the others.

        Args:
          chunks: how many, those that are given already included; None for no end.
          frames: they are read as frames of video, not as latents.
          switches: prompts may be switched.
        """
        first, end = self._made + len(self._given), None if chunks is None else self._made + chunks
        self._programs.prepare(self._params, self.state, self._rows, first, end, switches)
        if frames and self._codec is not None:
            self._decoder = self._decoder or StreamDecoder(self._codec)
            self._decoder.prepare(self.state.last)
        self._ready = math.inf if end is None else max(end, self._ready)

    def switch_prompts(self, prompts: str | Sequence[str]) -> None:
        """Makes the next chunks follow other prompts: one for every video, or a single one for all of them.

        They hold from the next chunk on; before it is made, other prompts take their place.
        """
        prompts = [prompts] * self._videos if isinstance(prompts, str) else list(prompts)
        if len(prompts) != self._videos:
            raise ValueError(f"switch_prompts: {len(prompts)} prompts for {self._videos} videos; give one for each.")
        self.state = self._programs.switch_prompt(self._params, self.state, self._text(prompts))

    def give(self, latents: Float[Array | np.ndarray, "B T H W C"]) -> None:
        """Makes the next chunks be these: a first frame, the beginning of a video, or what somebody else made.

        They are handed out like chunks that the student makes, which go on behind them, and the frames of a video count
        them. Their keys are those of a finished chunk, or with context "last_step_kv" of one that is noised to the
        level of the last step.

        Args:
          latents: clean, whole chunks for every video.

        Raises:
          ValueError: another number of videos, another size, or frames that do not divide into chunks.
        """
        (videos, chunk, *size), shape = self.state.last.shape, tuple(latents.shape)
        if latents.ndim != 5 or shape[:1] + shape[2:] != (videos, *size) or not shape[1] or shape[1] % chunk:
            raise ValueError(
                f"give: latents of shape {shape}; give [{videos}, T, {', '.join(map(str, size))}] with T a multiple of "
                f"the student's chunk of {chunk} latent frames."
            )
        latents = jax.numpy.array(latents, jax.numpy.float32)  # a copy: whose array it is may write into it
        if self.state.last.committed:
            latents = jax.device_put(latents, self.state.last.sharding)
        self._given += jax.numpy.split(latents, shape[1] // chunk, axis=1)
        compiled_ahead(self._programs.observe, self._params, self.state, self._given[-1])

    def next_latents(self) -> Float32[Array, "B g H W C"]:
        """Makes the next chunk and returns its latents."""
        self._as_latents = True
        if self._made >= self._ready:
            self.prepare(frames=False)
        return self._next(lambda latents: latents)

    def _next(self, use: Callable[[Array], Any]) -> Any:
        """What ``use`` makes of the next chunk's latents, which the device does before the pass for later chunks."""
        if self._given:
            x0, self._made = self._given.pop(0), self._made + 1
            self.state = self._programs.observe(self._params, self.state, x0)
            return use(x0)
        step = self._programs.step(self._made)
        state, chunk = step.make(self._params, self.state)
        try:
            return use(chunk.x0)
        finally:
            self.state = step.finish(self._params, state, chunk)
            self._made += 1

    def next_frames(self) -> UInt8[np.ndarray, "B T H W 3"]:
        """Makes the next chunk and returns its frames of video.

        Raises:
          RuntimeError: chunks were read as latents before, which the decoder has not seen; or there is no codec.
        """
        return on_host(self._start_frames() if self._ahead is None else self._take())

    def _take(self) -> list[Array]:
        ahead, self._ahead = self._ahead, None
        return ahead

    def _start_frames(self) -> list[Array]:
        if self._codec is None:
            raise RuntimeError("the stream has no codec that makes video of its latents; read next_latents.")
        if self._as_latents:
            raise RuntimeError("next_frames after next_latents: the decoder missed chunks; read one or the other.")
        if self._decoder is None or self._made >= self._ready:
            self.prepare()
        return self._next(self._decoder.start)

    def play(self, frames: int, switches: Mapping[int, str] | None = None) -> Iterator[UInt8[np.ndarray, "B T H W 3"]]:
        """Returns an iterator over the frames of a video, chunk by chunk.

        While one chunk is looked at the device makes the next one: prompts that are switched by hand meanwhile hold
        from the chunk after that on. Who leaves the iterator early finds that chunk next, by ``next_frames`` or in
        another ``play``.

        Args:
          frames: of video, that fill whole chunks.
          switches: frame of video -> the prompt that all videos follow from there on, at the start of a chunk.

        Raises:
          UserError: a length (field "frames") or a switch (field "switches") that does not fit, before anything is
            made.
        """
        if self._codec is None:
            raise RuntimeError("the stream has no codec that makes video of its latents; read next_latents.")
        timeline, switches = Timeline(self._codec.temporal_stride, self._chunk), dict(switches or {})
        chunks = timeline.latent_frames(frames) // self._chunk
        check_switches(switches, frames)
        prompts = {timeline.latent_frames(f, "switches") // self._chunk: prompt for f, prompt in switches.items()}
        return self._play(chunks, prompts)

    def _play(self, chunks: int, prompts: Mapping[int, str]) -> Iterator[UInt8[np.ndarray, "B T H W 3"]]:
        begun = self._ahead is not None
        if self._decoder is None or self._made + chunks - begun > self._ready:
            self.prepare(chunks - begun)
        for chunk in range(begun, chunks):
            if chunk in prompts:
                self.switch_prompts(prompts[chunk])
            before, self._ahead = self._ahead, self._start_frames()
            if before is not None:
                yield on_host(before)
        yield on_host(self._take())
