"""Streaming inference: ``init`` / ``step`` / ``switch_prompt``, pure functions with every cache in the state.

The plan and its loop serve every student; the streamer here is that of ETM + SDD, ``streaming.causal`` has the other.

One step makes one chunk: ETM reads the last chunk and gives z; SDD denoises the new chunk from frame 0, the last
frame and z; a clean pass (or one of its alternatives, ``StudentConfig.context``) leaves the keys the next chunk will
look at. What ETM reads and what that pass sees is the finished chunk at its context level (``StepPlan``). The state has
a fixed size, so does the cost: neither depends on how many frames came before.
"""

from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.distribution import parallel
from greedy_distill_jax.models.students import patterns
from greedy_distill_jax.models.students.base import ContextGrad
from greedy_distill_jax.models.students.config import StudentConfig
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.models.wan.dit import grid_of
from greedy_distill_jax.models.wan.layers import KeyValue, Layer
from greedy_distill_jax.streaming.loop import (
    Axes,
    Exit,
    Made,
    Noise,
    PerList,
    context_noise,
    denoise,
    given_chunk,
    kept,
    keys_of,
    last_sigma,
    made_again,
    make_chunk,
    ring_slot,
    split_key,
    write_slot,
)


class StreamState(NamedTuple):
    """Everything a stream carries from chunk to chunk; batch-first where it depends on the video."""

    index: Int32[Array, ""]  # chunks made so far
    key: Noise  # one key, or one per video
    last: Float32[Array, "B g H W C"]  # the last chunk as it is kept, at its context level
    etm_cache: KeyValue | None  # [layers, B, (sink + window - 1) * tokens, N, K]
    etm_slots: Int32[Array, " slots"]  # [sink + window - 1]: which slot each cache chunk holds, -1 for none
    etm_text: KeyValue  # [layers, B, M, N, K]
    sdd_cache: KeyValue  # [layers, B, 2 * tokens, N, K]: frame 0, previous frame
    sdd_text: KeyValue | None
    z: Float[Array, "B tokens D"] | None  # context "fused": ETM's of the last chunk, whose clean pass is pending
    clean: Float32[Array, "B g H W C"] | None = None  # the last chunk as ETM reads it, where that is not as it is kept
    sdd_context_text: KeyValue | None = None  # the text of a clean pass with weights of its own

    AXES = MappingProxyType(
        {
            "last": Axes(0, 3),
            "etm_cache": Axes(1, 2),
            "etm_text": Axes(1),
            "sdd_cache": Axes(1, 2),
            "sdd_text": Axes(1),
            "z": Axes(0, 1),
            "clean": Axes(0, 3),
            "sdd_context_text": Axes(1),
        }
    )


def _past(cfg: StudentConfig, i):
    """Whether chunk ``i`` sees frame 0 and, where that is another one, the previous chunk."""
    return (i >= 1) if cfg.anchor else (i == 1), i >= 2


class Streamer:
    """``init``, ``step``, ``observe`` and ``switch_prompt`` of ETM + SDD and one step plan."""

    def __init__(self, student: Student, plan: StepPlan):
        plan.check_context(student.cfg.context)
        self.student, self.plan, self.cfg = student, plan, student.cfg

    def init(
        self,
        params: Any,
        text_BMC: Float[Array, "B M D"],
        key: Noise,
        latent_shape: tuple[int, int, int],
    ) -> StreamState:
        """An empty stream for prompts [B, M, C] and latents (H, W, C), its noise from one key or a key per video."""
        cfg, base, batch = self.cfg, self.cfg.base, text_BMC.shape[0]
        last = parallel.varying(jnp.zeros((batch, cfg.chunk, *latent_shape), jnp.float32))
        tokens = self.student.chunk_tokens(last)
        slots = cfg.sink + cfg.window - 1

        def empty(layers, chunks):
            shape = (layers, batch, chunks * tokens, base.num_heads, base.head_dim)
            return parallel.varying(KeyValue(*(jnp.zeros(shape, jnp.dtype(base.dtype)) for _ in KeyValue._fields)))

        return StreamState(
            index=jnp.int32(0),
            key=key,
            last=last,
            etm_cache=empty(len(cfg.etm_layers), slots) if slots else None,
            etm_slots=jnp.full((slots,), -1, jnp.int32),
            sdd_cache=empty(len(cfg.sdd_layers), 2),
            **self._project_text(params, text_BMC),
            z=parallel.varying(jnp.zeros((batch, tokens, base.dim), jnp.float32)) if cfg.context == "fused" else None,
            clean=None if self.student.keeps_for_etm or self.plan.keeps_clean else last,
        )

    def switch_prompt(self, params: Any, state: StreamState, text_BMC: Float[Array, "B M D"]) -> StreamState:
        """The same stream under new prompts: cached text is replaced, the visual history stays."""
        return self.with_text(params, state, text_BMC)

    def with_text(self, params: Any, state: StreamState, text_BMC: Float[Array, "B M D"]) -> StreamState:
        """The state with nothing but its text projected anew."""
        return state._replace(**self._project_text(params, text_BMC))

    def _project_text(self, params, text_BMC) -> dict[str, KeyValue | None]:
        """The state's fields of every network's text."""
        etm, sdd = self.student.etm(project_only=True), self.student.sdd(project_only=True)
        out = {"etm_text": etm.apply({"params": params["etm"]}, text_BMC, method="project").text, "sdd_text": None}
        for name in () if self.cfg.fusion == "replace" else ("sdd", "sdd_context")[: 1 + self.student.own_context]:
            out[f"{name}_text"] = sdd.apply({"params": params[name]}, text_BMC, method="project").text
        return out

    def step(self, params: Any, state: StreamState) -> tuple[StreamState, Float32[Array, "B g H W C"]]:
        """Makes the next chunk: (new state, clean latents [B, g, H, W, C])."""
        if self.cfg.context != "fused":
            state, made = self.step_to(params, state)
            return state, made.x0
        key, key_sample = split_key(state.key)
        z, state = self._etm(params, state._replace(key=key))
        x, state = self._denoise_fused(params, state, z, key_sample)
        last, _ = kept(self.plan, state.index, x, context_noise(self.plan, state.index, key_sample, x.shape))
        return self._next(state._replace(z=z), last, x), x

    def step_to(
        self,
        params: Any,
        state: StreamState,
        exits: PerList | None = None,
        record: PerList | None = None,
    ) -> tuple[StreamState, Made]:
        """``step`` that leaves the step list early: the x0 predicted at step ``exits`` (per list) is the chunk.

        Training by self-rollout draws the exit at random (docs/method.md, section 7.1). Context mode "fused" has no
        such form; its numbers are those of "clean".

        Args:
          params, state: as for ``step``.
          exits: number of the last step, per list of the plan; without, the lists run to their ends.
          record: number of the step whose transition is recorded, per list, not behind the exit.
        """
        if self.cfg.context == "fused":
            raise ValueError(
                "step_to: context 'fused' leaves the pass over the last chunk to the next `step`; make the student "
                "with context 'clean', whose numbers are the same."
            )
        key, key_sample = split_key(state.key)
        z, state = self._etm(params, state._replace(key=key))
        call, context = self._callers(params, state, z)
        tokens, own = self.student.chunk_tokens(state.last), None
        if self.cfg.context == "last_step_kv":
            own = jax.tree.map(lambda c: jnp.zeros_like(c[:, :, :tokens]), state.sdd_cache)
        made, own = make_chunk(self.plan, call, state.index, state.last.shape, own, key_sample, exits, record)
        noise = context_noise(self.plan, state.index, key_sample, state.last.shape)
        return self._conclude(context, state, made.x0, own, noise), made

    def observe(
        self, params: Any, state: StreamState, x0_BTHWC: Float32[Array, "B g H W C"]
    ) -> tuple[StreamState, Made]:
        """Takes a given chunk for the next one, as if the stream had made it: an image or a video to go on from.

        Its exit is the chunk itself at level 0. In context mode "last_step_kv" its keys are those of the chunk noised
        to the level of its list's last step.
        """
        key, key_sample = split_key(state.key)
        state = state._replace(key=key)
        if self.cfg.context == "fused":
            state = self._clean_pass(params, state)
        z, state = self._etm(params, state)
        noise = context_noise(self.plan, state.index, key_sample, x0_BTHWC.shape)
        (call, context), last_kv = self._callers(params, state, z), self.cfg.context == "last_step_kv"
        made, own = given_chunk(self.plan, call, state.index, x0_BTHWC, key_sample, last_kv=last_kv)
        if self.cfg.context == "fused":
            last, _ = kept(self.plan, state.index, x0_BTHWC, noise)
            return self._next(state._replace(z=z), last, x0_BTHWC), made
        return self._conclude(context, state, x0_BTHWC, own, noise), made

    def _clean_pass(self, params, state: StreamState) -> StreamState:
        """The pass over the last chunk that context mode "fused" leaves pending, by itself."""
        _, call = self._callers(params, state._replace(index=state.index - 1), state.z)
        own = keys_of(call, Exit(state.last, last_sigma(self.plan, state.index)))
        cache = self._remember(state.sdd_cache, own, state.index == 1)
        made = state.index > 0
        return state._replace(
            sdd_cache=jax.tree.map(lambda new, old: jnp.where(made, new, old), cache, state.sdd_cache)
        )

    def replay(
        self,
        params: Any,
        state: StreamState,
        exit: Exit,
        keys: Exit | None,
        noise: Float32[Array, "B g H W C"] | None,
        grads: ContextGrad,
        frames: bool,
        x0: Float32[Array, "B g H W C"] | None = None,
    ) -> tuple[StreamState, Float32[Array, "B g H W C"]]:
        """The chunk of ``step_to`` again, from its exit: differentiable in ``params``.

        Args:
          params, state: as for ``step``.
          exit: input and noise level of the step that made the chunk.
          keys: ``loop.Made.keys``.
          noise: its ``loop.context_noise``.
          grads: what flows through the parameters that made the contexts.
          frames: gradients also flow through the generated frames that later chunks see.
          x0: the finished chunk, where ``exit`` is not the call that made it, see ``loop.made_again``.

        Returns:
          (new state, x0 [B, g, H, W, C]).
        """
        z, state = self._etm(params, state)
        z = z if grads.etm == "params" else jax.lax.stop_gradient(z)
        call, context = self._callers(params, state, z)
        x, seen, own = made_again(call, exit, keys, frames=frames, last_kv=self.cfg.context == "last_step_kv", x0=x0)
        return self._conclude(context, state, seen, own, noise, frozen=grads.sdd == "none"), x

    def retrace(
        self,
        params: Any,
        state: StreamState,
        x0: Float32[Array, "B g H W C"],
        keys: Exit | None,
        noise: Float32[Array, "B g H W C"] | None,
    ) -> StreamState:
        """The state after a finished chunk, as a stream with these parameters would have it; nothing is denoised.

        Args:
          params, state: as for ``step``.
          x0: the chunk.
          keys: context mode "last_step_kv": the call whose keys are kept; else None.
          noise: its ``loop.context_noise``.
        """
        z, state = self._etm(params, state)
        call, context = self._callers(params, state, z)
        own = None if keys is None else keys_of(call, keys)
        return self._conclude(context, state, x0, own, noise)

    def _conclude(self, call, state: StreamState, x, own: KeyValue | None, noise, frozen: bool = False) -> StreamState:
        """The state after chunk ``x``: a pass over it as it is kept (or its last step's keys) becomes the cache."""
        last, sigma = kept(self.plan, state.index, x, noise)
        if own is None:
            own = keys_of(call, Exit(last, sigma))
        own = jax.lax.stop_gradient(own) if frozen else own
        cache = self._remember(state.sdd_cache, own, state.index == 0)
        return self._next(state._replace(sdd_cache=cache), last, x)

    def _next(self, state: StreamState, last, x) -> StreamState:
        """The state once chunk ``x`` is finished and kept as ``last``."""
        return state._replace(index=state.index + 1, last=last, clean=None if state.clean is None else x)

    def _etm(self, params, state: StreamState):
        """z of the next chunk; the ring takes the new slot's keys and values."""
        cfg, j = self.cfg, state.index
        grid, tokens = grid_of(state.last, cfg.base), self.student.chunk_tokens(state.last)
        layout, ids = patterns.etm_step(cfg, tokens), state.etm_slots
        visible = jnp.concatenate([ids >= 0, jnp.ones(1, bool)])[None]
        if layout.rotate_at_use:
            # Only differences matter: the new slot sits at the end, a sink no further away than just before the ring.
            own = jnp.int32(cfg.sink + cfg.window - 1)
            distance = jnp.where(ids < cfg.sink, jnp.minimum(j - ids, own - ids), j - ids)
            key_position = jnp.concatenate([jnp.where(ids >= 0, own - distance, 0), own[None]])
            ropes = dict(rope_q=self.student.rope(own[None], grid), rope_k=self.student.rope(key_position, grid))
        else:
            ropes = dict(rope_q=self.student.rope(j[None], grid))
        previous, level = state.last, last_sigma(self.plan, j)
        if state.clean is not None:
            previous, level = state.clean, jnp.float32(0.0)
        sigma = jnp.broadcast_to(level, (state.last.shape[0], 1))
        z, emitted = self.student.etm(layout, emit=("own",)).apply(
            {"params": params["etm"]},
            previous,
            (j == 0)[None],
            sigma,
            visible=visible,
            layer=Layer(cache=state.etm_cache, text=state.etm_text),
            **ropes,
        )
        if state.etm_cache is None:
            return z, state
        slot, keep = ring_slot(j, cfg.sink, cfg.window - 1)
        cache = jax.tree.map(lambda c, own: write_slot(c, own, slot, keep, axis=2), state.etm_cache, emitted.own)
        return z, state._replace(etm_cache=cache, etm_slots=write_slot(ids, j[None], slot, keep, axis=0))

    def _project_z(self, weights, z, rope_z):
        sdd = self.student.sdd(project_only=True)
        if self.cfg.fusion not in ("selfkv", "xattn2", "replace"):
            return None
        return sdd.apply({"params": weights}, z_BSD=z, rope_z=rope_z, method="project").z

    def _callers(self, params, state: StreamState, z):
        """SDD's calls for the next chunk, that of denoising and that of the clean pass; one with shared weights."""
        call = self._caller(params["sdd"], state.sdd_text, state, z)
        if not self.student.own_context:
            return call, call
        return call, self._caller(params["sdd_context"], state.sdd_context_text, state, z)

    def _caller(self, weights, text: KeyValue | None, state: StreamState, z):
        """A call for the next chunk with SDD's weights: ``call(x, sigma, **module) -> (velocity, Emitted)``."""
        cfg, student, i = self.cfg, self.student, state.index
        grid, tokens = grid_of(state.last, cfg.base), student.chunk_tokens(state.last)
        layout = patterns.sdd_step(cfg, tokens)
        previous, current = patterns.sdd_positions(cfg, i)
        keys = jnp.stack([jnp.zeros_like(i), previous] + [current] * (len(layout.source) - 2))
        visible = jnp.stack([*_past(cfg, i)] + [i >= 0] * (len(layout.source) - 2))[None]
        ropes = student.z_ropes(1, 1, current[None], grid)
        layer = Layer(state.sdd_cache, text, self._project_z(weights, z, ropes.get("rope_z")))
        call_args = dict(
            rope_q=student.rope(current[None], grid),
            rope_k=student.rope(keys, grid),
            visible=visible,
            z_BSD=z,
            layer=layer,
            **ropes,
        )

        def call(x, sigma, **module):
            sigma = jnp.broadcast_to(sigma, (x.shape[0], 1))
            return student.sdd(layout, **module).apply({"params": weights}, x, sigma, **call_args)

        return call

    def _remember(self, cache: KeyValue, own: KeyValue, is_first) -> KeyValue:
        """Cache [frame 0 | previous] after the clean pass of a chunk."""

        def write(cache, own):
            tokens = own.shape[2]
            first = jnp.where(is_first, own, cache[:, :, :tokens])
            return jnp.concatenate([first, own], axis=2)

        return KeyValue(*(write(c, o) for c, o in zip(cache, own, strict=True)))

    def _denoise_fused(self, params, state: StreamState, z, key):
        """As ``denoise``, the pending clean pass of the last chunk riding along in the first call."""
        cfg, student, i = self.cfg, self.student, state.index
        grid, tokens = grid_of(state.last, cfg.base), student.chunk_tokens(state.last)
        layout = patterns.sdd_fused(cfg, tokens)
        before, last = patterns.sdd_positions(cfg, jnp.maximum(i - 1, 0))
        previous, current = patterns.sdd_positions(cfg, i)
        selfkv = cfg.fusion == "selfkv"
        zero, yes, no = jnp.zeros_like(i), i >= 0, i < 0
        keys = jnp.stack([zero, before, last, previous, current] + ([last, current] if selfkv else []))
        visible = jnp.stack(
            [
                jnp.stack([*_past(cfg, i - 1), yes, no, no] + ([yes, no] if selfkv else [])),
                jnp.stack([(i >= 2) & cfg.anchor, no, no, i >= 1, yes] + ([no, yes] if selfkv else [])),
            ]
        )
        own_position = jnp.stack([last, current])
        ropes = student.z_ropes(2, 2, own_position, grid)
        both_z = jnp.concatenate([state.z, z], axis=1)
        both_kv = self._project_z(params["sdd"], both_z, ropes.get("rope_z"))
        fresh: list[KeyValue] = []

        def first(x, sigma):
            own = jnp.concatenate([state.last, x], axis=1)
            levels = jnp.repeat(jnp.stack([last_sigma(self.plan, i), sigma]), cfg.chunk)
            v, emitted = student.sdd(layout, emit=("own",)).apply(
                {"params": params["sdd"]},
                own,
                jnp.broadcast_to(levels[None], own.shape[:2]),
                rope_q=student.rope(own_position, grid),
                rope_k=student.rope(keys, grid),
                visible=visible,
                z_BSD=both_z,
                layer=Layer(state.sdd_cache, state.sdd_text, both_kv),
                **ropes,
            )
            clean = jax.tree.map(lambda y: y[:, :, :tokens], emitted.own)
            cache = self._remember(state.sdd_cache, clean, i == 1)
            fresh.append(jax.tree.map(lambda new, old: jnp.where(i >= 1, new, old), cache, state.sdd_cache))
            return v[:, cfg.chunk :]

        step_layout = patterns.sdd_step(cfg, tokens)
        extra = len(step_layout.source) - 2
        z_ropes = student.z_ropes(1, 1, current[None], grid)
        z_kv = None if both_kv is None else jax.tree.map(lambda y: y[:, :, tokens:], both_kv)

        def velocity(x, sigma):
            return student.sdd(step_layout).apply(
                {"params": params["sdd"]},
                x,
                jnp.broadcast_to(sigma, (x.shape[0], 1)),
                rope_q=student.rope(current[None], grid),
                rope_k=student.rope(jnp.stack([zero, previous] + [current] * extra), grid),
                visible=jnp.stack([*_past(cfg, i)] + [yes] * extra)[None],
                z_BSD=z,
                layer=Layer(fresh[0], state.sdd_text, z_kv),
                **z_ropes,
            )

        made, _ = denoise(self.plan, velocity, i, state.last.shape, None, key, self.plan.ends, first=first)
        return made.x0, state._replace(sdd_cache=fresh[0])
