"""Freed memory is kept where jax computes on a CPU, and nobody has said otherwise."""

import ctypes
import subprocess
import sys
import types

import pytest

from greedy_distill_jax.distribution import freed_memory
from greedy_distill_jax.distribution.freed_memory import wanted

# A thread frees and takes an array again, larger than any that glibc keeps by itself; the pages that it had to map.
TWICE = """
import ctypes, resource, sys, threading
from greedy_distill_jax.distribution.freed_memory import keep_freed_memory
assert keep_freed_memory() is (sys.argv[1] == "kept")
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = libc.malloc(2**27)
    ctypes.memset(array, 1, 2**27)
    libc.free(array)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
found = []
thread = threading.Thread(target=lambda: found.extend([faults(), faults()]))
thread.start(), thread.join()
print(*found)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc")
@pytest.mark.parametrize("said, kept", [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)], ids=["kept", "user"])
def test_an_array_gets_the_memory_of_the_one_before(subprocess_env, said, kept):
    command = [sys.executable, "-c", TWICE, "kept" if kept else "not"]
    env = {**subprocess_env, "JAX_PLATFORMS": "cpu", **said}
    first, second = map(
        int, subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()
    )
    assert first > 50, "fresh pages"
    assert (second < first / 10) is kept


@pytest.mark.parametrize("platform, said", [("win32", "cpu"), ("linux", "cuda")])
def test_the_c_library_is_asked_only_where_it_is_wanted(monkeypatch, platform, said):
    """Windows has none of that name."""
    monkeypatch.setattr(freed_memory, "sys", types.SimpleNamespace(platform=platform))
    monkeypatch.delattr(freed_memory.ctypes, "CDLL")
    monkeypatch.setenv("JAX_PLATFORMS", said)
    assert freed_memory.keep_freed_memory() is False


@pytest.mark.parametrize(
    "environment, device, expected",
    [
        ({}, "", True),
        ({}, "dev/nvidia0", False),
        ({}, "dev/vfio/0", False),
        ({"JAX_PLATFORMS": "cpu"}, "dev/nvidia0", True),
        ({"JAX_PLATFORMS": "cuda,cpu"}, "", False),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, "", False),
        ({"MALLOC_TRIM_THRESHOLD_": "1"}, "", False),
    ],
    ids=str,
)
def test_only_for_a_cpu(tmp_path, environment, device, expected):
    if device:
        (tmp_path / device).parent.mkdir(parents=True)
        (tmp_path / device).touch()
    assert wanted(environment, tmp_path) is expected
