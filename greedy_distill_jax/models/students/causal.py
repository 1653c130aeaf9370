"""The causal student: the Wan DiT itself under block-causal sliding-window attention.

Self-Forcing and LongLive are this model; its parameters are the teacher's, tree and names, so that a checkpoint of one
loads into the other. With ``CausalConfig.context_weights`` "own" they are ``{"dit": ..., "dit_context": ...}``, the
teacher's tree twice. The step-by-step form with caches is ``greedy_distill_jax.streaming.causal``.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from greedy_distill_jax.distribution import parallel
from greedy_distill_jax.models.students import patterns
from greedy_distill_jax.models.students.base import ContextGrad, History, StreamingModel, context_copy
from greedy_distill_jax.models.wan.dit import Dit, Teacher, grid_of
from greedy_distill_jax.models.wan.layers import Layer, Layout


class CausalStudent(StreamingModel):
    """Pure functions over the teacher's parameter tree and one ``CausalConfig``."""

    def dit(self, layout: Layout | None = None, **kwargs: Any) -> Dit:
        """The network with this call's layout."""
        return Dit(self.cfg.base, self.cfg.base.num_layers, self.differentiable(layout), **kwargs)

    def init(self, key: PRNGKeyArray, latent_shape: tuple[int, int, int, int]) -> Any:
        """Fresh parameters; ``latent_shape`` is (T, H, W, C)."""
        return self.with_context(Teacher(self.cfg.base).init(key, latent_shape))

    def with_context(self, params: Any) -> Any:
        """As ``Student.with_context``."""
        if not self.own_context or "dit_context" in params:
            return params
        return {"dit": params, "dit_context": context_copy(params)}

    def network(self, params: Any, *, context: bool = False) -> Any:
        """Parameters of the denoising network, or of the pass over finished chunks."""
        return params["dit_context" if context else "dit"] if self.own_context else params

    def from_teacher(self, key: PRNGKeyArray, teacher_params: Any, latent_shape: tuple[int, int, int, int]) -> Any:
        """The teacher's parameters as they are; the signature is that of ``Student.from_teacher``."""
        del key, latent_shape
        return self.with_context(jax.tree.map(jnp.asarray, teacher_params))

    def __call__(
        self,
        params: Any,
        x_BTHWC: Float[Array, "B F H W C"],
        sigma_BT: Float[Array, "B _"],
        text_BMC: Float[Array, "B M D"],
        history: History,
        grads: ContextGrad = ContextGrad(),  # noqa: B008
    ) -> Float[Array, "B F H W C"]:
        """Teacher-forced velocity: every noisy chunk sees the clean chunks of its window, in one parallel pass.

        Args:
          params: the teacher's tree, or twice with weights of the context pass's own.
          x_BTHWC: noisy latents [B, R * T, H, W, C]: R >= 1 noise draws of T frames share the clean half.
          sigma_BT: [B, R * T] or [B, 1].
          text_BMC: encoder rows.
          history: T frames (the last chunk is not used); ``sdd_frames`` take their place where given, as in context
            mode "last_step_kv".
          grads: whether parameters learn through the keys of the clean half (``sdd``; there is no ETM).

        Returns:
          velocity [B, R * T, H, W, C] float32.

        Raises:
          ValueError: frames that do not divide into chunks, or noisy frames that are no multiple of the history's.
        """
        call = functools.partial(self._velocity, grads=grads)
        return parallel.split_videos(call, params, x_BTHWC, sigma_BT, text_BMC, history, whole=1)

    def _velocity(self, params, x_BTHWC, sigma_BT, text_BMC, history: History, grads: ContextGrad):
        own, sigma = self.clean_and_noisy(x_BTHWC, sigma_BT, history)
        frames = history.frames_BTHWC.shape[1]
        chunks, tokens, draws = self.chunks_of(frames), self.chunk_tokens(x_BTHWC), x_BTHWC.shape[1] // frames
        grid = grid_of(x_BTHWC, self.cfg.base)

        def call(part, of, frozen, cache, **module):
            layout = patterns.causal_parallel(self.cfg, chunks, tokens, draws, frozen, part)
            weights = {"params": self.network(params, context=part == "clean")}
            ropes, layer = self.ropes(layout, grid), Layer(cache=cache)
            return self.dit(layout, **module).apply(weights, own[:, of], sigma[:, of], text_BMC, layer=layer, **ropes)

        return self.velocity(call, frames - self.cfg.chunk, grads)
