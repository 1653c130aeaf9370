"""The streaming student: ETM + SDD, their initialisation from the teacher and the teacher-forced parallel form.

Parameters are ``{"etm": ..., "sdd": ...}``, with ``StudentConfig.context_weights`` "own" also ``"sdd_context"``, those
of the pass over finished chunks. Step by step, with caches: ``greedy_distill_jax.streaming.etm_sdd``.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from greedy_distill_jax.distribution import parallel
from greedy_distill_jax.models.students import patterns
from greedy_distill_jax.models.students.base import ContextGrad, History, StreamingModel, context_copy
from greedy_distill_jax.models.students.etm import ETM
from greedy_distill_jax.models.wan.dit import Dit, grid_of
from greedy_distill_jax.models.wan.layers import Layer, Layout
from greedy_distill_jax.models.wan.rope import Rope


class Student(StreamingModel):
    """ETM + SDD of one ``StudentConfig``."""

    @property
    def keeps_for_etm(self) -> bool:
        """Whether ETM reads finished chunks as they are kept, at their noise level."""
        return self.cfg.etm_input == "kept"

    # The modules of one call; parameters do not depend on the layout.
    def etm(self, layout: Layout | None = None, **kwargs: Any) -> ETM:
        """The ETM module with this call's layout."""
        return ETM(self.cfg, self.differentiable(layout), **kwargs)

    def sdd(self, layout: Layout | None = None, **kwargs: Any) -> Dit:
        """The SDD module with this call's layout."""
        cfg = self.cfg
        layout = self.differentiable(layout)
        return Dit(cfg.base, len(cfg.sdd_layers), layout, fusion=cfg.fusion, z_gate_init=cfg.gate_init, **kwargs)

    def spatial_rope(self, chunks: int, grid: tuple[int, int]) -> Rope:
        """Positions inside the chunk only: aligns z with the own tokens (fusion "xattn2")."""
        return self.rope(np.zeros(chunks, np.int32), grid)

    def z_ropes(
        self,
        own: int,
        z_chunks: int,
        z_position_Q: Int[Array | np.ndarray, " Q"],
        grid: tuple[int, int],
        *,
        ready: bool = False,
    ) -> dict[str, Rope | None]:
        """``rope_z`` and ``rope_zq`` of a call with ``own`` chunks conditioned by ``z_chunks``.

        ``ready``: the keys of z are rotated where they are projected, for ``Layer.ready``, in every ``rope_mode``.
        """
        if self.cfg.fusion == "xattn2":
            return dict(rope_z=self.spatial_rope(z_chunks, grid), rope_zq=self.spatial_rope(own, grid))
        if self.cfg.fusion == "selfkv" and (ready or self.cfg.rope_mode == "absolute"):
            return dict(rope_z=self.rope(z_position_Q, grid))
        return {}

    def init(self, key: PRNGKeyArray, latent_shape: tuple[int, int, int, int]) -> Any:
        """Fresh parameters; ``latent_shape`` is (T, H, W, C) of a chunk or more."""
        key_etm, key_sdd = jax.random.split(key)
        cfg = self.cfg
        x = jnp.zeros((1, cfg.chunk, *latent_shape[1:]), jnp.float32)
        text = jnp.zeros((1, cfg.base.text_len, cfg.base.text_dim), jnp.float32)
        sigma, grid, tokens = jnp.ones((1, 1), jnp.float32), grid_of(x, cfg.base), self.chunk_tokens(x)
        zero = np.zeros(1, np.int32)
        rope = self.rope(zero, grid)
        etm = self.etm(Layout.full(1, tokens)).init(key_etm, x, jnp.ones(1, bool), sigma, text, rope_q=rope)
        z = jnp.zeros((1, tokens, cfg.base.dim), jnp.float32)
        keys = 2 if cfg.fusion == "selfkv" else 1
        sdd = self.sdd(Layout.full(1, tokens, keys, z_of=(0,))).init(
            key_sdd, x, sigma, text, rope_q=rope, z_BSD=z, **self.z_ropes(1, 1, zero, grid)
        )
        return self.with_context({"etm": etm["params"], "sdd": sdd["params"]})

    def with_context(self, params: Any) -> Any:
        """The parameters, with the context pass's own where the config wants them and there are none: SDD's, copied."""
        if not self.own_context or "sdd_context" in params:
            return params
        return {**params, "sdd_context": context_copy(params["sdd"])}

    def from_teacher(self, key: PRNGKeyArray, teacher_params: Any, latent_shape: tuple[int, int, int, int]) -> Any:
        """Student parameters cut from the teacher's (docs/method.md, section 3.5).

        Embeddings and head are copied, blocks picked by ``etm_layers`` / ``sdd_layers``; the projections of ETM's
        output start as copies of their block's self-attention k and v; everything else is new.
        """
        params = self.init(key, latent_shape)

        def fill(target, source):
            out = dict(target)
            for name, value in source.items():
                if name in out:
                    is_tree = isinstance(value, dict)  # converted teachers may be stored in bfloat16
                    out[name] = fill(out[name], value) if is_tree else jnp.asarray(value, out[name].dtype)
            return out

        def cut(target, layers):
            picked = jax.tree.map(lambda x: x[np.asarray(layers)], teacher_params["blocks"])
            for attention in ("self_attn", "cross_attn"):
                if "z_k" in target["blocks"][attention]:
                    own = picked["self_attn"]
                    extra = {"z_k": own["k"], "z_v": own["v"], "norm_z": own["norm_k"]}
                    picked = {**picked, attention: {**picked[attention], **extra}}
            return fill(target, {**teacher_params, "blocks": picked})

        etm, sdd = cut(params["etm"], self.cfg.etm_layers), cut(params["sdd"], self.cfg.sdd_layers)
        return self.with_context({"etm": etm, "sdd": sdd})

    def conditions(self, params: Any, history: History, text_BMC: Float[Array, "B M C"]) -> Float32[Array, "B S D"]:
        """ETM over a whole video: z [B, chunks * tokens, D] for every chunk (chunk i from chunks < i)."""
        frames = history.frames_BTHWC
        cfg, grid, tokens = self.cfg, grid_of(frames, self.cfg.base), self.chunk_tokens(frames)
        slots = self.chunks_of(frames.shape[1])
        layout = patterns.etm_parallel(cfg, slots, tokens)
        previous = jnp.pad(frames[:, : -cfg.chunk], ((0, 0), (cfg.chunk, 0)) + ((0, 0),) * 3)
        sigma = jnp.broadcast_to(history.sigma_BT, frames.shape[:2])[:, : -cfg.chunk]
        sigma = jnp.pad(sigma, ((0, 0), (cfg.chunk, 0)))
        first, ropes = jnp.arange(slots) == 0, self.ropes(layout, grid)
        z, _ = self.etm(layout).apply({"params": params["etm"]}, previous, first, sigma, text_BMC, **ropes)
        return z

    def __call__(
        self,
        params: Any,
        x_BTHWC: Float[Array, "B F H W C"],
        sigma_BT: Float[Array, "B _"],
        text_BMC: Float[Array, "B M D"],
        history: History,
        grads: ContextGrad = ContextGrad(),  # noqa: B008
    ) -> Float[Array, "B F H W C"]:
        """Teacher-forced velocity: every noisy chunk i sees the history before it, in one parallel pass.

        Args:
          params: {"etm", "sdd"}, and "sdd_context" with weights of the context pass's own.
          x_BTHWC: noisy latents [B, R * T, H, W, C]: R >= 1 noise draws of T frames share one ETM pass.
          sigma_BT: [B, R * T] or [B, 1].
          text_BMC: encoder rows.
          history: T frames (the last chunk is not used).
          grads: what flows through the parameters that read the history.

        Returns:
          velocity [B, R * T, H, W, C] float32.
        """
        call = functools.partial(self._velocity, grads=grads)
        return parallel.split_videos(call, params, x_BTHWC, sigma_BT, text_BMC, history, whole=1)

    def _velocity(self, params, x_BTHWC, sigma_BT, text_BMC, history: History, grads: ContextGrad):
        cfg, frames = self.cfg, history.frames_BTHWC.shape[1]
        grid, tokens, chunks = grid_of(x_BTHWC, cfg.base), self.chunk_tokens(x_BTHWC), self.chunks_of(frames)
        own, sigma = self.clean_and_noisy(x_BTHWC, sigma_BT, history)
        z = self.conditions(params, history, text_BMC)
        z = z if grads.etm == "params" else jax.lax.stop_gradient(z)
        draws = x_BTHWC.shape[1] // frames
        z_position = np.asarray([patterns.sdd_positions(cfg, i)[1] for i in range(chunks)])

        def call(part, of, frozen, cache, **module):
            layout = patterns.sdd_parallel(cfg, chunks, tokens, draws, frozen, part)
            ropes = self.ropes(layout, grid) | self.z_ropes(len(layout.own_position), chunks, z_position, grid)
            weights = {"params": params["sdd_context" if part == "clean" else "sdd"]}
            layer = Layer(cache=cache)
            return self.sdd(layout, **module).apply(
                weights, own[:, of], sigma[:, of], text_BMC, z_BSD=z, layer=layer, **ropes
            )

        return self.velocity(call, frames - cfg.chunk, grads)
