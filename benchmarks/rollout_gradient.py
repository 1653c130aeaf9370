"""The gradient of a self-rollout: one parallel pass against the chunk-by-chunk loop, memory and time in one run.

    python benchmarks/rollout_gradient.py --frames 16 --output benchmarks/results/rollout-gradient.json

Both forms give the same gradient (``tests/test_rollout.py``; checked here again). Memory is what the compiled program
allocates besides its arguments and results; time is CPU time of the process, median of turns.
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from greedy_distill_jax import cli, rollout as rollouts
from greedy_distill_jax.checkpoint import source_commit, versions
from greedy_distill_jax.models.student import ContextGrad, Student
from greedy_distill_jax.models.wan_config import WAN_SIZES, StudentConfig, WanConfig
from greedy_distill_jax.stream import Sampling, Streamer
from greedy_distill_jax.testing import tiny


def measure(frames: int, batch: int, latent: int, dim: int, remat: str, repeats: int) -> dict:
    """Figures of both forms, and how far apart their gradients are (relative norm)."""
    base = dataclasses.replace(WanConfig(**WAN_SIZES["tiny"]), dim=dim, ffn_dim=5 * dim, remat=remat)
    layers = dict(etm_layers=(0, 1), sdd_layers=(0, 1, 2, 3))
    student = Student(StudentConfig(base=base, **layers, window=4, rope_frames=frames))
    streamer = Streamer(student, Sampling(((1.0, 0.5),), "renoise"))
    shape = (frames, latent, latent, base.channels)
    params, text = tiny.random_params(student, latent_shape=shape), tiny.text_rows(batch, jax.random.key(0), base)
    drawn = jax.jit(lambda p: rollouts.roll_out(streamer, p, text, jax.random.key(1), shape, "last"))(params)
    weights = jax.random.normal(jax.random.key(2), drawn.x0_BTHWC.shape)
    stops = ContextGrad("params", "none")
    forms = {
        "parallel": lambda p: rollouts.recompute(student, p, text, drawn, stops),
        "sequential": lambda p: rollouts.replay(streamer, p, text, drawn, stops),
    }
    out, gradients, compiled = {}, {}, {}
    for name, act in forms.items():
        begin = time.process_time()
        compiled[name] = jax.jit(jax.grad(lambda p, act=act: jnp.sum(weights * act(p)))).lower(params).compile()
        memory = compiled[name].memory_analysis().temp_size_in_bytes
        out[name] = {"compile_cpu_s": time.process_time() - begin, "temporary_MiB": memory / 2**20, "turns_ms": []}
        gradients[name] = jax.block_until_ready(compiled[name](params))
    for _ in range(repeats):
        for name in forms:
            begin = time.process_time()
            jax.block_until_ready(compiled[name](params))
            out[name]["turns_ms"].append(1e3 * (time.process_time() - begin))
    for row in out.values():
        row["cpu_ms"] = statistics.median(row.pop("turns_ms"))
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, *gradients.values()))
    out["relative_difference"] = float(difference / optax.tree.norm(gradients["parallel"]))
    return out


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
    rows = {}
    for frames in args.frames:
        rows[frames] = measure(frames, args.batch, args.latent, args.dim, args.remat, args.repeats)
        for name in ("parallel", "sequential"):
            figures = "  ".join(f"{key} {value:.1f}" for key, value in rows[frames][name].items())
            print(f"{frames:>3} frames  {name:<10}  {figures}", flush=True)
        print(f"            gradients differ by {rows[frames]['relative_difference']:.1e}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        result = {"settings": settings, "rows": rows, "versions": versions(), "commit": source_commit()}
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    cli.run(main)
