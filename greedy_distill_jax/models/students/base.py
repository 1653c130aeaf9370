"""What every streaming student shares: its history, the stop-gradients of its contexts, its chunks and positions."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from greedy_distill_jax.models.students import patterns
from greedy_distill_jax.models.students.config import CausalConfig, StudentConfig
from greedy_distill_jax.models.wan.dit import grid_of
from greedy_distill_jax.models.wan.layers import Layout
from greedy_distill_jax.models.wan.rope import Rope, rope_table


class History(NamedTuple):
    """Frames a student looks back on, with their noise levels.

    ``frames`` feed ETM and, unless ``sdd_frames`` is given, SDD's keys of frame 0 and the previous frame.
    ``sdd_frames`` differ in context mode "last_step_kv", where keys come from the last denoising input.
    """

    frames_BTHWC: Float[Array, "B T H W C"]
    sigma_BT: Float[Array, "#B _"]  # one per frame, or one for all; likewise below
    sdd_frames_BTHWC: Float[Array, "B T H W C"] | None = None
    sdd_sigma_BT: Float[Array, "#B _"] | None = None

    def read_clean(self, frames_BTHWC: Float[Array, "B T H W C"]) -> "History":
        """The same for SDD's keys, while ETM reads the clean frames."""
        clean = jnp.zeros((len(frames_BTHWC), 1), jnp.float32)
        return History(frames_BTHWC, clean, self.frames_BTHWC, self.sigma_BT)


class ContextGrad(NamedTuple):
    """Which parameters learn through the contexts of a chunk (docs/method.md, section 7.2).

    etm: "params", or "none": z is stop-gradient. sdd: "params", or "none": the keys and values of SDD's pass over
    earlier chunks are stop-gradient.
    """

    etm: str = "params"
    sdd: str = "params"


def context_copy(network: Any) -> Any:
    """First parameters of the pass that only writes keys: copies of the denoising network's, without the head."""
    return jax.tree.map(jnp.copy, {name: leaves for name, leaves in network.items() if name != "head"})


class StreamingModel:
    """What makes a video chunk by chunk: pure functions over the parameters of one frozen config.

    Subclasses add ``init``, ``from_teacher``, ``with_context`` and the teacher-forced ``__call__`` with the signatures
    of ``Student``; ``cfg`` has at least ``base``, ``chunk``, ``context`` and ``context_weights``. ``derivative``: as
    for ``Teacher``. ``keeps_for_etm``: no ETM reads finished chunks otherwise than they are kept.
    """

    keeps_for_etm = True

    def __init__(self, cfg: StudentConfig | CausalConfig, derivative: str = "vjp"):
        self.cfg = dataclasses.replace(cfg, base=cfg.base.differentiated(derivative))
        self.derivative = derivative

    @property
    def own_context(self) -> bool:
        """Whether the pass over finished chunks has parameters of its own."""
        return self.cfg.context_weights == "own"

    def differentiable(self, layout: Layout | None) -> Layout | None:
        """The layout for this model's way of differentiation."""
        return layout and dataclasses.replace(layout, derivative=self.derivative)

    def chunk_tokens(self, x_BTHWC: Float[Array, "B T H W C"]) -> int:
        """Tokens of one chunk of the given latents."""
        grid = grid_of(x_BTHWC, self.cfg.base)
        return grid[0] * grid[1] * self.cfg.chunk

    def chunks_of(self, frames: int) -> int:
        """Number of chunks in ``frames`` latent frames."""
        if frames < 1 or frames % self.cfg.chunk:
            raise ValueError(
                f"{frames} latent frames do not divide into chunks of {self.cfg.chunk}; "
                f"use a multiple of {self.cfg.chunk} or another chunk size."
            )
        return frames // self.cfg.chunk

    def rope(self, position_Q: Int[Array | np.ndarray, " Q"], grid: tuple[int, int]) -> Rope:
        """Rotation of the tokens of chunks at the given chunk positions."""
        return rope_table(patterns.frames_at(position_Q, self.cfg.chunk), grid, self.cfg.base.head_dim)

    def ropes(self, layout: Layout, grid: tuple[int, int]) -> dict[str, Rope]:
        """``rope_q`` and ``rope_k`` of a call whose positions are static."""
        own, keys = (np.asarray(position) for position in (layout.own_position, layout.key_position))
        return dict(rope_q=self.rope(own, grid), rope_k=self.rope(keys, grid))

    def velocity(self, call: Callable, seen: int, grads: ContextGrad) -> Float[Array, "B F H W C"]:
        """Velocity of the noisy frames of a teacher-forced call, in one pass or with the context pass by itself.

        Args:
          call: ``call(part, frames, frozen, cache, **module) -> (velocity, Emitted)``: the part of ``patterns.PARTS``,
            the own frames it has, whether the clean chunks' keys are stop-gradient, and keys of earlier calls.
          seen: clean frames among the own ones.
          grads: ``sdd`` says what flows through the clean chunks' keys.
        """
        frozen = grads.sdd == "none"
        if not self.own_context:
            return call("both", slice(None), frozen, None)[0][:, seen:]
        keys = None
        if seen:
            keys = call("clean", slice(seen), False, None, with_head=False, emit=("own",))[1].own
            keys = jax.lax.stop_gradient(keys) if frozen else keys
        return call("noisy", slice(seen, None), False, keys)[0]

    def clean_and_noisy(
        self, x_BTHWC: Float[Array, "B F H W C"], sigma_BT: Float[Array, "B _"], history: History
    ) -> tuple[Float32[Array, "B T H W C"], Float[Array, "B T"]]:
        """The own chunks of a teacher-forced call and their noise levels, [history without its last chunk | x]."""
        frames = history.frames_BTHWC.shape[1]
        if x_BTHWC.shape[1] % frames:
            raise ValueError(f"{x_BTHWC.shape[1]} noisy frames are not a multiple of the {frames} history frames.")
        seen = frames - self.cfg.chunk
        clean = history.frames_BTHWC if history.sdd_frames_BTHWC is None else history.sdd_frames_BTHWC
        clean_sigma = history.sigma_BT if history.sdd_sigma_BT is None else history.sdd_sigma_BT
        clean_sigma = jnp.broadcast_to(clean_sigma, clean.shape[:2])[:, :seen]
        own = jnp.concatenate([clean[:, :seen].astype(jnp.float32), x_BTHWC.astype(jnp.float32)], axis=1)
        return own, jnp.concatenate([clean_sigma, jnp.broadcast_to(sigma_BT, x_BTHWC.shape[:2])], axis=1)
