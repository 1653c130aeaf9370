"""A streamed frame next to one of eager PyTorch at the same size, in one run.

    JAX_PLATFORMS=cpu python benchmarks/stream_torch.py --output benchmarks/results/stream-torch.json

CPU only: process CPU time in one pinned thread, float32, random weights. The peer is a causal student in the manner of
Self-Forcing, written for this comparison (`testing/torch_causal.py`): preallocated key cache, torch's fused attention,
nothing compiled. It gets our causal student's weights and noise, makes the same number of evaluations and the clean
pass, and its frames are compared with ours at every chunk. Ours is timed twice: the same causal student, and ETM + SDD
cut from a teacher of that size. Chunks are timed in turns after the window is full; medians per latent frame.
"""

import statistics
from pathlib import Path

import jax
import numpy as np

from greedy_distill_jax import cli, profiling
from greedy_distill_jax.diffusion import schedules
from greedy_distill_jax.run import open_stream
from greedy_distill_jax.stream import Sampling
from greedy_distill_jax.stream_causal import make_streamer
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.testing.sizes import SIZES, Size
from greedy_distill_jax.testing.torch_causal import TorchCausal, step_noise
from greedy_distill_jax.types import UserError

PEER, CAUSAL, ETM_SDD = "eager PyTorch, causal", "ours, causal", "ours, ETM + SDD"
TOLERANCE = 1e-3  # of a frame in float32, relative to the standard deviation; errors add up over a stream


def _ours(size: Size, student: str, sampling: Sampling):
    """(run, text rows, state and step of a stream)."""
    run = size.run(student)
    text = tiny.text_rows(1, jax.random.key(1), run.model.cfg.base)
    opened = open_stream(make_streamer(run.model, sampling), run.params, text, jax.random.key(2), run.latent_shape[1:])
    return run, text, *opened


def measure(size: Size, steps: int, repeats: int) -> dict:
    """Milliseconds per latent frame of the three, their ratios, and how far the causal frames are apart."""
    sampling = Sampling((schedules.uniform_steps(steps, 5.0),), "renoise")
    run, text, state, step = _ours(size, "causal", sampling)
    etm_run, _, etm_state, etm_step = _ours(size, "etm_sdd", sampling)
    cfg = run.model.cfg
    peer = TorchCausal(run.params, cfg, np.asarray(text), sampling.sigmas[0], run.latent_shape[1:3])
    etm_chunk = etm_run.model.cfg.chunk
    times, worst = {name: [] for name in (PEER, CAUSAL, ETM_SDD)}, 0.0
    full = cfg.sink_chunks + cfg.ring_chunks + 1  # chunks until every slot is filled and one has been freed

    def spent(name, chunk, work, *args):
        start = profiling.clock()
        result = jax.block_until_ready(work(*args))
        if number >= full:
            times[name].append(1e3 * (profiling.clock() - start) / chunk)
        return result

    for number in range(full + repeats):
        noise = step_noise(state, steps)
        state, ours = spent(CAUSAL, cfg.chunk, step, run.params, state)
        theirs = spent(PEER, cfg.chunk, peer.step, noise)
        etm_state, _ = spent(ETM_SDD, etm_chunk, etm_step, etm_run.params, etm_state)
        difference = float(np.abs(theirs - np.asarray(ours)).max() / np.asarray(ours).std())
        if not difference < TOLERANCE:  # not a number is no pass either
            raise RuntimeError(f"chunk {number}: the causal frames differ by {difference:.1e}; no times of unlike work")
        worst = max(worst, difference)
    ms = {name: statistics.median(found) for name, found in times.items()}
    return {
        "ms_per_latent_frame": ms,
        "ratios": {f"{PEER} / {name}": ms[PEER] / ms[name] for name in (CAUSAL, ETM_SDD)},
        "largest_difference": worst,
        "config": {
            "latents": size.latent_shape, "dim": cfg.base.dim, "layers": cfg.base.num_layers, "steps": steps,
            "chunk": cfg.chunk, "window": cfg.window, "sink": cfg.sink, "dtype": cfg.base.dtype,
            "etm_layers": len(etm_run.model.cfg.etm_layers), "sdd_layers": len(etm_run.model.cfg.sdd_layers),
        },
    }  # fmt: skip


def main(argv: list[str]) -> None:
    """Command line."""
    parser = cli.Parser(prog="python benchmarks/stream_torch.py", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[n for n in SIZES if n != "wan1_3b"], nargs="+", default=["small", "medium"])
    parser.add_argument("--steps", type=int, default=4, help="evaluations per chunk, besides the clean pass (4)")
    parser.add_argument("--repeats", type=int, default=5, help="chunks that are timed (5)")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.repeats < 1:
        raise UserError(f"--steps {args.steps} --repeats {args.repeats}: both must be at least 1.")
    profiling.one_thread()
    if jax.default_backend() != "cpu":
        raise UserError("this benchmark compares CPU times; run it with JAX_PLATFORMS=cpu.")
    import torch

    torch.set_num_threads(1)
    result = {**profiling.environment(), "sizes": {}}
    for name in args.size:
        result["sizes"][name] = measure(SIZES[name], args.steps, args.repeats)
        profiling.write_json(args.output, result)
    rows = [
        [name, f"{row['config']['latents'][0]}x{row['config']['latents'][1]}", row["config"]["dim"],
         *row["ms_per_latent_frame"].values(), *row["ratios"].values(), f"{row['largest_difference']:.0e}"]
        for name, row in result["sizes"].items()
    ]  # fmt: skip
    header = ["size", "latents", "width", *(f"{name}, ms/frame" for name in (PEER, CAUSAL, ETM_SDD)),
              "PyTorch / causal", "PyTorch / ETM + SDD", "causal frames differ by"]  # fmt: skip
    print(profiling.table(header, rows))


if __name__ == "__main__":
    cli.run(main)
