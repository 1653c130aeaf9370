"""What benchmarks share: synchronised times, memory, ceilings of the device, and the record they write.

On a CPU a time is the process's CPU time in one pinned thread, so that neighbours on the machine do not count; on an
accelerator it is wall time until the result is ready.
"""

import importlib.metadata
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from greedy_distill_jax.storage.checkpoint import source_commit, versions

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
MATMUL = {"cpu": 1024}  # side of the square matmul that is the ceiling, by platform
COPY = {"cpu": 2**26}  # bytes of the copy
LARGE_MATMUL, LARGE_COPY = 8192, 2**30  # the same on accelerators


def one_thread() -> None:
    """One thread for work on the CPU, and one core where there is no accelerator; call it before jax has a backend."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip()
    os.environ["OMP_NUM_THREADS"] = "1"
    if jax.default_backend() == "cpu":
        core = {min(os.sched_getaffinity(0))}
        for thread in os.listdir("/proc/self/task"):  # the backend has started some already
            os.sched_setaffinity(int(thread), core)


def clock() -> float:
    """Seconds: CPU time of the process on a CPU, wall time on an accelerator."""
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def seconds(run: Callable[[], Any]) -> float:
    """``clock`` from the call to the moment everything it returns is there."""
    start = clock()
    jax.block_until_ready(run())
    return clock() - start


def median_ms(run: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of ``repeats`` runs after a first one, which may compile."""
    seconds(run)
    return 1e3 * statistics.median(seconds(run) for _ in range(repeats))


def program_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """What a compiled program needs on its device, by the compiler's account; donated arguments count once."""
    memory = compiled.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    return {**parts, "total": sum(parts.values())}


def peak_bytes() -> dict[str, Any]:
    """{"bytes", "source"} of the most memory this process has had in use so far."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"bytes": int(stats["peak_bytes_in_use"]), "source": "device memory in use, peak of the process so far"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return {"bytes": peak, "source": "resident host memory, peak of the process so far (compilation included)"}


def ceilings(dtype: str, repeats: int = 5) -> dict[str, float]:
    """What this device reaches at most, measured: {"matmul_flops_per_s", "copy_bytes_per_s"} (read + written).

    Args:
      dtype: of the matmul's operands, "bfloat16" or "float32".
      repeats: timed runs of each; the best counts.
    """
    platform = jax.default_backend()
    n, size = MATMUL.get(platform, LARGE_MATMUL), COPY.get(platform, LARGE_COPY)
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.dtype(dtype)) for i in range(2))
    x = jax.random.normal(jax.random.key(2), (size // 4,), jnp.float32)
    multiply, copy = jax.jit(jnp.matmul), jax.jit(jnp.negative)

    def best(run):
        seconds(run)
        return min(seconds(run) for _ in range(repeats))

    return {
        "matmul_flops_per_s": 2.0 * n**3 / best(lambda: multiply(a, b)),
        "copy_bytes_per_s": 2.0 * size / best(lambda: copy(x)),
    }


def environment() -> dict[str, Any]:
    """Where figures come from: device, clock, versions, commit."""
    found = dict(versions())
    for name in ("jaxlib", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpu = jax.default_backend() == "cpu"
    return {
        "device": "CPU, one pinned thread" if cpu else jax.devices()[0].device_kind,
        "clock": "process CPU time" if cpu else "wall time, synchronised",
        "versions": found,
        "commit": source_commit(),
    }


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Writes a record; None for nowhere."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats with three digits or as whole numbers, "" for None."""

    def text(cell) -> str:
        if isinstance(cell, float):
            return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:#.3g}"
        return "" if cell is None else str(cell)

    return "\n".join(f"| {' | '.join(map(text, row))} |" for row in (header, ["---"] * len(header), *rows))
