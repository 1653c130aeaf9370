"""Time per frame against the length of the video, all models in one run and in turns.

What is compared, one video at a time, model only (no decoder):
- the student, ETM + SDD or causal: the step that makes frame n of a stream;
- full-causal cache: the teacher's own network made causal, ``steps`` evaluations and a clean pass for frame n against
  the cached keys of all n frames before it;
- bidirectional teacher: all n frames denoised together, divided by n.
The causal network is timed with the teacher's weights: speed does not depend on what they were trained for.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from greedy_distill_jax.diffusion import noise_levels, solvers
from greedy_distill_jax.eval import gates
from greedy_distill_jax.eval.comparison import Comparison
from greedy_distill_jax.eval.suites import Column, Measured, Plot, Suite
from greedy_distill_jax.measure import clock
from greedy_distill_jax.models.wan.dit import Dit, Teacher, grid_of
from greedy_distill_jax.models.wan.layers import KeyValue, Layer, Layout
from greedy_distill_jax.models.wan.rope import rope_table
from greedy_distill_jax.streaming.causal import CausalStreamer
from greedy_distill_jax.streaming.etm_sdd import Streamer
from greedy_distill_jax.streaming.session import programs

GROWTH = 1.1  # time of a frame far into the stream over an early one
STUDENTS = {"etm_sdd": "ETM + SDD", "causal": "causal student"}  # columns of which a comparison has one
SPAN = 8  # stream steps timed around each length
CALLS = 3  # of the full-causal model between two looks at the clock


def causal_frame(
    teacher: Teacher,
    params: Any,
    frames: int,
    sigmas: Sequence[float],
    latent_shape: Sequence[int],
    text_BMC: Float[Array, "1 M C"],
) -> Callable[[Float[Array, "1 1 H W C"]], Any]:
    """Returns a jitted function from noise to one frame, made against the cached keys of ``frames`` earlier ones.

    Args:
      teacher, params: the network, which is made causal.
      frames: before the one that is made; their keys are zeros.
      sigmas: noise levels of the evaluations.
      latent_shape: (H, W, C).
      text_BMC: rows of one prompt.
    """
    cfg = teacher.cfg
    x = jnp.zeros((1, 1, *latent_shape), jnp.float32)
    grid = grid_of(x, cfg)
    tokens = grid[0] * grid[1]
    layout = Layout.full(1, tokens, frames + 1)
    rope = rope_table(np.asarray([frames]), grid, cfg.head_dim)
    module = functools.partial(Dit, cfg, cfg.num_layers, layout)
    shape = (cfg.num_layers, 1, frames * tokens, cfg.num_heads, cfg.head_dim)
    cache = KeyValue(jnp.zeros(shape, jnp.dtype(cfg.dtype)), jnp.zeros(shape, jnp.dtype(cfg.dtype)))
    text = module(project_only=True).apply({"params": params}, text_BMC, method="project").text

    @jax.jit
    def run(params, noise, cache, text):
        def call(x, sigma, **options):
            layer = Layer(cache=cache, text=text)
            return module(**options).apply({"params": params}, x, sigma, rope_q=rope, layer=layer)

        x = solvers.euler(lambda x, s: call(x, s)[0], noise, tuple(sigmas))
        return x, call(x, jnp.zeros((1, 1), jnp.float32), with_head=False, emit=("own",))[1].own

    return lambda noise: run(params, noise, cache, text)


def kind_of(streamer: Streamer | CausalStreamer) -> str:
    """Returns the column of a student in the rows of ``time_per_frame``."""
    return "etm_sdd" if isinstance(streamer, Streamer) else "causal"


def time_per_frame(
    teacher: Teacher,
    teacher_params: Any,
    teacher_sigmas: Sequence[float],
    streamer: Streamer | CausalStreamer,
    params: Any,
    text_BMC: Float[Array, "1 M C"],
    latent_shape: Sequence[int],
    *,
    frames: Sequence[int] = (8, 32, 128, 256),
    repeats: int = 3,
) -> list[dict[str, float | int]]:
    """Measures milliseconds per latent frame, medians over turns.

    Args:
      teacher, teacher_params, teacher_sigmas: the bidirectional teacher, its step list, no guidance.
      streamer, params: the student; the full-causal model takes its step list.
      text_BMC: rows of one prompt.
      latent_shape: (H, W, C).
      frames: video lengths.
      repeats: turns; every turn times every model once.

    Returns:
      Rows {frames, etm_sdd or causal, full_causal, teacher}, one per length.
    """
    key, laps = jax.random.key(0), clock.Laps()
    own = programs(streamer)
    sigmas, student, chunk = streamer.plan.sigmas[-1], kind_of(streamer), streamer.cfg.chunk
    noise = jax.random.normal(key, (1, 1, *latent_shape), jnp.float32)
    causal = {n: causal_frame(teacher, teacher_params, n, sigmas, latent_shape, text_BMC) for n in frames}
    whole = jax.jit(lambda p, x, t: solvers.euler(lambda x, s: teacher(p, x, s, t), x, tuple(teacher_sigmas)))
    videos = {n: jax.random.normal(key, (1, n, *latent_shape), jnp.float32) for n in frames}
    near = {n: range(max(1, n // chunk), max(1, n // chunk) + SPAN) for n in frames}  # stream steps timed for length n
    last = max(map(max, near.values()))

    def causal_frames(n: int) -> list[Any]:
        return [jax.block_until_ready(causal[n](noise)) for _ in range(CALLS)]

    for turn in range(repeats + 1):
        counts = turn > 0  # the first one compiles
        state = own.init(params, text_BMC, key, tuple(latent_shape))
        for number in range(1, last + 1):
            state, _ = laps.time(number, own.step(number - 1), params, state, per=chunk, counts=counts)
        for n in frames:
            laps.time((n, "full_causal"), causal_frames, n, per=CALLS, counts=counts)
            laps.time((n, "teacher"), whole, teacher_params, videos[n], text_BMC, per=n, counts=counts)
    return [
        {"frames": n, student: laps.median_ms(*near[n])}
        | {model: laps.median_ms((n, model)) for model in ("full_causal", "teacher")}
        for n in frames
    ]


def timed_lengths(comparison: Comparison) -> Sequence[int]:
    """Returns the lengths of a comparison, or 32, 256, and 1024 where the teacher still has few tokens."""
    cfg, latent_shape = comparison.teacher.model.cfg, comparison.student.latent_shape
    tokens = int(np.prod(latent_shape[1:3])) // cfg.patch**2
    return comparison.lengths or (32, 256, *((1024,) if tokens <= 4 else ()))


def measure(comparison: Comparison) -> Measured:
    """Times teacher, student and the full-causal model at the comparison's lengths, with equal step lists."""
    teacher, student = comparison.teacher, comparison.student
    streamer = student.streamer(comparison.few_steps)
    few = int(streamer.plan.lengths[-1])
    rows = time_per_frame(
        teacher.model,
        teacher.params,
        noise_levels.uniform_steps(few, teacher.settings.sample.shift),
        streamer,
        student.params,
        student.text(comparison.captions[:1]),
        student.latent_shape[1:],
        frames=timed_lengths(comparison),
    )
    labels = {column.name: column.label for column in COLUMNS if column.name in rows[0]}
    plot = Plot(
        "Time per frame against video length",
        "Milliseconds of computing per frame against the length of the video; both axes are logarithmic. A flat line "
        "means that the cost of a frame does not depend on how long the video already is; lower is better.",
        labels["frames"],
        "Time per frame (ms)",
        {label: [row[name] for row in rows] for name, label in labels.items() if name != "frames"},
        x=[row["frames"] for row in rows],
        log="xy",
        points=True,
    )
    how = "CPU time of the process" if jax.default_backend() == "cpu" else "wall time"
    note = f"{few} evaluations per frame (students) and per video (teacher), one video, no guidance, {how}"
    return Measured(rows, (plot,), note, _growth(rows))


def compared_lengths(rows: Sequence[dict[str, float | int]]) -> tuple[int, int]:
    """Returns the (early, late) lengths whose times are compared: the shortest, and 256 or the longest."""
    lengths = [row["frames"] for row in rows]
    return min(lengths), 256 if 256 in lengths else max(lengths)


def _growth(rows: Sequence[dict[str, float | int]]) -> dict[str, str]:
    early, late = compared_lengths(rows)
    of = {row["frames"]: row for row in rows}
    ratios = {name: f"{of[late][name] / of[early][name]:.2f} x" for name in rows[0] if name != "frames"}
    return {"frames": f"Growth, {late} / {early}"} | ratios


def cost_gate(rows: Sequence[dict[str, float | int]], early: int, late: int) -> dict[str, Any]:
    """Returns the gate on ``time_per_frame`` rows: the student's frame ``late`` over frame ``early``."""
    column = next(name for name in STUDENTS if name in rows[0])
    by_length = {row["frames"]: row[column] for row in rows}
    growth = by_length[late] / by_length[early]
    name = f"time of frame {late} over frame {early}, {STUDENTS[column]}"
    return gates.gate(name, round(growth, 4), f"<= {GROWTH}", growth <= GROWTH)


COLUMNS = (
    Column("frames", "Length of the video (frames)", format="count"),
    Column("etm_sdd", "ETM + SDD (ours)", unit="ms", better="lower"),
    Column("causal", "Causal student", unit="ms", better="lower"),
    Column("full_causal", "Full-causal cache", unit="ms", better="lower"),
    Column("teacher", "Bidirectional teacher", unit="ms", better="lower"),
)
SUITE = Suite(
    name="time_per_frame",
    title="Cost of a frame",
    text="All models were timed in one run on one device, with equal numbers of network evaluations (per frame for the "
    "streaming models, per video for the teacher); compare them with each other, not with another machine's "
    "milliseconds. Growth near 1 means a constant cost.",
    columns=COLUMNS,
    measure=measure,
    gates=lambda measured, comparison: [cost_gate(measured.rows, *compared_lengths(measured.rows))],
)
