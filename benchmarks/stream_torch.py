"""A streamed frame next to PyTorch's at the same size, on the same device, in one run.

    JAX_PLATFORMS=cpu python benchmarks/stream_torch.py --output benchmarks/results/stream-torch.json
    python benchmarks/stream_torch.py --size wan1_3b --compile --output benchmarks/results/stream-torch.json

Random weights. The peer is a causal student in the manner of Self-Forcing, written for this comparison
(`torch_causal.py`): preallocated key cache, torch's fused attention, eager, and with --compile under
`torch.compile` as well. It gets our causal student's weights, noise and dtype, makes the same number of evaluations and
the clean pass, and its frames are compared with ours at every chunk; in bfloat16, where they can only be near, both are
compared in float32 at a small size first. Ours is timed twice: the same causal student, and ETM + SDD cut from a
teacher of that size, which is another model. Chunks are timed in turns after the window is full; medians per latent
frame. On a CPU times are CPU time of one pinned thread, on a GPU synchronised wall time, and PyTorch and jax share the
GPU's memory.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from sizes import SIZES, Size
from torch_causal import TorchCausal, step_noise
from torch_rate import matmul_rates

from greedy_distill_jax import cli
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.diffusion import noise_levels
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.measure import clock, environment, record
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.streaming.session import programs
from greedy_distill_jax.testing import tiny

EAGER, COMPILED = "eager PyTorch, causal", "compiled PyTorch, causal"
CAUSAL, ETM_SDD = "ours, causal", "ours, ETM + SDD (another model)"
# Largest difference of a chunk, relative to its standard deviation; errors add up over a stream.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}


def _ours(size: Size, student: str, plan: StepPlan):
    """(run, text rows, state and programs of a stream); kernels are stored in the dtype that they are used in."""
    run = size.run(student, read_settings(size.config(student), imagine_runs=True).wan.dtype)
    text = tiny.text_rows(1, jax.random.key(1), run.model.cfg.base)
    own = programs(make_streamer(run.model, plan))
    return run, text, own.init(run.params, text, jax.random.key(2), run.latent_shape[1:]), own


def measure(size: Size, steps: int, repeats: int, peers: Sequence[str], device: str) -> dict:
    """Milliseconds per latent frame, their ratios, and how far the causal frames are apart.

    Args:
      size: of ``sizes.SIZES``.
      steps: denoising steps.
      repeats: timed chunks.
      peers: of (EAGER, COMPILED).
      device: PyTorch's name of the device.

    Raises:
      RuntimeError: the frames of a peer are not ours.
    """
    plan = StepPlan((noise_levels.uniform_steps(steps, 5.0),), "renoise")
    run, text, state, own = _ours(size, "causal", plan)
    etm_run, _, etm_state, etm = _ours(size, "etm_sdd", plan)
    cfg = run.model.cfg
    options = dict(device=device, dtype=cfg.base.dtype)
    inputs = run.params, cfg, np.asarray(text, np.float32), plan.sigmas[0], run.latent_shape[1:3]
    others = {name: TorchCausal(*inputs, **options, compiled=name == COMPILED) for name in peers}
    etm_chunk = etm_run.model.cfg.chunk
    laps, worst = clock.Laps(), 0.0
    # Chunks until every slot is filled, and one more with the shapes that stay, which compiles.
    warm = max(own.warm_up, etm.warm_up) + 2

    for number in range(warm + repeats):
        noise = step_noise(state, steps)
        counts = number >= warm
        state, ours = laps.time(CAUSAL, own.step(number), run.params, state, per=cfg.chunk, counts=counts)
        ours = np.asarray(ours, np.float32)
        for name, peer in others.items():
            theirs = laps.time(name, peer.step, [peer.tensor(x) for x in noise], per=cfg.chunk, counts=counts)
            theirs = theirs.float().cpu().numpy()
            difference = float(np.abs(theirs - ours).max() / ours.std())
            if not difference < TOLERANCE[cfg.base.dtype]:  # not a number is no pass either
                raise RuntimeError(f"chunk {number}: {name} differs by {difference:.1e}; no times of unlike work")
            worst = max(worst, difference)
        etm_state, _ = laps.time(ETM_SDD, etm.step(number), etm_run.params, etm_state, per=etm_chunk, counts=counts)
    ms = {name: laps.median_ms(name) for name in (*peers, CAUSAL, ETM_SDD)}
    return {
        "ms_per_latent_frame": ms,
        "ratios": {f"{peer} / {name}": ms[peer] / ms[name] for peer in peers for name in (CAUSAL, ETM_SDD)},
        "largest_difference": worst,
        "config": {
            "latents": size.latent_shape,
            "dim": cfg.base.dim,
            "layers": cfg.base.num_layers,
            "steps": steps,
            "chunk": cfg.chunk,
            "window": cfg.window,
            "sink": cfg.sink,
            "dtype": cfg.base.dtype,
            "etm_layers": len(etm_run.model.cfg.etm_layers),
            "sdd_layers": len(etm_run.model.cfg.sdd_layers),
        },
    }


def _torch_device() -> str:
    """The device of jax's backend by PyTorch's name, prepared for fair float32."""
    backend = jax.default_backend()
    if backend not in ("cpu", "gpu"):
        raise UserError(f"jax runs on a {backend}, which PyTorch does not; use a GPU, or JAX_PLATFORMS=cpu.")
    import torch

    if backend == "cpu":
        torch.set_num_threads(1)
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError("jax sees a GPU and PyTorch does not; install a CUDA build of torch, or set JAX_PLATFORMS=cpu.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return "cuda"


def main(argv: list[str]) -> None:
    """Command line."""
    parser = cli.Parser(prog="python benchmarks/stream_torch.py", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, nargs="+", default=["small", "medium"])
    parser.add_argument("--steps", type=int, default=4, help="evaluations per chunk, besides the clean pass (4)")
    parser.add_argument("--repeats", type=int, default=5, help="chunks that are timed (5)")
    parser.add_argument("--compile", action="store_true", help="time the peer under torch.compile, too")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.repeats < 1:
        raise UserError(f"--steps {args.steps} --repeats {args.repeats}: both must be at least 1.")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave PyTorch memory on a GPU
    clock.one_thread()
    device, peers = _torch_device(), (EAGER, COMPILED) if args.compile else (EAGER,)
    dtypes = {read_settings(SIZES[name].config("causal"), imagine_runs=True).wan.dtype for name in args.size}
    result = {
        **environment.environment(),
        "matmul_flops_per_s": {dtype: matmul_rates(dtype) for dtype in sorted(dtypes)},
        "sizes": {},
    }
    if dtypes != {"float32"}:
        with jax.default_matmul_precision("highest"):
            result["float32_check"] = measure(SIZES["tiny"], args.steps, 1, peers, device)["largest_difference"]
    for name in args.size:
        result["sizes"][name] = measure(SIZES[name], args.steps, args.repeats, peers, device)
        record.write_json(args.output, result)
    rows = [
        [
            name,
            f"{row['config']['latents'][0]}x{row['config']['latents'][1]}",
            row["config"]["dim"],
            *row["ms_per_latent_frame"].values(),
            *row["ratios"].values(),
            f"{row['largest_difference']:.0e}",
        ]
        for name, row in result["sizes"].items()
    ]
    print(f"{result['device']} ({result['cpu']}), {result['clock']}")
    for dtype, rates in result["matmul_flops_per_s"].items():
        print(f"matmul, {dtype}: {', '.join(f'{name} {rate / 1e9:.0f} GFLOP/s' for name, rate in rates.items())}")
    header = [
        "size",
        "latents",
        "width",
        *(f"{name}, ms/frame" for name in (*peers, CAUSAL, ETM_SDD)),
        *next(iter(result["sizes"].values()))["ratios"],
        "causal frames differ by",
    ]
    print(record.table(header, rows))


if __name__ == "__main__":
    cli.run(main)
