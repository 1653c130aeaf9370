"""Streaming inference: ``init`` / ``step`` / ``switch_prompt``, pure functions with every cache in the state.

Sampling and its loop serve every student; the streamer here is that of ETM + SDD, ``stream_causal`` has the other.

One step makes one chunk: ETM reads the last chunk and gives z; SDD denoises the new chunk from frame 0, the last
frame and z; a clean pass (or one of its alternatives, ``StudentConfig.context``) leaves the keys the next chunk will
look at. The state has a fixed size, so does the cost: neither depends on how many frames came before.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from greedy_distill_jax import parallel
from greedy_distill_jax.models import layouts
from greedy_distill_jax.models.dit import grid_of
from greedy_distill_jax.models.layers import KeyValue, Layer
from greedy_distill_jax.models.student import ContextGrad, Student
from greedy_distill_jax.models.wan_config import StudentConfig

SAMPLERS = ("euler", "renoise")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a chunk is denoised.

    sigmas: per chunk a decreasing list of noise levels starting at 1; chunk i uses list min(i, last). The first
      list may be longer: chunk 0 has no history and is the hardest (METHOD_SPEC D).
    sampler: "euler" follows the flow ODE; "renoise" predicts x0 and adds fresh noise (few-step students).
    """

    sigmas: tuple[tuple[float, ...], ...]
    sampler: str = "euler"

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise ValueError(f"Sampling.sampler is {self.sampler!r}; choose from {', '.join(SAMPLERS)}.")
        for row in self.sigmas:
            if not row or any(a <= b for a, b in itertools.pairwise(row)) or row[-1] <= 0 or row[0] > 1:
                raise ValueError(f"Sampling.sigmas must decrease within (0, 1], got {row}.")

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """(sigmas [lists, longest + 1] ending in zeros, number of steps [lists])."""
        longest = max(map(len, self.sigmas))
        table = np.zeros((len(self.sigmas), longest + 1), np.float32)
        for i, row in enumerate(self.sigmas):
            table[i, : len(row)] = row
        return table, np.asarray([len(row) for row in self.sigmas], np.int32)

    @property
    def ends(self) -> np.ndarray:
        """Number of the last step of every list."""
        return self.tables()[1] - 1


class StreamState(NamedTuple):
    """Everything a stream carries from chunk to chunk; batch-first where it depends on the video."""

    index: jax.Array  # int32: chunks made so far
    key: jax.Array
    last: jax.Array  # [B, g, H, W, C] the last chunk, clean
    etm_cache: KeyValue | None  # [layers, B, (sink + window - 1) * tokens, N, K]
    etm_slots: jax.Array  # int32 [sink + window - 1]: which slot each cache chunk holds, -1 for none
    etm_text: KeyValue
    sdd_cache: KeyValue  # [layers, B, 2 * tokens, N, K]: frame 0, previous frame
    sdd_text: KeyValue | None
    z: jax.Array | None  # context "fused": ETM's output for the last chunk, whose clean pass is pending


class Exit(NamedTuple):
    """The denoising call whose x0 became a chunk."""

    x: jax.Array  # [B, g, H, W, C] its input
    sigma: jax.Array  # scalar, its noise level


def _past(cfg: StudentConfig, i):
    """Whether chunk ``i`` sees frame 0 and, where that is another one, the previous chunk."""
    return (i >= 1) if cfg.anchor else (i == 1), i >= 2


def initial_noise(key, shape) -> jax.Array:
    """The noise a chunk starts from, given the key of its step."""
    return parallel.normal(jax.random.fold_in(key, 0), shape)


def denoise(sampling: Sampling, velocity, index, shape, own, key, exits, first=None):
    """Runs the step list of chunk ``index`` up to its exit, the loop of every student.

    Args:
      sampling: step lists and sampler.
      velocity: ``velocity(x, sigma) -> (v, Emitted)``.
      index: int32, which chunk this is.
      shape: of the chunk, [B, g, H, W, C].
      own: keys and values of the right shapes, replaced by those that the last call emits; None to drop them.
      key: of the chunk's noise.
      exits: number of the last step, per list; ``Sampling.ends`` runs them whole.
      first: ``first(x, sigma) -> v`` in place of the first call.

    Returns:
      (x0, own, the last call).
    """
    table, _ = sampling.tables()
    row = jnp.minimum(index, len(table) - 1)
    sigmas, last = jnp.asarray(table)[row], jnp.asarray(exits, jnp.int32)[row]
    x = initial_noise(key, shape)

    def update(n, x, v):
        sigma, after = sigmas[n], sigmas[n + 1]
        x0 = x - sigma * v
        if sampling.sampler == "euler":
            between = x + (after - sigma) * v
        else:
            noise = parallel.normal(jax.random.fold_in(key, n + 1), x.shape)
            between = (1.0 - after) * x0 + after * noise
        return jnp.where(n == last, x0, between)

    def body(n, carry):
        x, own, _ = carry
        v, emitted = velocity(x, sigmas[n])
        return update(n, x, v), emitted.own if own is not None else None, x

    start, entered = 0, x
    if first is not None:
        x, start = update(0, x, first(x, sigmas[0])), 1
    x, own, entered = jax.lax.fori_loop(start, last + 1, body, (x, own, entered))
    return x, own, Exit(entered, sigmas[last])


def ring_slot(index, sink: int, ring: int) -> tuple[jax.Array, jax.Array]:
    """(slot chunk ``index`` goes to, whether to leave it as it is): the sink's slots first, then the oldest's."""
    behind_sink = index - sink
    keep = (behind_sink >= 0) & (ring == 0)  # a full sink without a ring: nothing to write
    slot = jnp.where(behind_sink < 0, index, sink + behind_sink % max(ring, 1))
    return jnp.where(keep, 0, slot), keep


def write_slot(buffer, new, slot, keep, *, axis: int):
    """``buffer`` with its ``slot``-th stretch of the size of ``new`` replaced along ``axis``, unless ``keep``."""
    size = new.shape[axis]
    old = jax.lax.dynamic_slice_in_dim(buffer, slot * size, size, axis)
    return jax.lax.dynamic_update_slice_in_dim(buffer, jnp.where(keep, old, new), slot * size, axis)


class Streamer:
    """``init``, ``step`` and ``switch_prompt`` of ETM + SDD and one way of sampling."""

    def __init__(self, student: Student, sampling: Sampling):
        self.student, self.sampling, self.cfg = student, sampling, student.cfg

    def init(self, params, text_BMC, key, latent_shape: tuple[int, int, int]) -> StreamState:
        """An empty stream for prompts [B, M, C] and latents (H, W, C)."""
        cfg, base, batch = self.cfg, self.cfg.base, text_BMC.shape[0]
        last = parallel.varying(jnp.zeros((batch, cfg.chunk, *latent_shape), jnp.float32))
        tokens = self.student.chunk_tokens(last)
        etm_text, sdd_text = self._project_text(params, text_BMC)
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
            etm_text=etm_text,
            sdd_cache=empty(len(cfg.sdd_layers), 2),
            sdd_text=sdd_text,
            z=parallel.varying(jnp.zeros((batch, tokens, base.dim), jnp.float32)) if cfg.context == "fused" else None,
        )

    def switch_prompt(self, params, state: StreamState, text_BMC) -> StreamState:
        """The same stream under new prompts: cached text is replaced, the visual history stays."""
        etm_text, sdd_text = self._project_text(params, text_BMC)
        return state._replace(etm_text=etm_text, sdd_text=sdd_text)

    def _project_text(self, params, text_BMC):
        etm = self.student.etm(project_only=True)
        etm_text = etm.apply({"params": params["etm"]}, text_BMC, method="project").text
        if self.cfg.fusion == "replace":
            return etm_text, None
        sdd = self.student.sdd(project_only=True)
        return etm_text, sdd.apply({"params": params["sdd"]}, text_BMC, method="project").text

    def step(self, params, state: StreamState) -> tuple[StreamState, jax.Array]:
        """Makes the next chunk: (new state, clean latents [B, g, H, W, C])."""
        if self.cfg.context != "fused":
            state, x, _ = self.step_to(params, state, self.sampling.ends)
            return state, x
        key, key_sample = jax.random.split(state.key)
        z, state = self._etm(params, state._replace(key=key))
        x, state = self._denoise_fused(params, state, z, key_sample)
        return state._replace(z=z, index=state.index + 1, last=x), x

    def step_to(self, params, state: StreamState, exits) -> tuple[StreamState, jax.Array, Exit]:
        """``step`` that leaves the step list early: the x0 predicted at step ``exits`` (per list) is the chunk.

        Training by self-rollout draws the exit at random (METHOD_SPEC C.3). Context mode "fused" has no such form; its
        numbers are those of "clean".
        """
        key, key_sample = jax.random.split(state.key)
        z, state = self._etm(params, state._replace(key=key))
        call = self._caller(params, state, z)
        emit = ("own",) if self.cfg.context == "last_step_kv" else ()
        tokens = self.student.chunk_tokens(state.last)
        own = jax.tree.map(lambda c: jnp.zeros_like(c[:, :, :tokens]), state.sdd_cache) if emit else None
        velocity = functools.partial(call, emit=emit)
        x, own, exit = denoise(self.sampling, velocity, state.index, state.last.shape, own, key_sample, exits)
        return self._conclude(call, state, x, own), x, exit

    def replay(self, params, state: StreamState, exit: Exit, grads: ContextGrad, frames: bool):
        """The chunk of ``step_to`` again, from its exit: differentiable in ``params``.

        Args:
          params, state: as for ``step``.
          exit: input and noise level of the step that made the chunk.
          grads: what flows through the parameters that made the contexts.
          frames: gradients also flow through the generated frames that later chunks see.

        Returns:
          (new state, x0 [B, g, H, W, C]).
        """
        z, state = self._etm(params, state)
        z = z if grads.etm == "params" else jax.lax.stop_gradient(z)
        call = self._caller(params, state, z)
        last_kv = self.cfg.context == "last_step_kv"
        v, emitted = call(exit.x, exit.sigma, emit=("own",) if last_kv else ())
        x = exit.x - exit.sigma * v
        seen = x if frames else jax.lax.stop_gradient(x)
        return self._conclude(call, state, seen, emitted.own, frozen=grads.sdd == "none"), x

    def _conclude(self, call, state: StreamState, x, own: KeyValue | None, frozen: bool = False) -> StreamState:
        """The state after chunk ``x``: its clean pass (or the keys of its last step) becomes the cache."""
        if own is None:
            own = call(x, jnp.float32(0.0), with_head=False, emit=("own",))[1].own
        own = jax.lax.stop_gradient(own) if frozen else own
        cache = self._remember(state.sdd_cache, own, state.index == 0)
        return state._replace(sdd_cache=cache, index=state.index + 1, last=x)

    def _etm(self, params, state: StreamState):
        """z of the next chunk; the ring takes the new slot's keys and values."""
        cfg, j = self.cfg, state.index
        grid, tokens = grid_of(state.last, cfg.base), self.student.chunk_tokens(state.last)
        layout, ids = layouts.etm_step(cfg, tokens), state.etm_slots
        visible = jnp.concatenate([ids >= 0, jnp.ones(1, bool)])[None]
        if layout.rotate_at_use:
            # Only differences matter: the new slot sits at the end, a sink no further away than just before the ring.
            own = jnp.int32(cfg.sink + cfg.window - 1)
            distance = jnp.where(ids < cfg.sink, jnp.minimum(j - ids, own - ids), j - ids)
            key_position = jnp.concatenate([jnp.where(ids >= 0, own - distance, 0), own[None]])
            ropes = dict(rope_q=self.student.rope(own[None], grid), rope_k=self.student.rope(key_position, grid))
        else:
            ropes = dict(rope_q=self.student.rope(j[None], grid))
        zero = jnp.zeros((state.last.shape[0], 1), jnp.float32)
        z, emitted = self.student.etm(layout, emit=("own",)).apply(
            {"params": params["etm"]}, state.last, (j == 0)[None], zero, visible=visible,
            layer=Layer(cache=state.etm_cache, text=state.etm_text), **ropes,
        )  # fmt: skip
        if state.etm_cache is None:
            return z, state
        slot, keep = ring_slot(j, cfg.sink, cfg.window - 1)
        cache = jax.tree.map(lambda c, own: write_slot(c, own, slot, keep, axis=2), state.etm_cache, emitted.own)
        return z, state._replace(etm_cache=cache, etm_slots=write_slot(ids, j[None], slot, keep, axis=0))

    def _project_z(self, params, z, rope_z):
        sdd = self.student.sdd(project_only=True)
        if self.cfg.fusion not in ("selfkv", "xattn2", "replace"):
            return None
        return sdd.apply({"params": params["sdd"]}, z_BSD=z, rope_z=rope_z, method="project").z

    def _caller(self, params, state: StreamState, z):
        """SDD's call for the next chunk: ``call(x, sigma, **module) -> (velocity, Emitted)``."""
        cfg, student, i = self.cfg, self.student, state.index
        grid, tokens = grid_of(state.last, cfg.base), student.chunk_tokens(state.last)
        layout = layouts.sdd_step(cfg, tokens)
        previous, current = layouts.sdd_positions(cfg, i)
        keys = jnp.stack([jnp.zeros_like(i), previous] + [current] * (len(layout.source) - 2))
        visible = jnp.stack([*_past(cfg, i)] + [i >= 0] * (len(layout.source) - 2))[None]
        ropes = student.z_ropes(1, 1, current[None], grid)
        layer = Layer(state.sdd_cache, state.sdd_text, self._project_z(params, z, ropes.get("rope_z")))
        call_args = dict(
            rope_q=student.rope(current[None], grid), rope_k=student.rope(keys, grid), visible=visible,
            z_BSD=z, layer=layer, **ropes,
        )  # fmt: skip

        def call(x, sigma, **module):
            sigma = jnp.broadcast_to(sigma, (x.shape[0], 1))
            return student.sdd(layout, **module).apply({"params": params["sdd"]}, x, sigma, **call_args)

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
        layout = layouts.sdd_fused(cfg, tokens)
        before, last = layouts.sdd_positions(cfg, jnp.maximum(i - 1, 0))
        previous, current = layouts.sdd_positions(cfg, i)
        selfkv = cfg.fusion == "selfkv"
        zero, yes, no = jnp.zeros_like(i), i >= 0, i < 0
        keys = jnp.stack([zero, before, last, previous, current] + ([last, current] if selfkv else []))
        visible = jnp.stack([
            jnp.stack([*_past(cfg, i - 1), yes, no, no] + ([yes, no] if selfkv else [])),
            jnp.stack([(i >= 2) & cfg.anchor, no, no, i >= 1, yes] + ([no, yes] if selfkv else [])),
        ])  # fmt: skip
        own_position = jnp.stack([last, current])
        ropes = student.z_ropes(2, 2, own_position, grid)
        both_z = jnp.concatenate([state.z, z], axis=1)
        both_kv = self._project_z(params, both_z, ropes.get("rope_z"))
        fresh: list[KeyValue] = []

        def first(x, sigma):
            own = jnp.concatenate([state.last, x], axis=1)
            levels = jnp.repeat(jnp.stack([jnp.zeros_like(sigma), sigma]), cfg.chunk)
            v, emitted = student.sdd(layout, emit=("own",)).apply(
                {"params": params["sdd"]}, own, jnp.broadcast_to(levels[None], own.shape[:2]),
                rope_q=student.rope(own_position, grid), rope_k=student.rope(keys, grid), visible=visible,
                z_BSD=both_z, layer=Layer(state.sdd_cache, state.sdd_text, both_kv), **ropes,
            )  # fmt: skip
            clean = jax.tree.map(lambda y: y[:, :, :tokens], emitted.own)
            cache = self._remember(state.sdd_cache, clean, i == 1)
            fresh.append(jax.tree.map(lambda new, old: jnp.where(i >= 1, new, old), cache, state.sdd_cache))
            return v[:, cfg.chunk :]

        step_layout = layouts.sdd_step(cfg, tokens)
        extra = len(step_layout.source) - 2
        z_ropes = student.z_ropes(1, 1, current[None], grid)
        z_kv = None if both_kv is None else jax.tree.map(lambda y: y[:, :, tokens:], both_kv)

        def velocity(x, sigma):
            return student.sdd(step_layout).apply(
                {"params": params["sdd"]}, x, jnp.broadcast_to(sigma, (x.shape[0], 1)),
                rope_q=student.rope(current[None], grid),
                rope_k=student.rope(jnp.stack([zero, previous] + [current] * extra), grid),
                visible=jnp.stack([*_past(cfg, i)] + [yes] * extra)[None],
                z_BSD=z, layer=Layer(fresh[0], state.sdd_text, z_kv), **z_ropes,
            )  # fmt: skip

        x, _, _ = denoise(self.sampling, velocity, i, state.last.shape, None, key, self.sampling.ends, first)
        return x, state._replace(sdd_cache=fresh[0])


def cache_bytes(state) -> int:
    """Bytes a stream holds between chunks."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state._replace(key=None)))
