"""A streamed frame next to PyTorch's at the same size, on the same device, in one run.

    JAX_PLATFORMS=cpu python benchmarks/stream_torch.py --output benchmarks/results/stream-torch.json
    python benchmarks/stream_torch.py --size wan1_3b --compile default reduce-overhead max-autotune-no-cudagraphs \
        --output benchmarks/results/stream-torch.json

Random weights. The peer is a causal student in the manner of Self-Forcing, written for this comparison
(`torch_causal.py`): preallocated key cache, torch's fused attention, eager, and with --compile under `torch.compile` as
well, in the modes that are named (without a name: its default). It gets our causal student's weights, noise and dtype,
makes the same number of evaluations and the clean pass, and its frames are compared with ours at every chunk; in
bfloat16, where they can only be near, both are compared in float32 at a small size first. ETM + SDD, cut from a teacher
of that size and another model, is timed in the same way beside the PyTorch student that `convert export --format
torch-student` writes of it. Chunks are timed in turns after the window is full; medians per latent frame. On a CPU
times are CPU time of one pinned thread, on a GPU synchronised wall time, and PyTorch and jax share the GPU's memory.
"""

import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from greedy_distill_jax.weights.source import TreeSource
from greedy_distill_jax.weights.write import write

CAUSAL, ETM_SDD = "ours, causal", "ours, ETM + SDD (another model)"
MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")  # of torch.compile


class Peer(NamedTuple):
    """A stream of PyTorch's: of which of our students, and its mode of ``torch.compile``, None for eager."""

    ours: str
    mode: str | None = None

    @property
    def name(self) -> str:
        """Of its column."""
        student = "causal" if self.ours == CAUSAL else "exported ETM + SDD"
        if self.mode is None:
            return f"eager PyTorch, {student}"
        return f"compiled PyTorch{'' if self.mode == 'default' else f' ({self.mode})'}, {student}"


# Largest difference of a chunk, relative to its standard deviation; errors add up over a stream.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}


class Exported:
    """A stream of the PyTorch student that ETM + SDD is exported to, with the calls of ``TorchCausal``."""

    def __init__(self, ours: "Ours", plan: StepPlan, device: str, *, mode: str | None):
        import torch

        self.torch, cfg = torch, ours.run.model.cfg
        self.device = torch.device(device)
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "student"
            write(TreeSource(cfg, ours.run.params, {"plan": dataclasses.asdict(plan)}), target, "torch-student")
            spec = importlib.util.spec_from_file_location("torch_student", target / "torch_student.py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            dtype = getattr(torch, cfg.base.dtype)
            student = module.Student.from_pretrained(target, device=device, dtype=dtype).eval()
        if mode is not None:
            student.compile(mode=mode)
        text = torch.from_numpy(np.array(ours.text, np.float32)).to(self.device)
        self.stream = student.stream(text, ours.run.latent_shape[1:3])

    def tensor(self, value: np.ndarray):
        """An array [B, g, H, W, C] as the exported student has it, [B, g, C, H, W]."""
        return self.torch.from_numpy(np.array(value)).permute(0, 1, 4, 2, 3).to(self.device)

    def step(self, noise: Sequence[Any]) -> Any:
        """The next clean chunk [B, g, H, W, C], ready."""
        x = self.stream.step(list(noise))
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)
        return x.permute(0, 1, 3, 4, 2)


class Ours:
    """A stream of ours; kernels are stored in the dtype that they are used in."""

    def __init__(self, size: Size, student: str, plan: StepPlan):
        self.run = size.run(student, read_settings(size.config(student), imagine_runs=True).wan.dtype)
        self.text = tiny.text_rows(1, jax.random.key(1), self.run.model.cfg.base)
        self.programs = programs(make_streamer(self.run.model, plan))
        shape = self.run.latent_shape[1:]
        self.state = self.programs.init(self.run.params, self.text, jax.random.key(2), shape)


def measure(size: Size, steps: int, repeats: int, peers: Sequence[Peer], device: str) -> dict:
    """Milliseconds per latent frame, their ratios, and how far the causal frames are apart.

    Args:
      size: of ``sizes.SIZES``.
      steps: denoising steps.
      repeats: timed chunks.
      peers: what to time beside ours.
      device: PyTorch's name of the device.

    Raises:
      RuntimeError: the frames of a peer are not ours.
    """
    plan = StepPlan((noise_levels.uniform_steps(steps, 5.0),), "renoise")
    ours = {CAUSAL: Ours(size, "causal", plan), ETM_SDD: Ours(size, "etm_sdd", plan)}
    run, etm_cfg = ours[CAUSAL].run, ours[ETM_SDD].run.model.cfg
    cfg = run.model.cfg
    inputs = run.params, cfg, np.asarray(ours[CAUSAL].text, np.float32), plan.sigmas[0], run.latent_shape[1:3]

    def stream_of(peer: Peer):
        if peer.ours == ETM_SDD:
            return Exported(ours[ETM_SDD], plan, device, mode=peer.mode)
        return TorchCausal(*inputs, device=device, dtype=cfg.base.dtype, mode=peer.mode)

    others = {peer: stream_of(peer) for peer in peers}
    laps, worst = clock.Laps(), dict.fromkeys(ours, 0.0)
    # Chunks until every slot is filled, and one more with the shapes that stay, which compiles.
    warm = max(one.programs.warm_up for one in ours.values()) + 2

    for number in range(warm + repeats):
        for kind, one in ours.items():
            options = dict(per=one.run.model.cfg.chunk, counts=number >= warm)
            noise = step_noise(one.state, steps)
            one.state, x = laps.time(kind, one.programs.step(number), one.run.params, one.state, **options)
            x = np.asarray(x, np.float32)
            for peer, stream in ((peer, stream) for peer, stream in others.items() if peer.ours == kind):
                theirs = laps.time(peer.name, stream.step, [stream.tensor(y) for y in noise], **options)
                difference = float(np.abs(theirs.float().cpu().numpy() - x).max() / x.std())
                if not difference < TOLERANCE[cfg.base.dtype]:  # not a number is no pass either
                    raise RuntimeError(
                        f"chunk {number}: {peer.name} differs by {difference:.1e}; no times of unlike work"
                    )
                worst[kind] = max(worst[kind], difference)
    ms = {name: laps.median_ms(name) for name in (*(peer.name for peer in peers), CAUSAL, ETM_SDD)}
    return {
        "ms_per_latent_frame": ms,
        "ratios": {f"{p.name} / {name}": ms[p.name] / ms[name] for p in peers for name in _beside(p, peers)},
        "largest_difference": max(worst.values()),
        "largest_difference_of": worst,
        "config": {
            "latents": size.latent_shape,
            "dim": cfg.base.dim,
            "layers": cfg.base.num_layers,
            "steps": steps,
            "chunk": cfg.chunk,
            "window": cfg.window,
            "sink": cfg.sink,
            "dtype": cfg.base.dtype,
            "etm_layers": len(etm_cfg.etm_layers),
            "sdd_layers": len(etm_cfg.sdd_layers),
        },
    }


def _beside(peer: Peer, peers: Sequence[Peer]) -> list[str]:
    """What a peer's time is divided by: ours, and of a compiled one its eager self."""
    ours, eager = [CAUSAL, ETM_SDD] if peer.ours == CAUSAL else [ETM_SDD], peer._replace(mode=None)
    return ours + [eager.name] * (peer != eager and eager in peers)


def _torch_device() -> str:
    """The device of jax's backend by PyTorch's name, prepared for fair float32."""
    backend = jax.default_backend()
    if backend not in ("cpu", "gpu"):
        raise UserError(f"jax runs on a {backend}, which PyTorch does not; use a GPU, or JAX_PLATFORMS=cpu.")
    import torch

    # Streams compiled one after another share their functions' graphs; one that gave up would run eagerly in silence.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
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
    parser.add_argument(
        "--compile", nargs="*", metavar="MODE", help=f"time PyTorch under torch.compile, too: {', '.join(MODES)}"
    )
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.repeats < 1:
        raise UserError(f"--steps {args.steps} --repeats {args.repeats}: both must be at least 1.")
    modes = [] if args.compile is None else args.compile or ["default"]
    if unknown := set(modes) - set(MODES):
        raise UserError(f"--compile {' '.join(sorted(unknown))}: choose from {', '.join(MODES)}.")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave PyTorch memory on a GPU
    clock.one_thread()
    device, peers = _torch_device(), [Peer(ours, mode) for ours in (CAUSAL, ETM_SDD) for mode in (None, *modes)]
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
    print(f"{result['device']} ({result['cpu']}), {result['clock']}")
    for dtype, rates in result["matmul_flops_per_s"].items():
        print(f"matmul, {dtype}: {', '.join(f'{name} {rate / 1e9:.0f} GFLOP/s' for name, rate in rates.items())}")
    header = ["size", "latents", "width", "", "ms/frame", "over ours", "over ours, ETM + SDD", "over eager"]
    print(record.table(header, [row for name, found in result["sizes"].items() for row in _rows(name, found)]))
    for name, found in result["sizes"].items():
        print(f"{name}: frames differ by {found['largest_difference']:.0e}")


def _rows(name: str, found: dict) -> list[list]:
    """Of a size, one for every stream: its time, and that over others'."""
    config, rows = found["config"], []
    for stream, ms in found["ms_per_latent_frame"].items():
        start = f"{stream} / "
        over = {key.removeprefix(start): ratio for key, ratio in found["ratios"].items() if key.startswith(start)}
        eager = next((ratio for other, ratio in over.items() if other.startswith("eager")), None)
        latents = "{}x{}".format(*config["latents"])
        rows.append([name, latents, config["dim"], stream, ms, over.get(CAUSAL), over.get(ETM_SDD), eager])
    return rows


if __name__ == "__main__":
    cli.run(main)
