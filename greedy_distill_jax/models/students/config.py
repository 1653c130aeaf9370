"""Sizes and patterns of the streaming students made from a Wan2.1 DiT."""

import dataclasses

from greedy_distill_jax.models.wan.config import WanConfig, check_choice

FUSIONS: tuple[str, ...] = ("selfkv", "xattn2", "replace", "add", "concat", "adaln")

ROPE_MODES = ("clamped", "absolute", "fixed")

CONTEXT_MODES = ("clean", "last_step_kv", "fused")
RECACHES = ("ring", "window")  # whose keys a prompt switch recomputes
ETM_INPUTS = ("kept", "clean")

CONTEXT_WEIGHTS = ("shared", "own")


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """ETM + SDD (docs/method.md, section 3).

    etm_layers, sdd_layers: the teacher's blocks that each starts from, in order. chunk: latent frames generated
    together (g). window: ETM slots seen, the own one included. sink: first ETM slots that stay visible on top of the
    window. rope_mode: time positions of SDD's {frame 0, previous, current}:
    "clamped" below ``rope_frames`` (the length the teacher was trained at), "absolute", or "fixed" (0, 1, 2).
    ETM keeps absolute positions in mode "absolute" and window-relative ones otherwise. context: how the previous
    frame's keys come about: an extra "clean" pass, the "last_step_kv" of its own denoising, or a clean pass
    "fused" into the next frame's first call (one call fewer; the same numbers as "clean", except that after a prompt
    switch the pending clean pass already sees the new prompt).
    gate_init is the initial per-head weight of the second attention of fusion "xattn2". anchor: SDD sees frame 0 (the
    published system); without it a stream has nothing fixed to hold on to, and drifts. etm_input: where a step plan
    keeps finished chunks at a noise level, ETM reads them as they are "kept", or "clean". context_weights: the clean
    pass has SDD's weights ("shared") or a copy that learns for itself ("own", as in SGF+, arXiv 2610.10429).
    """

    base: WanConfig = dataclasses.field(default_factory=WanConfig)
    etm_layers: tuple[int, ...] = tuple(range(0, 30, 2))
    sdd_layers: tuple[int, ...] = tuple(range(1, 30, 2))
    fusion: str = "selfkv"
    chunk: int = 1
    window: int = 7
    sink: int = 0
    rope_mode: str = "clamped"
    rope_frames: int = 21
    context: str = "clean"
    gate_init: float = 0.1
    anchor: bool = True
    etm_input: str = "kept"
    context_weights: str = "shared"

    def __post_init__(self):
        check_choice(self, "fusion", FUSIONS)
        check_choice(self, "etm_input", ETM_INPUTS)
        check_choice(self, "rope_mode", ROPE_MODES)
        check_choice(self, "context", CONTEXT_MODES)
        _check_context_weights(self)
        for name in ("etm_layers", "sdd_layers"):
            layers = getattr(self, name)
            bad = [i for i in layers if not 0 <= i < self.base.num_layers]
            if bad or not layers:
                raise ValueError(
                    f"StudentConfig.{name} is {layers}; it needs at least one of the teacher's {self.base.num_layers} "
                    f"blocks, numbered from 0."
                )
        if self.chunk < 1 or self.window < 1 or self.sink < 0:
            raise ValueError(
                f"StudentConfig needs chunk >= 1, window >= 1, sink >= 0; got {self.chunk}, {self.window}, {self.sink}."
            )

    @property
    def max_previous(self) -> int:
        """Largest chunk position the previous chunk takes; the current one sits right after it."""
        if self.rope_mode == "fixed":
            return 1
        if self.rope_mode == "absolute":
            return 2**62
        return max(0, self.rope_frames // self.chunk - 2)


@dataclasses.dataclass(frozen=True)
class CausalConfig:
    """The Wan DiT with block-causal sliding-window attention: Self-Forcing, LongLive.

    chunk: latent frames made together. window, sink: in latent frames, multiples of ``chunk``; a chunk sees the first
    ``sink`` frames and the last ``window - sink`` ones, its own included (LongLive: 12 = 3 sink + 6 history + 3
    own). window 0 stands for ``max_frames``: the whole history of a video of that length (Self-Forcing: 21); of a
    longer one the oldest frames behind the sink fall out. rope_mode: "absolute" frame positions (keys cached rotated)
    or "relative": positions 0, 1, ... within the window (keys cached un-rotated, rotated at use), which keeps an
    endless stream among the positions of training. context: a chunk's keys come from an extra "clean" pass or are
    the "last_step_kv" of its own denoising. recache: a prompt switch recomputes keys under the new prompt, those
    ``recache_of`` the "ring" alone, or of the "window" (LongLive): one chunk more, which the ring's see though no later
    one does, and while the video is no longer than the window the sink's. global_sink: LongLive's option of that name:
    later the sink keeps the keys of the first prompt; without it, the oldest frames of the window become the sink.
    context_weights: as in ``StudentConfig``.
    """

    base: WanConfig = dataclasses.field(default_factory=WanConfig)
    chunk: int = 3
    window: int = 12
    sink: int = 3
    max_frames: int = 21
    rope_mode: str = "absolute"
    context: str = "clean"
    recache: bool = False
    recache_of: str = "ring"
    global_sink: bool = True
    context_weights: str = "shared"

    def __post_init__(self):
        check_choice(self, "rope_mode", ("absolute", "relative"))
        check_choice(self, "recache_of", RECACHES)
        check_choice(self, "context", ("clean", "last_step_kv"))
        _check_context_weights(self)
        if self.chunk < 1 or self.sink < 0:
            raise ValueError(f"CausalConfig needs chunk >= 1 and sink >= 0; got {self.chunk} and {self.sink}.")
        name = "window" if self.window else "max_frames"
        frames = getattr(self, name)
        for field, value in ((name, frames), ("sink", self.sink)):
            if value % self.chunk:
                raise ValueError(
                    f"CausalConfig.{field} is {value} latent frames, which do not divide into chunks of {self.chunk}; "
                    f"use a multiple of {self.chunk}."
                )
        if self.recache_of != "ring" and not self.recache:
            raise ValueError(
                f"CausalConfig.recache_of is {self.recache_of!r}, but recache is False, so that a prompt switch "
                f"recomputes nothing; set recache to True, or leave recache_of at 'ring'."
            )
        if not self.global_sink and self.recache_of != "window":
            raise ValueError(
                f"CausalConfig.global_sink is False, but recache_of {self.recache_of!r} leaves the sink alone; use "
                f"recache_of 'window', or leave it at True."
            )
        if frames < self.sink + self.chunk:
            raise ValueError(
                f"CausalConfig.{name} is {frames}; it holds the sink of {self.sink} frames and the own chunk of "
                f"{self.chunk}, so it needs at least {self.sink + self.chunk}."
            )

    @property
    def recached_frames(self) -> int:
        """Latent frames that a stream holds for a recache."""
        chunks = {"ring": self.ring_chunks, "window": self.sink_chunks + self.ring_chunks + 1}[self.recache_of]
        return chunks * self.chunk if self.recache and self.sink_chunks + self.ring_chunks else 0

    @property
    def sink_chunks(self) -> int:
        """First chunks that stay visible."""
        return self.sink // self.chunk

    @property
    def ring_chunks(self) -> int:
        """Chunks of sliding history, neither sink nor own."""
        return ((self.window or self.max_frames) - self.sink) // self.chunk - 1


def _check_context_weights(cfg: StudentConfig | CausalConfig) -> None:
    check_choice(cfg, "context_weights", CONTEXT_WEIGHTS)
    if cfg.context_weights == "own" and cfg.context != "clean":
        raise ValueError(
            f"{type(cfg).__name__}.context_weights is 'own', but context {cfg.context!r} makes no call of its own for "
            f"a finished chunk; use context 'clean', or context_weights 'shared'."
        )


def split_layers(split: str, num_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Named layer splits (docs/method.md, section 3.5) -> (ETM's teacher blocks, SDD's teacher blocks).

    "interleaved" (even, odd), "quality" (1:2), "cheap" (2:1), "copies" (both whole), "contiguous" (the halves),
    "shallow_etm" (ETM = the first half, SDD = all: best at tiny size); or explicit "0,1/0,1,2,3".
    """
    every = tuple(range(num_layers))

    def spread(count: int) -> tuple[int, ...]:
        return tuple(round(i * (num_layers - 1) / max(1, count - 1)) for i in range(count))

    third, half = max(1, num_layers // 3), max(1, num_layers // 2)
    named = {
        "interleaved": (every[0::2], every[1::2]),
        "quality": (spread(third), spread(2 * third)),
        "cheap": (spread(2 * third), spread(third)),
        "copies": (every, every),
        "contiguous": (every[:half], every[half:]),
        "shallow_etm": (every[:half], every),
    }
    if split in named:
        return named[split]
    try:
        etm, sdd = split.split("/")
        return tuple(int(i) for i in etm.split(",")), tuple(int(i) for i in sdd.split(","))
    except ValueError:
        raise ValueError(
            f"split {split!r} is neither one of {', '.join(named)} nor of the form '0,1/0,1,2,3' "
            f"(ETM's teacher blocks / SDD's)."
        ) from None
