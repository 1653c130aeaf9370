"""Streaming inference: ``init`` / ``step`` / ``switch_prompt``, pure functions with every cache in the state.

The plan and its loop serve every student; the streamer here is that of ETM + SDD, ``streaming.causal`` has the other.

One step makes one chunk: ETM reads the last chunk and gives z; SDD denoises the new chunk from frame 0, the last
frame and z; a clean pass (or one of its alternatives, ``StudentConfig.context``) leaves the keys the next chunk will
look at. What ETM reads and what that pass sees is the finished chunk at its context level (``StepPlan``). The state has
a fixed size, so does the cost: neither depends on how many frames came before.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.distribution import parallel
from greedy_distill_jax.models.students import patterns
from greedy_distill_jax.models.students.base import ContextGrad
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.models.wan.dit import grid_of
from greedy_distill_jax.models.wan.layers import KeyValue, Layer
from greedy_distill_jax.streaming.loop import (
    Axes,
    Exit,
    ListNumber,
    Made,
    Noise,
    PerList,
    context_noise,
    denoise,
    given_chunk,
    kept,
    keys_of,
    last_sigma,
    list_of,
    made_again,
    make_chunk,
    ring_slot,
    split_key,
    warm_up,
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
    sdd_cache: KeyValue  # [layers, B, 2 * tokens, N, K]: frame 0, previous frame; without an anchor the latter alone
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


class Unfinished(NamedTuple):
    """A chunk before the pass that later ones need of it."""

    x0: Float32[Array, "B g H W C"]
    keys: KeyValue | None  # context "last_step_kv": the chunk's, which make that pass superfluous
    noise: Float32[Array, "B g H W C"] | None  # its ``context_noise``
    z: Float[Array, "B tokens D"]
    z_kv: KeyValue | None  # z's, for SDD's weights


class Streamer:
    """``init``, ``step``, ``observe`` and ``switch_prompt`` of ETM + SDD and one step plan."""

    def __init__(self, student: Student, plan: StepPlan, *, full: bool = False):
        """``full``: streams have made ``warm_up`` chunks before; see ``steady``."""
        plan.check_context(student.cfg.context)
        self.student, self.plan, self.cfg, self.full = student, plan, student.cfg, full

    @property
    def warm_up(self) -> int:
        """Chunks after which a stream's slots are full and its step list stays the same."""
        cfg = self.cfg
        # A pending clean pass is that of the chunk before, which has seen one chunk less.
        return warm_up(self.plan, max(cfg.sink + cfg.window - 1, 1 + cfg.anchor + (cfg.context == "fused")))

    def steady(self) -> "Streamer":
        """The same functions for streams that have made ``warm_up`` chunks: nothing is hidden, nothing checked."""
        return Streamer(self.student, self.plan, full=True)

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
            sdd_cache=empty(len(cfg.sdd_layers), 1 + cfg.anchor),
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
        state, chunk = self.make(params, state)
        return self.finish(params, state, chunk), chunk.x0

    def make(self, params: Any, state: StreamState) -> tuple[StreamState, Unfinished]:
        """The first part of ``step``: what ``finish`` takes. Nobody who waits for ``Unfinished.x0`` needs more."""
        if self.cfg.context != "fused":
            state, chunk, _ = self._make(params, state, None, None)
            return state, chunk
        key, key_sample = split_key(state.key)
        z, state = self._etm(params, state._replace(key=key))
        x, state = self._denoise_fused(params, state, z, key_sample)
        noise = context_noise(self.plan, state.index, key_sample, x.shape)
        return state, Unfinished(x, None, noise, z, None)

    def finish(self, params: Any, state: StreamState, chunk: Unfinished) -> StreamState:
        """The second part of ``step``: the pass over the finished chunk, whose keys later ones look at."""
        x, own, noise, z, z_kv = chunk
        if self.cfg.context == "fused":  # it is left to the next chunk's first call
            last, _ = kept(self.plan, state.index, x, noise)
            return self._next(state._replace(z=z), last, x)
        return self._conclude(self._context_call(params, state, z, z_kv), state, x, own, noise)

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
        state, chunk, made = self._make(params, state, exits, record)
        return self.finish(params, state, chunk), made

    def _make(self, params, state: StreamState, exits, record) -> tuple[StreamState, Unfinished, Made]:
        key, key_sample = split_key(state.key)
        z, state = self._etm(params, state._replace(key=key))
        z_kv = self._project_z(params["sdd"], state, z)
        call = self._call(params["sdd"], state.sdd_text, state, z, z_kv)
        tokens, own = self.student.chunk_tokens(state.last), None
        if self.cfg.context == "last_step_kv":
            own = jax.tree.map(lambda c: jnp.zeros_like(c[:, :, :tokens]), state.sdd_cache)
        made, own = make_chunk(self.plan, call, self._list(state), state.last.shape, own, key_sample, exits, record)
        noise = context_noise(self.plan, state.index, key_sample, state.last.shape)
        return state, Unfinished(made.x0, own, noise, z, z_kv), made

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
        made, own = given_chunk(self.plan, call, self._list(state), x0_BTHWC, key_sample, last_kv=last_kv)
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

    def _lengths(self, *filled) -> Int32[Array, " Q"] | None:
        """How many chunks every query chunk of a call sees; None once they are all."""
        return None if self.full else jnp.stack(filled)

    def _list(self, state: StreamState) -> ListNumber:
        return list_of(self.plan, state.index, full=self.full)

    def _etm(self, params, state: StreamState):
        """z of the next chunk; the ring takes the new slot's keys and values."""
        cfg, j = self.cfg, state.index
        grid, tokens = grid_of(state.last, cfg.base), self.student.chunk_tokens(state.last)
        layout, ids, own, cache = patterns.etm_step(cfg, tokens), state.etm_slots, j, state.etm_cache
        if layout.rotate_at_use:
            # Only differences matter: the new slot sits at the end, a sink no further away than just before the ring.
            own = jnp.int32(cfg.sink + cfg.window - 1)
            distance = jnp.where(ids < cfg.sink, jnp.minimum(j - ids, own - ids), j - ids)
            position = jnp.where(ids >= 0, own - distance, 0)
            cache = None if cache is None else cache.rotated(self.student.rope(position, grid))
        previous, level = state.last, last_sigma(self.plan, j)
        if state.clean is not None:
            previous, level = state.clean, jnp.float32(0.0)
        sigma = jnp.broadcast_to(level, (state.last.shape[0], 1))
        z, emitted = self.student.etm(layout, emit=("own",)).apply(
            {"params": params["etm"]},
            previous,
            (j == 0)[None],
            sigma,
            rope_q=self.student.rope(own[None], grid),
            lengths=self._lengths(1 + jnp.minimum(j, len(ids))),
            layer=Layer(text=state.etm_text, ready=() if cache is None else (cache,)),
        )
        if state.etm_cache is None:
            return z, state
        slot, keep = ring_slot(j, cfg.sink, cfg.window - 1)
        cache = jax.tree.map(lambda c, own: write_slot(c, own, slot, keep, axis=2), state.etm_cache, emitted.own)
        return z, state._replace(etm_cache=cache, etm_slots=write_slot(ids, j[None], slot, keep, axis=0))

    def _project_z(self, weights, state: StreamState, z) -> KeyValue | None:
        """Keys and values of the next chunk's z, for the fusions that attend to it."""
        _, current = patterns.sdd_positions(self.cfg, state.index)
        ropes = self.student.z_ropes(1, 1, current[None], grid_of(state.last, self.cfg.base), ready=True)
        return self._project(weights, z, ropes)

    def _project(self, weights, z, ropes) -> KeyValue | None:
        if self.cfg.fusion not in ("selfkv", "xattn2", "replace"):
            return None
        sdd = self.student.sdd(project_only=True)
        return sdd.apply({"params": weights}, z_BSD=z, rope_z=ropes.get("rope_z"), method="project").z

    def _past(self, cache: KeyValue, index, grid) -> KeyValue:
        """The cache as chunk ``index`` sees it: rotated once for all calls of the chunk."""
        if self.cfg.rope_mode == "absolute":
            return cache
        previous, _ = patterns.sdd_positions(self.cfg, index)
        positions = [jnp.zeros_like(previous), previous] if self.cfg.anchor else [previous]
        return cache.rotated(self.student.rope(jnp.stack(positions), grid))

    def _callers(self, params, state: StreamState, z):
        """SDD's calls for the next chunk, that of denoising and that of the clean pass; one with shared weights."""
        z_kv = self._project_z(params["sdd"], state, z)
        call = self._call(params["sdd"], state.sdd_text, state, z, z_kv)
        return call, self._context_call(params, state, z, z_kv) if self.student.own_context else call

    def _context_call(self, params, state: StreamState, z, z_kv: KeyValue | None):
        """The call of the clean pass; ``z_kv``: of the denoising weights, which are its own unless it has others."""
        if not self.student.own_context:
            return self._call(params["sdd"], state.sdd_text, state, z, z_kv)
        weights = params["sdd_context"]
        return self._call(weights, state.sdd_context_text, state, z, self._project_z(weights, state, z))

    def _call(self, weights, text: KeyValue | None, state: StreamState, z, z_kv: KeyValue | None):
        """A call for the next chunk with SDD's weights: ``call(x, sigma, **module) -> (velocity, Emitted)``.

        What does not change between the calls of a chunk is made here.
        """
        cfg, student, i = self.cfg, self.student, state.index
        grid, tokens = grid_of(state.last, cfg.base), student.chunk_tokens(state.last)
        _, current = patterns.sdd_positions(cfg, i)
        call_args = dict(
            rope_q=student.rope(current[None], grid),
            rope_zq=student.z_ropes(1, 1, current[None], grid).get("rope_zq"),
            lengths=self._lengths(patterns.sdd_filled(cfg, i)),
            **self._conditions(z, z_kv, text, self._past(state.sdd_cache, i, grid)),
        )

        def call(x, sigma, **module):
            sigma = jnp.broadcast_to(sigma, (x.shape[0], 1))
            layout = patterns.sdd_step(cfg, tokens)
            return student.sdd(layout, **module).apply({"params": weights}, x, sigma, **call_args)

        return call

    def _conditions(self, z, z_kv: KeyValue | None, text: KeyValue | None, past: KeyValue) -> dict[str, Any]:
        """What a call of SDD sees of z, of the text and of earlier chunks."""
        if self.cfg.fusion == "selfkv":
            return dict(layer=Layer(text=text, ready=(z_kv, past)))
        return dict(z_BSD=z, layer=Layer(text=text, z=z_kv, ready=(past,)))

    def _remember(self, cache: KeyValue, own: KeyValue, is_first) -> KeyValue:
        """Cache [frame 0 | previous] after the clean pass of a chunk."""

        def write(cache, own):
            if not self.cfg.anchor:
                return own
            if not self.full:
                cache = write_slot(cache, own, 0, ~is_first, axis=2)
            return write_slot(cache, own, 1, axis=2)

        return jax.tree.map(write, cache, own)

    def _denoise_fused(self, params, state: StreamState, z, key):
        """As ``denoise``, the pending clean pass of the last chunk riding along in the first call."""
        cfg, student, i = self.cfg, self.student, state.index
        grid, tokens = grid_of(state.last, cfg.base), student.chunk_tokens(state.last)
        before = jnp.maximum(i - 1, 0)
        (_, last), (previous, current) = patterns.sdd_positions(cfg, before), patterns.sdd_positions(cfg, i)
        own_position = jnp.stack([last, current])
        ropes = student.z_ropes(2, 2, own_position, grid, ready=True)
        both_z = jnp.concatenate([state.z, z], axis=1)
        both_kv = self._project(params["sdd"], both_z, ropes)
        fresh: list[tuple[KeyValue, Callable]] = []  # the cache that the first call leaves, the calls that follow

        def first(x, sigma):
            own = jnp.concatenate([state.last, x], axis=1)
            levels = jnp.repeat(jnp.stack([last_sigma(self.plan, i), sigma]), cfg.chunk)
            v, emitted = student.sdd(patterns.sdd_fused(cfg, tokens), emit=("own",)).apply(
                {"params": params["sdd"]},
                own,
                jnp.broadcast_to(levels[None], own.shape[:2]),
                rope_q=student.rope(own_position, grid),
                rope_k=student.rope(jnp.stack([last, previous, current]), grid),
                rope_zq=ropes.get("rope_zq"),
                lengths=self._lengths(*(patterns.sdd_filled(cfg, n) for n in (before, i))),
                **self._conditions(both_z, both_kv, state.sdd_text, self._past(state.sdd_cache, before, grid)),
            )
            clean = jax.tree.map(lambda y: y[:, :, :tokens], emitted.own)
            cache = self._remember(state.sdd_cache, clean, i == 1)
            if not self.full:
                cache = jax.tree.map(lambda new, old: jnp.where(i >= 1, new, old), cache, state.sdd_cache)
            z_kv = None if both_kv is None else jax.tree.map(lambda y: y[:, :, tokens:], both_kv)
            then = self._call(params["sdd"], state.sdd_text, state._replace(sdd_cache=cache), z, z_kv)
            fresh.append((cache, then))
            return v[:, cfg.chunk :]

        def velocity(x, sigma):
            return fresh[0][1](x, sigma)

        row, shape = self._list(state), state.last.shape
        made, _ = denoise(self.plan, velocity, row, shape, None, key, self.plan.ends, first=first)
        return made.x0, state._replace(sdd_cache=fresh[0][0])
