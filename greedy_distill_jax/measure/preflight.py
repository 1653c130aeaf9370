"""What can be known of the hosts of a job within seconds, before it trains: each looked at by its own process.

Devices, memory, disk, clocks, the folder that all are to share, and the sum over every axis of the mesh: is it right,
and how fast.
"""

import contextlib
import functools
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from greedy_distill_jax.distribution.hosts.alike import difference
from greedy_distill_jax.distribution.hosts.join import Joined, counted
from greedy_distill_jax.storage.versions import versions

GIB = 2**30
SKEW = 5.0  # seconds between two clocks: locks and the ages of partial files are told by them


class Sum(NamedTuple):
    """A sum over a mesh axis. devices: of the axis. seconds: median. sent: bytes of each device, in a ring."""

    axis: str
    devices: int
    right: bool
    seconds: float
    sent: float


def host_facts(joined: Joined, folder: Path, expected: int) -> dict[str, Any]:
    """What this process sees: devices, bytes that are free, versions, and whether the folder is shared.

    All processes have to call it together.

    Args:
      joined: this process.
      folder: that all hosts are to see, of the run.
      expected: devices of this process; 0 where nobody says.

    Returns:
      facts by name, with "wrong": what the process is to be refused for, in lines.
    """
    devices = jax.local_devices()
    seen = counted(joined, len(devices), devices[0].device_kind)
    stats = [device.memory_stats() or {} for device in devices]
    free = [stat["bytes_limit"] - stat.get("bytes_in_use", 0) for stat in stats if "bytes_limit" in stat]
    multihost_utils.sync_global_devices("preflight: clocks")
    now = time.time()
    unshared = shared_folder(joined, folder)
    return {
        "seen": seen,
        "expected": expected,
        "kind": devices[0].device_kind,
        "device_free": min(free, default=0),
        "memory_free": available_memory(),
        "disk_free": shutil.disk_usage(folder).free if folder.is_dir() else 0,
        "time": now,
        "versions": versions(),
        "shared": not unshared,
        "wrong": [f"{seen} of {expected} devices"] * (seen < expected) + unshared,
    }


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of the host's memory that programs can still take; 0 where the system does not say."""
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else 0


def shared_folder(joined: Joined, folder: Path) -> list[str]:
    """Writes, reads and renames a file in the folder, and reads that of the next process; what goes wrong, in lines.

    All processes have to call it together.
    """
    own, following = (
        folder / f".preflight-{index % joined.processes}" for index in (joined.process, joined.process + 1)
    )
    wrong = []
    try:
        _write(folder, own, joined.process)
    except OSError as error:
        wrong.append(f"{folder} cannot be written ({error.strerror})")
    multihost_utils.sync_global_devices("preflight: written")
    try:
        if not wrong and following.read_text() != following.name:
            wrong.append(f"{following} is not what its process wrote")
    except OSError as error:
        wrong.append(f"{folder} is not the folder that the other processes see ({following.name}: {error.strerror})")
    multihost_utils.sync_global_devices("preflight: read")
    with contextlib.suppress(OSError):  # what could not be written
        own.unlink()
    return wrong


def _write(folder: Path, own: Path, process: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".preflight-{process}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(own.name)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, own)


def sums(mesh: Mesh, size: int, repeats: int = 5) -> Iterator[Sum]:
    """Sums an array over every axis of the mesh that has several devices; all processes go through it together.

    Args:
      mesh: of the run.
      size: bytes of the array that each device has.
      repeats: timed sums; the median counts.
    """
    numbers = np.arange(mesh.size, dtype=np.float32).reshape(mesh.devices.shape)
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    given = jax.make_array_from_callback(
        (mesh.size, size // 4), sharding, lambda index: np.full((1, size // 4), index[0].start or 0, np.float32)
    )
    for number, (axis, count) in enumerate(mesh.shape.items()):
        if count == 1:
            continue
        total = jax.jit(
            jax.shard_map(
                functools.partial(jax.lax.psum, axis_name=axis),
                mesh=mesh,
                in_specs=sharding.spec,
                out_specs=PartitionSpec(tuple(name for name in mesh.axis_names if name != axis)),
            )
        )
        expected = numbers.sum(number).ravel()
        found = jax.block_until_ready(total(given))
        right = all(
            (np.asarray(shard.data) == expected[shard.index[0]][:, None]).all() for shard in found.addressable_shards
        )
        spent = []
        for _ in range(repeats):
            start = time.perf_counter()  # the wait for other hosts costs no CPU time
            jax.block_until_ready(total(given))
            spent.append(time.perf_counter() - start)
        yield Sum(axis, count, right, statistics.median(spent), 2 * (count - 1) / count * size)


def problems(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with a job, one line each, naming process and host.

    Args:
      facts: ``host_facts`` of all processes, in their order, with "host".
    """
    lines = [f"process {i} ({fact['host']}): {line}" for i, fact in enumerate(facts) for line in fact["wrong"]]
    for index, (fact, skewed) in enumerate(zip(facts, skew(facts), strict=True)):
        if abs(skewed) > SKEW:
            where = f"process {index} ({fact['host']})"
            lines.append(f"{where}: its clock is {skewed:+.1f} s from the others'; set the clocks of all hosts by NTP")
    devices = [{"devices": f"{fact['seen']} x {fact['kind']}", "host": fact["host"]} for fact in facts]
    return lines + [line for line in [difference(devices)] if line]


def skew(facts: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds by which each process's clock is before the median of all, read when they left one barrier."""
    times = sorted(fact["time"] for fact in facts)
    return [fact["time"] - times[(len(times) - 1) // 2] for fact in facts]


def table_of_hosts(facts: Sequence[Mapping[str, Any]]) -> str:
    """A row per process, and the versions of the first."""
    rows = [("process", "host", "devices", "kind", "device GiB", "memory GiB", "disk GiB", "clock s", "shared folder")]
    for index, (fact, skewed) in enumerate(zip(facts, skew(facts), strict=True)):
        devices = f"{fact['seen']} of {fact['expected'] or '?'}"
        free = [_gib(fact[name]) for name in ("device_free", "memory_free", "disk_free")]
        shared = "good" if fact["shared"] else "wrong"
        rows.append((str(index), str(fact["host"]), devices, str(fact["kind"]), *free, f"{skewed:+.2f}", shared))
    versions_of_first = " ".join(f"{name} {version}" for name, version in facts[0]["versions"].items())
    return f"{aligned(rows)}\n{versions_of_first}"


def table_of_sums(totals: Sequence[Sum], size: int) -> str:
    """A row per mesh axis with several devices; "" where none has."""
    rows = [("axis", "devices", f"sum of {size / 2**20:g} MiB", "GB/s per device")]
    for total in totals:
        rate = f"{total.sent / total.seconds / 1e9:.2f}" if total.right else "wrong sum"
        rows.append((total.axis, str(total.devices), f"{1e3 * total.seconds:.2f} ms", rate))
    return aligned(rows) if totals else ""


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size else "?"
