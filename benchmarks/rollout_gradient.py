"""The gradient of a self-rollout: one parallel pass against the chunk-by-chunk loop, memory and time in one run.

    python benchmarks/rollout_gradient.py --frames 16 --output benchmarks/results/rollout-gradient.json

Both forms give the same gradient (``tests/training/test_rollout.py``; checked here again). Memory is what the compiled
program allocates besides its arguments and results; time is CPU time of the process on a CPU, median of turns.
``benchmarks/train_step.py`` does the same at a named size.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from greedy_distill_jax import cli
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.measure import clock, environment, memory, record
from greedy_distill_jax.models.students.base import ContextGrad
from greedy_distill_jax.models.students.config import StudentConfig
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.streaming.etm_sdd import Streamer
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.training import rollout as rollouts


def gradients(streamer: Streamer, params, text, shape: tuple[int, int, int, int], repeats: int) -> dict:
    """Figures of both forms of one student, and how far apart their gradients are (relative norm).

    Args:
      streamer: student and steps; every list runs to its end.
      params, text: of the student, rows [B, M, C].
      shape: (T, H, W, C) of the video.
      repeats: turns; each times both.
    """
    student, stops = streamer.student, ContextGrad("params", "none")
    drawn = jax.jit(lambda p: rollouts.roll_out(streamer, p, text, jax.random.key(1), shape, "last"))(params)
    weights = jax.random.normal(jax.random.key(2), drawn.x0_BTHWC.shape)
    forms = {
        "parallel": lambda p, drawn: rollouts.recompute(student, p, text, drawn, stops),
        "sequential": lambda p, drawn: rollouts.replay(streamer, p, text, drawn, stops),
    }
    out, found, compiled = {}, {}, {}
    for name, act in forms.items():
        begin = clock.now()
        gradient = jax.jit(jax.grad(lambda p, drawn, w, act=act: jnp.sum(w * act(p, drawn))))
        compiled[name] = gradient.lower(params, drawn, weights).compile()
        out[name] = {"compile_s": clock.now() - begin}
        out[name]["temporary_MiB"] = memory.program_bytes(compiled[name])["temporaries"] / 2**20
        found[name] = jax.block_until_ready(compiled[name](params, drawn, weights))
    difference = jax.jit(lambda a, b: optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(a))
    out["relative_difference"] = float(difference(*found.values()))
    del found
    laps = clock.Laps()
    for _ in range(repeats):
        for name, run in compiled.items():
            laps.time(name, run, params, drawn, weights)
    for name in forms:
        out[name]["ms"] = laps.median_ms(name)
    return out


def measure(frames: int, batch: int, latent: int, dim: int, remat: str, repeats: int) -> dict:
    """``gradients`` of a small student."""
    base = dataclasses.replace(WanConfig(**WAN_SIZES["tiny"]), dim=dim, ffn_dim=5 * dim, remat=remat)
    layers = dict(etm_layers=(0, 1), sdd_layers=(0, 1, 2, 3))
    student = Student(StudentConfig(base=base, **layers, window=4, rope_frames=frames))
    shape = (frames, latent, latent, base.channels)
    params, text = tiny.random_params(student, latent_shape=shape), tiny.text_rows(batch, jax.random.key(0), base)
    return gradients(Streamer(student, StepPlan(((1.0, 0.5),), "renoise")), params, text, shape, repeats)


def main() -> None:
    """Command line."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--latent", type=int, default=8, help="height and width of a latent frame")
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="full")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    clock.one_thread()
    rows = {}
    for frames in args.frames:
        rows[frames] = measure(frames, args.batch, args.latent, args.dim, args.remat, args.repeats)
        for name in ("parallel", "sequential"):
            figures = "  ".join(f"{key} {value:.1f}" for key, value in rows[frames][name].items())
            print(f"{frames:>3} frames  {name:<10}  {figures}", flush=True)
        print(f"            gradients differ by {rows[frames]['relative_difference']:.1e}")
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    record.write_json(args.output, {"settings": settings, "rows": rows, **environment.environment()})


if __name__ == "__main__":
    cli.run(main)
