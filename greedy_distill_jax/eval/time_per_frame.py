"""Time per frame against the length of the video, all models in one run and in turns.

What is compared, one video at a time, model only (no decoder):
- the student, ETM + SDD or causal: the step that makes frame n of a stream;
- full-causal cache: the teacher's own network made causal, ``steps`` evaluations and a clean pass for frame n against
  the cached keys of all n frames before it;
- bidirectional teacher: all n frames denoised together, divided by n.
The causal network is timed with the teacher's weights: speed does not depend on what they were trained for.
"""

import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.diffusion import solvers
from greedy_distill_jax.models.wan.dit import Dit, Teacher, grid_of
from greedy_distill_jax.models.wan.layers import KeyValue, Layer, Layout
from greedy_distill_jax.models.wan.rope import rope_table
from greedy_distill_jax.streaming.causal import CausalStreamer
from greedy_distill_jax.streaming.etm_sdd import Streamer

SPAN = 8  # stream steps timed around each length


def causal_frame(teacher: Teacher, params, frames: int, sigmas: Sequence[float], latent_shape, text_BMC) -> Callable:
    """A jitted function that makes one frame against the cached keys of ``frames`` earlier ones."""
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
            return module(**options).apply(
                {"params": params}, x, sigma, rope_q=rope, layer=Layer(cache=cache, text=text)
            )  # fmt: skip

        x = solvers.euler(lambda x, s: call(x, s)[0], noise, tuple(sigmas))
        return x, call(x, jnp.zeros((1, 1), jnp.float32), with_head=False, emit=("own",))[1].own

    return lambda noise: run(params, noise, cache, text)


def kind_of(streamer: Streamer | CausalStreamer) -> str:
    """Column of a student in the rows of ``time_per_frame``."""
    return "etm_sdd" if isinstance(streamer, Streamer) else "causal"


def time_per_frame(
    teacher: Teacher, teacher_params, teacher_sigmas, streamer: Streamer | CausalStreamer, params, text_BMC,
    latent_shape, *, frames: Sequence[int] = (8, 32, 128, 256), repeats: int = 3,
) -> list[dict[str, float | int]]:  # fmt: skip
    """Rows {frames, etm_sdd or causal, full_causal, teacher}: milliseconds per latent frame, medians over turns.

    Args:
      teacher, teacher_params, teacher_sigmas: the bidirectional teacher, its step list, no guidance.
      streamer, params: the student; the full-causal model takes its step list.
      text_BMC: rows of one prompt.
      latent_shape: (H, W, C).
      frames: video lengths.
      repeats: turns; every turn times every model once.
    """
    key = jax.random.key(0)
    init = jax.jit(streamer.init, static_argnums=3)
    step = jax.jit(streamer.step, donate_argnums=1)
    sigmas, name = streamer.plan.sigmas[-1], kind_of(streamer)
    noise = jax.random.normal(key, (1, 1, *latent_shape), jnp.float32)
    causal = {n: causal_frame(teacher, teacher_params, n, sigmas, latent_shape, text_BMC) for n in frames}
    whole = jax.jit(
        lambda p, x, t: solvers.euler(lambda x, s: teacher(p, x, s, t), x, tuple(teacher_sigmas))
    )  # fmt: skip
    videos = {n: jax.random.normal(key, (1, n, *latent_shape), jnp.float32) for n in frames}

    # On a CPU, time of the process: neighbours on the machine do not count. A device's work shows in wall time only.
    now = time.process_time if jax.default_backend() == "cpu" else time.perf_counter

    def clock(run: Callable, calls: int) -> float:
        begin = now()
        for _ in range(calls):
            jax.block_until_ready(run())
        return (now() - begin) * 1e3 / calls

    chunk = streamer.cfg.chunk
    near = {n: range(max(1, n // chunk), max(1, n // chunk) + SPAN) for n in frames}  # stream steps timed for length n
    times: dict[int, dict[str, list[float]]] = {n: {name: [], "full_causal": [], "teacher": []} for n in frames}
    for turn in range(repeats + 1):  # turn 0 compiles
        state = init(params, text_BMC, key, tuple(latent_shape))
        for number in range(1, max(map(max, near.values())) + 1):
            jax.block_until_ready(state.index)
            begin = now()
            state, x = step(params, state)
            if any(number in steps for steps in near.values()):
                jax.block_until_ready(x)
                spent = (now() - begin) * 1e3 / chunk
                for n, steps in near.items():
                    if turn and number in steps:
                        times[n][name].append(spent)
        for n in frames:
            one = clock(lambda n=n: causal[n](noise), 3)
            all_ = clock(lambda n=n: whole(teacher_params, videos[n], text_BMC), 1) / n
            if turn:
                times[n]["full_causal"].append(one)
                times[n]["teacher"].append(all_)
    return [{"frames": n, **{model: float(np.median(x)) for model, x in times[n].items()}} for n in frames]
