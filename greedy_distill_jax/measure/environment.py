"""Where figures come from: the device, the CPU's model, the clock, versions and commit; and what the device can reach.

Every benchmark and every report has this record, because times and ratios of times are the machine's, too.
"""

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from greedy_distill_jax.measure import clock
from greedy_distill_jax.storage.versions import source_commit, versions

MATMUL = {"cpu": 1024}  # side of the square matmul that is the ceiling, by platform
COPY = {"cpu": 2**26}  # bytes of the copy
LARGE_MATMUL, LARGE_COPY = 8192, 2**30  # the same on accelerators


def cpu_name() -> str:
    """Returns the CPU's model with family and number, since several CPUs share a marketing name."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    found = {name: re.search(rf"^{name}\s*:\s*(.+)$", text, re.M) for name in ("model name", "cpu family", "model")}
    if not found["model name"]:
        return platform.processor() or platform.machine()
    numbers = "-".join(match[1] for name, match in found.items() if match and name != "model name")
    return f"{found['model name'][1]} ({numbers})"


def device_name() -> str:
    """Returns the accelerator and its number, or how many cores of a CPU this process may use."""
    if jax.default_backend() != "cpu":
        return f"{jax.devices()[0].device_kind} x {jax.device_count()}"
    cores = len(os.sched_getaffinity(0))
    return "CPU, one pinned thread" if cores == 1 else f"CPU, {cores} cores"


def environment() -> dict[str, Any]:
    """Returns the record of where figures come from: {"device", "cpu", "clock", "versions", "commit"}."""
    peers = [name for name in ("torch", "diffusers") if name in sys.modules]
    found = versions() | {name: importlib.metadata.version(name) for name in ("jaxlib", *peers)}
    return {
        "device": device_name(),
        "cpu": cpu_name(),
        "clock": "process CPU time" if jax.default_backend() == "cpu" else "wall time, synchronised",
        "versions": found,
        "commit": source_commit(),
    }


def matmul_side() -> int:
    """Returns the side of the square matmul whose rate is this platform's ceiling."""
    return MATMUL.get(jax.default_backend(), LARGE_MATMUL)


def matmul_flops_per_s(multiply: Callable[[], Any], side: int, repeats: int = 5) -> float:
    """Measures the FLOP/s of a square matmul, by jax or by a peer; the best of ``repeats`` runs counts.

    Args:
      multiply: multiplies two matrices of that side and returns when the product is there (or returns jax arrays).
      side: rows and columns of the matrices.
      repeats: timed runs after a first one.
    """
    return 2.0 * side**3 / _best(multiply, repeats)


def ceilings(dtype: str, repeats: int = 5) -> dict[str, float]:
    """Measures what this device reaches at most: {"matmul_flops_per_s", "copy_bytes_per_s"} (read + written).

    Args:
      dtype: of the matmul's operands, "bfloat16" or "float32".
      repeats: timed runs of each; the best counts.
    """
    side, size = matmul_side(), COPY.get(jax.default_backend(), LARGE_COPY)
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.dtype(dtype)) for i in range(2))
    x = jax.random.normal(jax.random.key(2), (size // 4,), jnp.float32)
    multiply, copy = jax.jit(jnp.matmul), jax.jit(jnp.negative)
    return {
        "matmul_flops_per_s": matmul_flops_per_s(lambda: multiply(a, b), side, repeats),
        "copy_bytes_per_s": 2.0 * size / _best(lambda: copy(x), repeats),
    }


def _best(run: Callable[[], Any], repeats: int) -> float:
    clock.seconds(run)
    return min(clock.seconds(run) for _ in range(repeats))
