"""Time and peak memory of conversion at the 1.3B shape, with generated weights.

    python benchmarks/convert.py --output benchmarks/results/convert.json

Every step runs in a process of its own; its CPU seconds are what it costs whatever else the machine does. "Beyond the
device copy" is the peak of resident memory minus what the process held before and minus the bytes of the parameters; on
a CPU the device copy lies in the same memory. It is compared with the largest shard of a stacked parameter, the unit in
which weights are streamed. Needs seven times the weights in disk space.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from greedy_distill_jax import cli
from greedy_distill_jax.convert import export_weights, import_weights
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.distribution.sharding import leaf_paths, shardings
from greedy_distill_jax.measure import environment, record
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.storage.checkpoint import Checkpointer
from greedy_distill_jax.weights import names
from greedy_distill_jax.weights.architecture import parameter_shapes
from greedy_distill_jax.weights.load import load
from greedy_distill_jax.weights.lora import Adapter, MergedSource
from greedy_distill_jax.weights.open import open_source
from greedy_distill_jax.weights.source import Source
from greedy_distill_jax.weights.verify import compare
from greedy_distill_jax.weights.write import tensors_of, write

LIMIT = 1.5  # of the largest stacked shard


class Generated(Source):
    """Random weights that exist only while they are read."""

    path, format = Path("generated"), "ours"

    def __init__(self, cfg: WanConfig, dtype: str):
        self.cfg, self.meta = cfg, {}
        self.dtypes = dict.fromkeys(self.shapes, np.dtype(jax.numpy.dtype(dtype)))

    def read_layer(self, path, layer, index):
        """The same numbers for the same leaf and layer."""
        shape = self.shapes[path][1:] if path.startswith("blocks/") else self.shapes[path]
        rng = np.random.default_rng([layer, *path.encode()])
        return rng.standard_normal(shape, np.float32)[index].astype(self.dtypes[path])


def generate_fp8(cfg: WanConfig, folder: Path) -> None:
    """The matrices of the blocks in FP8 with a scale each, in one file, and the rest in bfloat16."""
    state, source = {}, Generated(cfg, "bfloat16")
    for name, value in tensors_of(source, "original", "keep"):
        if name.startswith("blocks.") and value.ndim == 2:
            state[name.replace("weight", "scale_weight")] = np.ones((), np.float32)
            value = value.astype(jax.numpy.float8_e4m3fn)
        state[name] = value
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors")


def generate_lora(cfg: WanConfig, file: Path) -> None:
    """Factors of every linear of the blocks, of rank 64, or less where that would be no compression."""
    state, rng = {}, np.random.default_rng(0)
    for path, shape in parameter_shapes(cfg).items():
        if not path.startswith("blocks/") or not path.endswith("/kernel"):
            continue
        rank = min(64, *shape[1:])
        for name in names.foreign_names(path, shape, "original"):
            module = f"diffusion_model.{name.removesuffix('.weight')}"
            for letter, size in (("A", (rank, shape[1])), ("B", (shape[2], rank))):
                state[f"{module}.lora_{letter}.weight"] = rng.standard_normal(size, np.float32)
    save_file(state, file)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """The largest ``resident`` since ``reset_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def reset_peak() -> None:
    """Starts a new measurement."""
    Path("/proc/self/clear_refs").write_text("5")


def measured(function, device_bytes: int, shard_bytes: int) -> dict:
    """Seconds and memory of ``function()``."""
    jax.block_until_ready(jax.numpy.zeros(1))
    before = resident()
    reset_peak()
    start, cpu = time.perf_counter(), time.process_time()
    function()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    beyond = peak() - before - device_bytes
    return dict(
        seconds=round(seconds, 1),
        cpu_seconds=round(cpu, 1),
        peak_gb=round(peak() / 1e9, 2),
        beyond_device_gb=round(beyond / 1e9, 3),
        largest_shard_gb=round(shard_bytes / 1e9, 3),
        beyond_over_shard=round(beyond / shard_bytes, 2),
    )


def run_phase(phase: str, cfg: WanConfig, folder: Path, dtype: str) -> dict:
    """One measurement, or the preparation of one."""
    if phase == "generate":
        write(Generated(cfg, dtype), folder / "source", "original", shard_bytes=2 * 10**9)
        generate_fp8(cfg, folder / "fp8")
        generate_lora(cfg, folder / "lora.safetensors")
        return {}
    shapes, width = parameter_shapes(cfg), np.dtype(jax.numpy.dtype(dtype)).itemsize
    total, stacked = (f(int(np.prod(s)) for s in shapes.values()) * width for f in (sum, max))
    source, where = folder / "source", None
    if phase.startswith("load"):
        if phase == "load_fsdp4":
            where = functools.partial(shardings, mesh=make_mesh({"fsdp": 4}))
            stacked //= 4
        kept = []
        return measured(lambda: kept.append(load(open_source(source), sharding=where)), total, stacked)
    if phase == "import":
        return measured(lambda: import_weights(open_source(source), folder / "ours"), total, stacked)
    if phase == "import_fp8":
        fp8 = open_source(folder / "fp8", heads=cfg.num_heads, text_len=cfg.text_len)
        return measured(lambda: import_weights(fp8, folder / "a", dtype=dtype), total, stacked)
    if phase == "import_lora":
        merged = MergedSource(open_source(source), [(Adapter(folder / "lora.safetensors"), 1.0)])
        return measured(lambda: import_weights(merged, folder / "b"), total, stacked)
    if phase == "restore_fsdp4":
        mesh, kept = make_mesh({"fsdp": 4}), []

        def restore():
            with Checkpointer(folder / "ours" / "checkpoints", read_only=True) as checkpointer:
                kept.append(checkpointer.restore_subtree(0, "nets/teacher/ema", sharding=lambda t: shardings(t, mesh)))

        result = measured(restore, total, stacked // 4)
        assert len(list(leaf_paths(kept[0]))) == len(shapes)
        return result
    if phase == "verify":
        start = time.perf_counter()
        different = compare(open_source(source), open_source(folder / "exported"))
        return dict(seconds=round(time.perf_counter() - start, 1), tensors_that_differ=len(different))
    form = phase.removeprefix("export_")
    target = folder / ("exported.pt" if form == "causal-pt" else "exported")
    options = dict(overwrite=True, shard_bytes=2 * 10**9)
    return measured(lambda: export_weights(open_source(folder / "ours"), target, form, **options), 0, stacked)


PHASES = (
    *("generate", "load", "load_fsdp4", "import", "import_fp8", "import_lora", "restore_fsdp4"),
    *("export_diffusers", "export_original", "verify"),
)


def main() -> None:
    """Command line."""
    parser = cli.Parser(description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="wan1_3b", choices=WAN_SIZES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--folder", help="where the temporary files go (default: the system's)")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cfg = WanConfig(**WAN_SIZES[args.size])
    if args.phase:
        print(json.dumps(run_phase(args.phase, cfg, Path(args.folder), args.dtype)))
        return
    result = dict(size=args.size, dtype=args.dtype, **environment.environment())
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for phase in PHASES:
            flags = " --xla_force_host_platform_device_count=4" if phase.endswith("fsdp4") else ""
            env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + flags}
            command = [sys.executable, __file__, "--phase", phase, "--folder", folder]
            command += ["--size", args.size, "--dtype", args.dtype]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            result[phase] = json.loads(done.stdout.splitlines()[-1])
            print(phase, result[phase], flush=True)
    assert result["verify"]["tensors_that_differ"] == 0
    over = [p for p in ("load", "load_fsdp4") if result[p]["beyond_over_shard"] > LIMIT]
    print(f"streaming stays under {LIMIT} x the largest shard: {'no, ' + ', '.join(over) if over else 'yes'}")
    record.write_json(args.output, result)


if __name__ == "__main__":
    cli.run(main)
