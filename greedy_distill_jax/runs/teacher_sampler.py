"""Whole videos of a teacher: its probability-flow ODE under classifier-free guidance, and what that costs in memory."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.diffusion import noise_levels, solvers
from greedy_distill_jax.diffusion.guidance import guided
from greedy_distill_jax.distribution.mesh import memory_bytes
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.streaming.loop import noise_keys
from greedy_distill_jax.streaming.timeline import Timeline


@dataclasses.dataclass(frozen=True)
class TeacherSampler:
    """A teacher and its way of sampling. Samplers of the same network and options share their compiled programs.

    Attributes:
      cfg: of the network.
      params: of the network.
      null: text rows [1, M, D] of the unconditional branch.
      solver: a name of ``diffusion.solvers``.
      steps: of the solver.
      shift: of its noise levels.
      guidance: scale of classifier-free guidance; 1 turns it off.
    """

    cfg: WanConfig
    params: Any
    null: Float[Array, "1 M D"]
    solver: str
    steps: int
    shift: float | int
    guidance: float | int

    def denoise(self, noise: Float[Array, "B T H W C"], text: Float[Array, "B M D"]) -> Float[Array, "B T H W C"]:
        """Returns the latents that the solver reaches from noise under text rows."""
        null = jnp.broadcast_to(self.null, text.shape)
        options = dict(solver=self.solver, steps=self.steps, shift=self.shift, guidance=self.guidance)
        return _solve(self.params, noise, text, null, cfg=self.cfg, **options)

    def sample(
        self,
        text: Float[Array, "B M D"],
        latent_shape: tuple[int, int, int, int],
        seed: int | Key[Array, "*B"] = 0,
    ) -> Float[np.ndarray, "B T H W C"]:
        """Returns latents of shape [T, H, W, C] for every row of text; ``seed`` as for ``Session``."""
        keys = noise_keys(seed, len(text))
        if keys.ndim:
            noise = jax.vmap(lambda key: jax.random.normal(key, latent_shape, jnp.float32))(keys)
        else:
            noise = jax.random.normal(keys, (len(text), *latent_shape), jnp.float32)
        return np.asarray(self.denoise(noise, text))

    def videos(
        self,
        codec: VideoCodec,
        text: Float[Array, "B M D"],
        frames: int,
        latent_shape: tuple[int, int, int],
        seed: int | Key[Array, "*B"] = 0,
    ) -> UInt8[np.ndarray, "B T H W 3"]:
        """Returns decoded videos of ``frames`` frames.

        Args:
          codec: turns latents into pixels.
          text: rows of the prompts.
          frames: of video, that the codec can make.
          latent_shape: [H, W, C] of a latent frame.
          seed: of the noise, as for ``Session``.

        Raises:
          UserError: a length (field "frames") that does not fit the codec or the memory of the device; the latter is
            said before anything is computed where it can be known.
        """
        shape = (Timeline(codec.temporal_stride).latent_frames(frames), *latent_shape)
        check_memory(self.cfg, shape, videos=len(text), frames=frames)
        try:
            return codec.decode(self.sample(text, shape, seed))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"{len(text)} times {frames} frames do not fit into the memory of the device; use fewer of either, or "
                "smaller videos",
                "frames",
            ) from error

    def trajectories(
        self, noise: Float[Array, "B T H W C"], text: Float[Array, "B M D"], kept: tuple[float, ...]
    ) -> tuple[Float[Array, "B T H W C"], Float[Array, "K B T H W C"]]:
        """Follows the ODE by Euler's method, whatever ``solver`` says.

        The levels are those of ``steps`` uniform steps under ``shift``, with ``kept`` in between.

        Args:
          noise: at level 1.
          text: rows of the prompts.
          kept: noise levels whose states are returned.

        Returns:
          (latents at level 0, states at the levels ``kept``).
        """
        levels = tuple(sorted({*noise_levels.uniform_steps(self.steps, self.shift), *kept}, reverse=True))
        null = jnp.broadcast_to(self.null, text.shape)
        return _follow(self.params, noise, text, null, cfg=self.cfg, levels=levels, kept=kept, guidance=self.guidance)


@functools.partial(jax.jit, static_argnames=("cfg", "solver", "steps", "shift", "guidance"))
def _solve(params, noise, text, null, *, cfg, solver, steps, shift, guidance):
    net = guided(functools.partial(Teacher(cfg), params), text, null, guidance)
    return solvers.solve(solver, net, noise, steps=steps, shift=shift)


@functools.partial(jax.jit, static_argnames=("cfg", "levels", "kept", "guidance"))
def _follow(params, noise, text, null, *, cfg, levels, kept, guidance):
    net = guided(functools.partial(Teacher(cfg), params), text, null, guidance)
    return solvers.euler_states(net, noise, levels, kept)


def least_bytes(cfg: WanConfig, latent_shape: tuple[int, int, int, int], videos: int) -> int:
    """Returns less than a teacher needs for videos of latents [T, H, W, C]: residual stream, one MLP, who sees whom."""
    frames, height, width, _ = latent_shape
    tokens = videos * frames * (height // cfg.patch) * (width // cfg.patch)
    return tokens * (4 * cfg.dim + {"bfloat16": 2, "float32": 4}[cfg.dtype] * cfg.ffn_dim) + 8 * frames**2


def check_memory(cfg: WanConfig, latent_shape: tuple[int, int, int, int], *, videos: int, frames: int) -> None:
    """Raises UserError (field "frames") when a teacher's videos cannot fit, before anything is computed.

    Args:
      cfg: of the network.
      latent_shape: [T, H, W, C] of a video.
      videos: made together.
      frames: of a video.
    """
    needed, memory = least_bytes(cfg, latent_shape, videos), memory_bytes()
    if memory and needed > memory:
        raise UserError(
            f"{frames} frames need more than {needed / 2**30:,.0f} GiB at this size, and there are "
            f"{memory / 2**30:,.0f}; use fewer, or stream with a student",
            "frames",
        )
