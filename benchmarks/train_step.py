"""A training step at a named size with random weights: milliseconds, FLOPs, share of the device's ceiling, memory.

    python benchmarks/train_step.py --size wan1_3b --output benchmarks/results/train-step.json
    JAX_PLATFORMS=cpu python benchmarks/train_step.py --size small
    JAX_PLATFORMS=cpu python benchmarks/train_step.py --size quickstart

Times the jitted functions that `train` runs, built from the configurations of `configs/wan1_3b` (`pods.build_job`), one
video on one device, rematerialisation as configured: a step of stage 1, and of stage 2 a generator step and a critic
step. In stage 2 every denoising list runs to its end (`distill.exit=last`), so that the work does not depend on a draw.
FLOPs are counted in closed form (`flops.py`): "model" what the mathematics asks for, "executed" with recomputation.
MFU and HFU are their shares of a large matmul's rate, measured in the same run. Last, the gradient of a self-rollout in
one parallel pass against the chunk-by-chunk loop (`rollout_gradient.py`), whose gradients are compared.

Times are synchronised medians; on a CPU they are CPU time of one pinned thread. The file is rewritten after every row.
`quickstart` takes the configurations of `configs/quickstart.py` as they are, batch included, without the gradient.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rollout_gradient import gradients
from sizes import SIZES, Size, random_params

from greedy_distill_jax import cli
from greedy_distill_jax.cli.config_flags import CHECKOUT, read_config
from greedy_distill_jax.config import Settings, read_settings
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.measure import clock, environment, memory, record
from greedy_distill_jax.pods.facts import facts
from greedy_distill_jax.pods.jobs import STREAM, Job, Step, build_job
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.testing import tiny

# Name here -> (configuration of `sizes.CONFIGS`, name of the job's step).
STEPS = {"stage 1": ("etm_sdd", "teacher_forcing"), "generator": ("dmd", "dmd"), "critic": ("dmd", "critic")}
GRADIENT = "gradient"
# Instead of the configurations of `sizes.CONFIGS`, with rows and columns of the latents.
QUICKSTART, GRID = "quickstart", (4, 4)
QUICKSTART_CONFIGS = {"etm_sdd": "configs/quickstart.py:student", "dmd": "configs/quickstart.py:stage2"}
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of one form's gradient against the other's, by norm


def training_settings(size: Size | None, name: str) -> Settings:
    """The settings of a step, of runs that need not exist; the work of stage 2 does not depend on a draw.

    ``size``: None for the quickstart.
    """
    config = size.config(name) if size else read_config(str(CHECKOUT / QUICKSTART_CONFIGS[name]))
    if config.stage == "dmd":
        config.distill.exit = "last"
    return read_settings(config, imagine_runs=True)


def arrays(job: Job) -> tuple:
    """(state at step 0, frozen networks, batch), random and placed as the job has them."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    (state, of_state), (frozen, of_frozen), (batch, of_batch) = (job.trees[n] for n in ("state", "frozen", "batch"))
    trained = {name: random_params(net.params, next(keys)) for name, net in state.nets.items()}
    started = jax.jit(job.stage.state, out_shardings=of_state, donate_argnums=0)(trained)
    frozen = jax.device_put(random_params(frozen, next(keys)), of_frozen)
    data = {name: jax.random.normal(next(keys), x.shape, x.dtype) for name, x in batch.items()}
    return started, frozen, jax.device_put(data, of_batch)


def measure(job: Job, step: Step, repeats: int, ceiling: float) -> dict:
    """Figures of one step of a job.

    Args:
      job, step: of ``build_job``.
      repeats: timed updates after a first one.
      ceiling: FLOPs per second.

    Raises:
      RuntimeError: a metric is not finite, or the update left the parameters as they were.
    """
    state, frozen, batch = arrays(job)
    trained = "critic" if step.name == "critic" else job.stage.name
    before = jax.tree.map(jnp.copy, jax.tree.leaves(state.nets[trained].params)[0])
    start = clock.now()
    compiled = step.call.lower(state, frozen, batch, {}).compile()
    compile_s, laps = clock.now() - start, clock.Laps()
    for number in range(repeats + 1):
        state, metrics, _ = laps.time(step.name, compiled, state, frozen, batch, {}, counts=number > 0)
        bad = [name for name, value in metrics.items() if not np.isfinite(value)]
        if bad:
            raise RuntimeError(f"{step.name}, update {number}: {', '.join(bad)} is not finite; its time says nothing")
    if bool(jnp.all(before == jax.tree.leaves(state.nets[trained].params)[0])):
        raise RuntimeError(f"{step.name}: {repeats + 1} updates changed nothing; its time says nothing")
    ms, model, executed = laps.median_ms(step.name), step.cost.model.total, step.cost.executed.total
    return {
        "ms": ms,
        "model_flops": model,
        "executed_flops": executed,
        "mfu": 1e3 * model / ms / ceiling,
        "hfu": 1e3 * executed / ms / ceiling,
        "program_bytes": memory.program_bytes(compiled),
        "peak": memory.peak_bytes(),
        "compile_s": compile_s,
        "facts": facts(job),
        "metrics": {name: float(value) for name, value in metrics.items()},
    }


def measure_gradient(size: Size, repeats: int) -> dict:
    """Both forms of a rollout's gradient, see ``rollout_gradient.gradients``."""
    run = size.run("dmd")
    base = run.model.cfg.base
    streamer = make_streamer(run.model, run.settings.plan)
    text = tiny.text_rows(1, jax.random.key(3), base)
    out = gradients(streamer, run.params, text, run.latent_shape, repeats)
    if not out["relative_difference"] < TOLERANCE[base.dtype]:  # not a number is no pass either
        raise RuntimeError(
            f"the parallel and the sequential gradient differ by {out['relative_difference']:.1e}; no times of unlike "
            f"work"
        )
    return out


def main(argv: list[str]) -> None:
    """Command line."""
    parser = cli.Parser(prog="python benchmarks/train_step.py", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=(*SIZES, QUICKSTART), default="small")
    parser.add_argument("--only", choices=(*STEPS, GRADIENT), nargs="+", help="(default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="timed updates after a first one (5)")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: must be at least 1.")
    if args.size == QUICKSTART and GRADIENT in (args.only or ()):
        raise UserError(f"--only {GRADIENT}: not measured with --size {QUICKSTART}; name another size, or a step.")
    only = args.only or (*STEPS, GRADIENT)
    size, begin = SIZES.get(args.size), time.perf_counter()
    clock.one_thread()
    settings = {name: training_settings(size, source) for name, (source, _) in STEPS.items()}
    data, dtype = settings["stage 1"].data, settings["stage 1"].wan.dtype
    grid = size.latent_shape[:2] if size else GRID
    result = {
        "size": args.size,
        "latents": [data.frames, *grid, settings["stage 1"].wan.channels],
        "batch": data.batch,
        "dtype": dtype,
        "exit": "last",
        **environment.environment(),
        "ceilings": environment.ceilings(dtype),
        "steps": {},
    }
    ceiling = result["ceilings"]["matmul_flops_per_s"]
    for name in [n for n in STEPS if n in only]:
        job = build_job(settings[name], jax.devices()[:1], grid, only=STEPS[name][1])
        (step,) = [s for s in job.steps if s.name != STREAM]
        row = measure(job, step, args.repeats, ceiling)
        result["steps"][name] = row
        record.write_json(args.output, result)
        print(f"{name}: {row['ms']:.0f} ms, compiled in {row['compile_s']:.0f} s", flush=True)
    try:
        if GRADIENT in only and size:
            result["rollout_gradient"] = measure_gradient(size, args.repeats)
    finally:  # what was measured is shown even if the gradients are not the same
        result["wall_s"] = time.perf_counter() - begin
        record.write_json(args.output, result)
        show(result)


def show(result: dict) -> None:
    """Prints the figures, the tables last."""
    peak, ceilings = memory.peak_bytes(), result["ceilings"]
    print(
        f"{result['device']} ({result['cpu']}), {result['clock']}; {result['dtype']}, {result['wall_s']:.0f} s in all"
    )
    matmul, copy = ceilings["matmul_flops_per_s"] / 1e12, ceilings["copy_bytes_per_s"] / 1e9
    print(f"ceilings: matmul {matmul:.3g} TFLOP/s, copy {copy:.3g} GB/s")
    print(f"peak memory {peak['bytes'] / 2**20:.0f} MiB: {peak['source']}")
    if "rollout_gradient" in result:
        forms = dict(result["rollout_gradient"])
        print(f"the two gradients differ by {forms.pop('relative_difference'):.1e} of their norm")
        cells = [[name, row["ms"], row["temporary_MiB"], row["compile_s"]] for name, row in forms.items()]
        print(record.table(["rollout gradient", "ms", "temporary MiB", "compile s"], cells))
    cells = [
        [
            name,
            row["ms"],
            row["model_flops"] / 1e12,
            row["executed_flops"] / 1e12,
            row["mfu"],
            row["hfu"],
            row["program_bytes"]["total"] / 2**20,
            row["compile_s"],
        ]
        for name, row in result["steps"].items()
    ]
    header = ["step", "ms", "TFLOP, model", "executed", "MFU", "HFU", "program MiB", "compile s"]
    print(record.table(header, cells))


if __name__ == "__main__":
    cli.run(main)
