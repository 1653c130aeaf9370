"""Streaming of the causal student: one DiT, a ring of cached keys behind a sink (docs/method.md, section 4).

One step makes one chunk: it is denoised against [sink | ring | itself], then a clean pass (or its last denoising call,
``CausalConfig.context``) leaves its keys in the slot of the chunk that leaves the window. Size of the state and cost of
a step do not depend on how many frames came before.
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
from greedy_distill_jax.models.students.causal import CausalStudent
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
    given_chunk,
    kept,
    keys_of,
    list_of,
    made_again,
    make_chunk,
    ring_slot,
    split_key,
    warm_up,
    write_slot,
)


class CausalState(NamedTuple):
    """Everything a stream carries from chunk to chunk; batch-first where it depends on the video."""

    index: Int32[Array, ""]  # chunks made so far
    key: Noise  # one key, or one per video
    last: Float32[Array, "B g H W C"]  # the last chunk as it is kept, at its context level
    cache: KeyValue | None  # [layers, B, (sink + ring) * tokens, N, K]
    slots: Int32[Array, " slots"]  # [sink + ring]: which chunk each cache slot holds, -1 for none
    text: KeyValue  # [layers, B, M, N, K]
    frames: Float32[Array, "B T H W C"] | None  # T = ``cfg.recached_frames``, as kept: the ring's, or the last in order
    context_text: KeyValue | None = None  # the text of a clean pass with weights of its own

    AXES = MappingProxyType(
        {"last": Axes(0, 3), "cache": Axes(1, 2), "text": Axes(1), "frames": Axes(0, 3), "context_text": Axes(1)}
    )


class Unfinished(NamedTuple):
    """As ``etm_sdd.Unfinished``."""

    x0: Float32[Array, "B g H W C"]
    keys: KeyValue | None
    noise: Float32[Array, "B g H W C"] | None


class CausalStreamer:
    """``init``, ``step``, ``observe`` and ``switch_prompt`` of a causal student and one step plan."""

    def __init__(self, student: CausalStudent, plan: StepPlan, *, full: bool = False):
        """``full``: streams have made ``warm_up`` chunks before; as for ``Streamer``."""
        plan.check_context(student.cfg.context)
        self.student, self.plan, self.cfg, self.full = student, plan, student.cfg, full

    @property
    def warm_up(self) -> int:
        """As ``Streamer.warm_up``."""
        return warm_up(self.plan, self.cfg.sink_chunks + self.cfg.ring_chunks)

    def steady(self) -> "CausalStreamer":
        """As ``Streamer.steady``."""
        return CausalStreamer(self.student, self.plan, full=True)

    def init(
        self,
        params: Any,
        text_BMC: Float[Array, "B M D"],
        key: Noise,
        latent_shape: tuple[int, int, int],
    ) -> CausalState:
        """As ``Streamer.init``."""
        cfg, batch = self.cfg, text_BMC.shape[0]
        last = parallel.varying(jnp.zeros((batch, cfg.chunk, *latent_shape), jnp.float32))
        slots = cfg.sink_chunks + cfg.ring_chunks
        frames = parallel.varying(jnp.zeros((batch, cfg.recached_frames, *latent_shape), jnp.float32))
        return CausalState(
            index=jnp.int32(0),
            key=key,
            last=last,
            cache=self._empty(last, slots) if slots else None,
            slots=jnp.full((slots,), -1, jnp.int32),
            frames=frames if cfg.recached_frames else None,
            **self._project_text(params, text_BMC),
        )

    def _empty(self, x, chunks: int) -> KeyValue:
        base = self.cfg.base
        shape = (base.num_layers, len(x), chunks * self.student.chunk_tokens(x), base.num_heads, base.head_dim)
        return parallel.varying(KeyValue(*(jnp.zeros(shape, jnp.dtype(base.dtype)) for _ in KeyValue._fields)))

    def _project_text(self, params, text_BMC) -> dict[str, KeyValue]:
        """The state's fields of the text, once per network."""
        dit, student = self.student.dit(project_only=True), self.student
        networks = {"text": student.network(params)}
        if student.own_context:
            networks["context_text"] = student.network(params, context=True)
        return {
            name: dit.apply({"params": weights}, text_BMC, method="project").text for name, weights in networks.items()
        }

    def switch_prompt(self, params: Any, state: CausalState, text_BMC: Float[Array, "B M D"]) -> CausalState:
        """The same stream under new prompts: cached text is replaced, the visual history stays.

        With ``CausalConfig.recache`` keys are recomputed from frames as they are kept (with "last_step_kv" clean)
        under the new text, in one bidirectional pass, which costs a forward pass over these frames; the state holds
        their latents, at 1.3B, 480p and window 12 up to 4.8 MB beside 2.6 GB of keys. ``recache_of`` "ring": the
        ring's, which also see the sink, whose keys stay. "window": as LongLive does, whose cache holds one chunk more
        than later chunks see: all frames, the sink's included, of a video no longer than the window; then the ring's
        and that chunk's, beside the sink (``global_sink``), or the whole window's, whose first frames become the sink.
        (LongLive's frames are clean whatever ``context_noise`` says; ours are at the level they are kept at.)
        """
        state = self.with_text(params, state, text_BMC)
        return state if state.frames is None else self._recached(params, state)

    def with_text(self, params: Any, state: CausalState, text_BMC: Float[Array, "B M D"]) -> CausalState:
        """As ``Streamer.with_text``: also with ``recache`` the keys stay as they are."""
        return state._replace(**self._project_text(params, text_BMC))

    def _recached(self, params, state: CausalState) -> CausalState:
        cfg, sink, ring = self.cfg, self.cfg.sink_chunks, self.cfg.ring_chunks
        if cfg.recache_of == "ring":
            filled, chunks = self._filled(state), state.slots[sink:]
            own = self._again(params, state, chunks, state.frames, self._positions(state), filled, sink)
            return state._replace(cache=self._refilled(state.cache, own, jnp.arange(-sink, ring)))
        held = len(state.frames[0]) // cfg.chunk
        chunks = jnp.maximum(state.index - held, 0) + jnp.arange(held)
        chunks = jnp.where(chunks < state.index, chunks, -1)
        position = jnp.maximum(chunks - jnp.maximum(state.index - held, 0), 0)  # as the last chunk saw them
        position = chunks if cfg.rope_mode == "absolute" else position

        def whole(state):
            filled = jnp.clip(state.index, 1, held)
            own = self._again(params, state, chunks, state.frames, jnp.maximum(position, 0), filled, 0)
            slots = jnp.where(state.slots >= 0, state.slots.at[:sink].set(chunks[:sink]), -1)
            place = jnp.where(slots >= 0, slots - chunks[0], -1)
            return self._refilled(state.cache, own, place), slots

        def behind_the_sink(state):
            at = jnp.concatenate([self._positions(state)[:sink], position[sink:]])
            frames = state.frames[:, sink * cfg.chunk :]
            own = self._again(params, state, chunks[sink:], frames, at, held, sink)
            place = jnp.where(jnp.arange(sink + ring) < sink, -1, state.slots - chunks[sink])
            return self._refilled(state.cache, own, place), state.slots

        if cfg.global_sink and sink:
            cache, slots = jax.lax.cond(state.index <= held, whole, behind_the_sink, state)
        else:
            cache, slots = whole(state)
        return state._replace(cache=cache, slots=slots)

    def _again(self, params, state: CausalState, chunks, frames, positions, filled, sink: int) -> KeyValue:
        """Keys of ``frames``, the chunks of these numbers (-1 for none), at once: each sees the sink and all of them.

        ``positions`` of [sink | chunks], of which the first ``filled`` are there.
        """
        grid, tokens = grid_of(state.last, self.cfg.base), self.student.chunk_tokens(state.last)
        layout = patterns.causal_recache(self.cfg, tokens, sink, len(chunks))
        before = jax.tree.map(lambda c: c[:, :, : sink * tokens], state.cache) if sink else None
        return (
            self.student.dit(layout, with_head=False, emit=("own",))
            .apply(
                {"params": self.student.network(params, context=True)},
                frames,
                self._kept_sigma(chunks, len(frames)),
                rope_q=self.student.rope(positions[sink:], grid),
                rope_k=self.student.rope(positions, grid),
                lengths=jnp.broadcast_to(filled, (len(chunks),)),
                layer=Layer(cache=before, text=self._context_text(state)),
            )[1]
            .own
        )

    def _refilled(self, cache: KeyValue, own: KeyValue, place: Int32[Array, " slots"]) -> KeyValue:
        """The cache with chunk ``place`` of ``own`` in every slot, negative ones as they are."""

        def taken(cache, own):
            slots, chunks = (x.reshape(*x.shape[:2], -1, tokens, *x.shape[3:]) for x in (cache, own))
            new = jnp.take(chunks, jnp.maximum(place, 0), axis=2)
            return jnp.where((place >= 0)[:, None, None, None], new, slots).reshape(cache.shape)

        tokens = cache.k.shape[2] // len(place)
        return jax.tree.map(taken, cache, own)

    def _kept_sigma(self, chunks: Int32[Array, " chunks"], videos: int) -> Float32[Array, "B _"]:
        """Noise levels of the frames of these chunks, [B, chunks * g] or [B, 1]; those of none count as clean."""
        if self.plan.keeps_clean:
            return jnp.zeros((videos, 1), jnp.float32)
        sigma = jnp.where(chunks >= 0, self.plan.context_sigma(jnp.maximum(chunks, 0)), 0.0)
        return jnp.broadcast_to(jnp.repeat(sigma, self.cfg.chunk)[None], (videos, len(chunks) * self.cfg.chunk))

    def step(self, params: Any, state: CausalState) -> tuple[CausalState, Float32[Array, "B g H W C"]]:
        """Makes the next chunk: (new state, clean latents [B, g, H, W, C])."""
        state, chunk = self.make(params, state)
        return self.finish(params, state, chunk), chunk.x0

    def make(self, params: Any, state: CausalState) -> tuple[CausalState, Unfinished]:
        """As ``Streamer.make``."""
        state, chunk, _ = self._make(params, state, None, None)
        return state, chunk

    def finish(self, params: Any, state: CausalState, chunk: Unfinished) -> CausalState:
        """As ``Streamer.finish``."""
        x, own, noise = chunk
        return self._conclude(self._context_call(params, state), state, x, own, noise)

    def step_to(
        self,
        params: Any,
        state: CausalState,
        exits: PerList | None = None,
        record: PerList | None = None,
    ) -> tuple[CausalState, Made]:
        """As ``Streamer.step_to``."""
        state, chunk, made = self._make(params, state, exits, record)
        return self.finish(params, state, chunk), made

    def _make(self, params, state: CausalState, exits, record) -> tuple[CausalState, Unfinished, Made]:
        key, key_sample = split_key(state.key)
        call, shape = self._caller(self.student.network(params), state.text, state), state.last.shape
        own = self._empty(state.last, 1) if self._keeps_last(state) else None
        made, own = make_chunk(self.plan, call, self._list(state), shape, own, key_sample, exits, record)
        noise = context_noise(self.plan, state.index, key_sample, shape)
        return state._replace(key=key), Unfinished(made.x0, own, noise), made

    def observe(
        self, params: Any, state: CausalState, x0_BTHWC: Float32[Array, "B g H W C"]
    ) -> tuple[CausalState, Made]:
        """As ``Streamer.observe``."""
        key, key_sample = split_key(state.key)
        (call, context), last_kv = self._callers(params, state), self._keeps_last(state)
        made, own = given_chunk(self.plan, call, self._list(state), x0_BTHWC, key_sample, last_kv=last_kv)
        noise = context_noise(self.plan, state.index, key_sample, x0_BTHWC.shape)
        return self._conclude(context, state._replace(key=key), x0_BTHWC, own, noise), made

    def _keeps_last(self, state: CausalState) -> bool:
        return self.cfg.context == "last_step_kv" and state.cache is not None

    def replay(
        self,
        params: Any,
        state: CausalState,
        exit: Exit,
        keys: Exit | None,
        noise: Float32[Array, "B g H W C"] | None,
        grads: ContextGrad,
        frames: bool,
        x0: Float32[Array, "B g H W C"] | None = None,
    ) -> tuple[CausalState, Float32[Array, "B g H W C"]]:
        """As ``Streamer.replay``."""
        call, context = self._callers(params, state)
        x, seen, own = made_again(call, exit, keys, frames=frames, last_kv=self._keeps_last(state), x0=x0)
        return self._conclude(context, state, seen, own, noise, frozen=grads.sdd == "none"), x

    def retrace(
        self,
        params: Any,
        state: CausalState,
        x0: Float32[Array, "B g H W C"],
        keys: Exit | None,
        noise: Float32[Array, "B g H W C"] | None,
    ) -> CausalState:
        """As ``Streamer.retrace``."""
        call, context = self._callers(params, state)
        own = keys_of(call, keys) if self._keeps_last(state) else None
        return self._conclude(context, state, x0, own, noise)

    def _list(self, state: CausalState) -> ListNumber:
        return list_of(self.plan, state.index, full=self.full)

    def _filled(self, state: CausalState) -> Int32[Array, ""]:
        """How many slots hold a chunk; they fill from the first one on."""
        return jnp.minimum(state.index, len(state.slots))

    def _positions(self, state: CausalState) -> Int32[Array, " slots"]:
        """Positions at which the next chunk sees the slots; 0 for those that hold nothing yet."""
        slots, sink = state.slots, jnp.arange(self.cfg.sink_chunks, dtype=jnp.int32)
        if self.cfg.rope_mode == "relative":  # a sink stays in front, also one that a recache took from the window
            slots = jnp.where(slots >= 0, slots.at[: len(sink)].set(sink), -1)
        return jnp.where(slots >= 0, patterns.causal_positions(self.cfg, slots, state.index), 0)

    def _context_text(self, state: CausalState) -> KeyValue:
        return state.context_text if self.student.own_context else state.text

    def _callers(self, params, state: CausalState):
        """The calls for the next chunk, that of denoising and that of the clean pass; one with shared weights."""
        call = self._caller(self.student.network(params), state.text, state)
        return call, self._context_call(params, state) if self.student.own_context else call

    def _context_call(self, params, state: CausalState):
        return self._caller(self.student.network(params, context=True), self._context_text(state), state)

    def _caller(self, weights, text: KeyValue, state: CausalState):
        """A call for the next chunk with these weights: ``call(x, sigma, **module) -> (velocity, Emitted)``.

        What does not change between the calls of a chunk is made here.
        """
        cfg, student, i = self.cfg, self.student, state.index
        grid, tokens = grid_of(state.last, cfg.base), student.chunk_tokens(state.last)
        layout, cache = patterns.causal_step(cfg, tokens), state.cache
        if layout.rotate_at_use and cache is not None:
            cache = cache.rotated(student.rope(self._positions(state), grid))
        shared = dict(
            rope_q=student.rope(patterns.causal_positions(cfg, i[None], i), grid),
            lengths=None if self.full else 1 + self._filled(state)[None],
            layer=Layer(text=text, ready=() if cache is None else (cache,)),
        )

        def call(x, sigma, **module):
            sigma = jnp.broadcast_to(sigma, (len(x), 1))
            return student.dit(layout, **module).apply({"params": weights}, x, sigma, **shared)

        return call

    def _conclude(self, call, state: CausalState, x, own: KeyValue | None, noise, frozen: bool = False) -> CausalState:
        """The state after chunk ``x``: a pass over it as it is kept (or its last step's keys) goes into the cache."""
        last, sigma = kept(self.plan, state.index, x, noise)
        if state.cache is not None:
            if own is None:
                own = keys_of(call, Exit(last, sigma))
            state = self._remember(state, jax.lax.stop_gradient(own) if frozen else own, last)
        return state._replace(index=state.index + 1, last=last)

    def _remember(self, state: CausalState, own: KeyValue, x) -> CausalState:
        """Writes chunk ``state.index``: its keys into its slot, its latents beside them."""
        cfg, i = self.cfg, state.index
        slot, keep = ring_slot(i, cfg.sink_chunks, cfg.ring_chunks)
        state = state._replace(
            cache=jax.tree.map(lambda c, new: write_slot(c, new, slot, keep, axis=2), state.cache, own),
            slots=write_slot(state.slots, i[None], slot, keep, axis=0),
        )
        if state.frames is None:
            return state
        if cfg.recache_of == "window":
            held = len(state.frames[0]) // cfg.chunk
            frames = jnp.where(i < held, state.frames, jnp.roll(state.frames, -cfg.chunk, axis=1))
            return state._replace(frames=write_slot(frames, x, jnp.minimum(i, held - 1), axis=1))
        in_sink = i < cfg.sink_chunks
        place = jnp.where(in_sink, 0, slot - cfg.sink_chunks)
        return state._replace(frames=write_slot(state.frames, x, place, in_sink, axis=1))
