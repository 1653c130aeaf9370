"""Who sees whom, and at which time position: the layouts of every student's calls.

A picked key is (candidate chunk, chunk position). Where one chunk is seen at two positions (clamped RoPE past the
training length, a sink at a bounded distance, positions within a window) it is picked twice; with absolute positions
never.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from greedy_distill_jax.models.students.config import CausalConfig, StudentConfig
from greedy_distill_jax.models.wan.layers import Layout
from greedy_distill_jax.ops.attention import Pattern


def frames_at(position_Q: Int[Array | np.ndarray, " Q"], chunk: int) -> Int[Array | np.ndarray, " T"]:
    """Frame indices of chunks at the given chunk positions (numpy or traced)."""
    return (position_Q[:, None] * chunk + np.arange(chunk, dtype=np.int32)[None]).reshape(-1)


PARTS = ("both", "clean", "noisy")  # of a teacher-forced call: all of it, the context pass, what is denoised


def _half(part: str, clean: int) -> slice:
    """Which own chunks [clean | noisy] a call of this part of ``PARTS`` has."""
    return {"both": slice(None), "clean": slice(clean), "noisy": slice(clean, None)}[part]


def _build(rows, own_position, tokens: int, z_of=(), *, absolute: bool, frozen: int = 0) -> Layout:
    """Rows of (candidate, position) pairs -> a layout with every distinct pair picked once."""
    picks = sorted({pair for row in rows for pair in row})
    where = {pair: i for i, pair in enumerate(picks)}
    return Layout(
        Pattern.from_table(([where[pair] for pair in row] for row in rows), q_chunk=tokens, num_k_chunks=len(picks)),
        source=tuple(candidate for candidate, _ in picks),
        z_of=tuple(z_of),
        rotate_at_use=not absolute,
        frozen=frozen,
        own_position=tuple(own_position),
        key_position=tuple(position for _, position in picks),
    )


def etm_parallel(cfg: StudentConfig, slots: int, tokens: int) -> Layout:
    """All slots of a video at once."""
    absolute, reach = cfg.rope_mode == "absolute", cfg.window - 1
    rows = []
    for j in range(slots):
        row = [(a, a) for a in range(max(0, j - reach), j + 1)]
        for s in range(min(cfg.sink, max(0, j - reach))):
            # Outside the window a sink sits right before it, however long the video gets.
            row.append((s, s if absolute else j - min(j - s, cfg.sink + reach - s)))
        rows.append(row)
    return _build(rows, range(slots), tokens, absolute=absolute)


def sdd_positions(cfg: StudentConfig, index: Int[Array, ""] | int) -> tuple[Int[Array, ""] | int, Int[Array, ""] | int]:
    """(position of the previous chunk, position of the current one) for chunk ``index`` (int or traced)."""
    if isinstance(index, int):
        previous = min(max(index - 1, 0), cfg.max_previous)
        return previous, previous + 1 if index else 0
    previous = jnp.clip(index - 1, 0, min(cfg.max_previous, 2**31 - 2))
    return previous, jnp.where(index > 0, previous + 1, 0)


def sdd_parallel(
    cfg: StudentConfig, chunks: int, tokens: int, draws: int = 1, frozen: bool = False, part: str = "both"
) -> Layout:
    """Own chunks = [clean 0 .. chunks-2 | noisy 0 .. chunks-1, repeated for every noise draw].

    Noisy chunk i sees clean 0, clean i-1, itself; so does the clean pass of chunk i (docs/method.md, section 3.3). With
    fusion "selfkv" both also see z_i, at the position of chunk i. ``frozen``: the keys and values of the clean chunks
    are stop-gradient. ``part``: the clean half does not depend on the noisy one, so that each may be a call of its own:
    "clean" has the clean chunks alone, "noisy" the noisy ones with the clean ones as its cache.
    """
    clean = chunks - 1
    own = [("clean", i) for i in range(clean)] + [("noisy", i) for _ in range(draws) for i in range(chunks)]
    first_z = clean if part == "clean" else len(own)
    rows = []
    for c, (_, i) in enumerate(own):
        previous, current = sdd_positions(cfg, i)
        row = [(c, current)]
        if i >= 1:
            row.append((i - 1, previous))
        if i >= 2 and cfg.anchor:
            row.append((0, 0))
        if cfg.fusion == "selfkv":
            row.append((first_z + i, current))
        rows.append(row)
    own_position, z_of = [sdd_positions(cfg, i)[1] for _, i in own], [i for _, i in own]
    absolute, stopped, half = cfg.rope_mode == "absolute", clean if frozen else 0, _half(part, clean)
    return _build(rows[half], own_position[half], tokens, z_of[half], absolute=absolute, frozen=stopped)


def _step(tokens: int, ready: int, *, absolute: bool, z_of=()) -> Layout:
    """One chunk of a stream against [itself | ready]: what is always there first, what fills behind it."""
    return Layout(Pattern.full(1, tokens, 1 + ready), source=(0,), z_of=z_of, rotate_at_use=not absolute)


def sdd_step(cfg: StudentConfig, tokens: int) -> Layout:
    """One chunk against [itself | z | frame 0 | previous]: denoising and the clean pass."""
    return _step(tokens, sdd_filled(cfg, 2) - 1, absolute=cfg.rope_mode == "absolute", z_of=(0,))


def sdd_filled(cfg: StudentConfig, index: Int[Array, ""] | int) -> Int[Array, ""] | int:
    """How many chunks of ``sdd_step``'s list are there at chunk ``index`` (int or traced)."""
    always, past = 1 + (cfg.fusion == "selfkv"), 1 + cfg.anchor
    return always + (min(index, past) if isinstance(index, int) else jnp.minimum(index, past))


def sdd_fused(cfg: StudentConfig, tokens: int) -> Layout:
    """Own = [clean previous | noisy current], a list each: [itself | its z | frame 0 | before-previous] and
    [itself | its z | previous | frame 0].

    The clean chunk is picked twice, as itself and as the previous chunk of the noisy one; ready are
    [z of both | frame 0 | before-previous]. Without an anchor there is no frame 0.
    """
    z, past = (((3,), (4,)), 5) if cfg.fusion == "selfkv" else (((), ()), 3)
    rows = (0, *z[0], past, past + 1), (2, *z[1], 1, past)
    if not cfg.anchor:
        rows = (0, *z[0], past), (2, *z[1], 1)
    pattern = Pattern.from_table(rows, q_chunk=tokens, num_k_chunks=past + 1 + cfg.anchor)
    return Layout(pattern, source=(0, 0, 1), z_of=(0, 1), rotate_at_use=cfg.rope_mode != "absolute")


def etm_step(cfg: StudentConfig, tokens: int) -> Layout:
    """One slot against [itself | sink | ring]."""
    return _step(tokens, cfg.sink + cfg.window - 1, absolute=cfg.rope_mode == "absolute")


def causal_positions(
    cfg: CausalConfig, chunk_S: Int[Array | np.ndarray, "*S"], index: Int[Array, ""] | int
) -> Int[Array | np.ndarray, "*S"]:
    """Positions at which chunk ``index`` sees the chunks ``chunk_S`` (itself among them); numpy or traced."""
    if cfg.rope_mode == "absolute":
        return chunk_S
    xp = jnp if isinstance(index, jax.Array) else np
    # The sink keeps its positions, the rest moves up behind it once the window is full.
    moved = chunk_S - xp.maximum(index - cfg.sink_chunks - cfg.ring_chunks, 0)
    return xp.where(chunk_S < cfg.sink_chunks, chunk_S, moved)


def causal_parallel(
    cfg: CausalConfig, chunks: int, tokens: int, draws: int = 1, frozen: bool = False, part: str = "both"
) -> Layout:
    """Own chunks = [clean 0 .. chunks-2 | noisy 0 .. chunks-1, repeated for every noise draw].

    Chunk i, clean or noisy, sees the clean sink, the clean chunks of its window and itself. ``frozen`` and ``part`` as
    in ``sdd_parallel``.
    """
    clean = chunks - 1
    own = [*range(clean)] + [i for _ in range(draws) for i in range(chunks)]
    rows, own_position = [], []
    for c, i in enumerate(own):
        seen = [j for j in range(i) if j < cfg.sink_chunks or j >= i - cfg.ring_chunks]
        positions = [int(p) for p in causal_positions(cfg, np.asarray([*seen, i]), i)]
        rows.append(list(zip([*seen, c], positions, strict=True)))
        own_position.append(positions[-1])
    absolute, stopped, half = cfg.rope_mode == "absolute", clean if frozen else 0, _half(part, clean)
    return _build(rows[half], own_position[half], tokens, absolute=absolute, frozen=stopped)


def causal_step(cfg: CausalConfig, tokens: int) -> Layout:
    """One chunk against [itself | sink | ring]."""
    return _step(tokens, cfg.sink_chunks + cfg.ring_chunks, absolute=cfg.rope_mode == "absolute")


def causal_recache(cfg: CausalConfig, tokens: int, sink: int, own: int) -> Layout:
    """``own`` chunks at once, each against [``sink`` cached ones | all of them]."""
    return Layout.full(own, tokens, sink + own, rotate_at_use=cfg.rope_mode != "absolute")
