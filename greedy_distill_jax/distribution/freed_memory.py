"""On a CPU, memory that an update or a frame has freed is kept for the next one.

glibc hands large arrays back to the system as soon as they are freed, and the next step has fresh pages mapped and
cleared in their place (docs/benchmarks.md has what that costs). On accelerators arrays do not come from there.
"""

import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

# Options of mallopt: no array in pages of its own, nothing handed back below 2 GiB, and one heap. Each thread of XLA's
# would have another one, and heaps other than the first are in pieces of 64 MiB that are handed back at once.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
KEPT = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_ARENA_MAX: 1}
DEVICES = ("dev/nvidia[0-9]*", "dev/accel*", "dev/vfio/[0-9]*", "dev/kfd")


def keep_freed_memory() -> bool:
    """Keeps freed memory from now on, where jax will compute on a CPU; says whether it does.

    It must be called before jax starts its threads. Does nothing with another C library than glibc of Linux, or where
    MALLOC_* or GLIBC_TUNABLES are set, which say what is wanted.
    """
    if sys.platform != "linux" or not wanted(os.environ):
        return False
    libc = ctypes.CDLL(None)  # Windows has none
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all([libc.mallopt(option, value) for option, value in KEPT.items()])


def wanted(environment: Mapping[str, str], root: Path = Path("/")) -> bool:
    """Whether jax will compute on a CPU, by its variable or for want of another device; ``root`` has ``dev``."""
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environment):
        return False
    if platforms := environment.get("JAX_PLATFORMS", ""):
        return platforms.partition(",")[0] == "cpu"
    return not any(any(root.glob(device)) for device in DEVICES)
