"""Devices: the mesh, and who feeds which part of a batch."""

import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from greedy_distill_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")


def make_mesh(shape: Mapping[str, int], devices=None) -> Mesh:
    """Lays devices out over the axes of ``AXES``.

    TPUs are laid out so that neighbours along an axis are neighbours in their slice's torus, where that can be
    (``mesh_utils``); several slices are put along the outer axes. Other devices are taken in the order of their
    numbers, which is host by host.

    Args:
      shape: size by axis, 1 where it is missing; one may be -1 and takes the remaining devices.
      devices: None for all that jax has.

    Raises:
      UserError: sizes that do not fit the devices (field "mesh").
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    sizes = [int(shape.get(axis, 1)) for axis in AXES]
    described = ", ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"mesh ({described}): sizes must be positive, and at most one may be -1", "mesh")
    known = int(np.prod([s for s in sizes if s != -1]))
    if devices.size % known or (-1 not in sizes and known != devices.size):
        ways = f"choose sizes whose product is {devices.size}, or set one of them to -1"
        if -1 in sizes:
            ways = f"take a multiple of {known} devices, or another mesh"
        raise UserError(
            f"mesh ({described}) does not fit {devices.size} devices; {ways} (the command compile finds the smallest "
            "slice of TPUs for a job)",
            "mesh",
        )
    return Mesh(_laid_out(list(devices.flat), [devices.size // known if s == -1 else s for s in sizes]), AXES)


def _laid_out(devices: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    options = {"devices": devices, "allow_split_physical_axes": True}
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, **options)
    data = math.gcd(slices, sizes[0])
    if sizes[1] % (fsdp := slices // data):
        raise UserError(
            f"mesh: {slices} slices of TPUs are put along data and fsdp, which are {sizes[0]} and {sizes[1]}; make "
            f"data a multiple of {slices}",
            "mesh",
        )
    return mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // data, sizes[1] // fsdp, *sizes[2:]), (data, fsdp, 1, 1), **options
    )


def batch_parts(mesh: Mesh) -> int:
    """Returns into how many parts a batch is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


@functools.cache  # asked for every array of every batch
def parts_of(mesh: Mesh, process: int) -> tuple[int, ...]:
    """The parts of every batch that a process's devices work on; its rows are those of the parts in this order.

    Several processes have the same parts where ``context`` or ``tensor`` spans them.
    """
    parts = mesh.devices.reshape(batch_parts(mesh), -1)
    return tuple(i for i, devices in enumerate(parts) if any(d.process_index == process for d in devices))


@functools.cache
def feeding(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """``parts_of`` every process.

    Raises:
      UserError: processes that share some of their parts and not all, or have not as many.
    """
    processes = sorted({device.process_index for device in mesh.devices.flat})
    found = {process: parts_of(mesh, process) for process in processes}
    sets = set(found.values())
    if sum(map(len, sets)) != batch_parts(mesh) or len(set(map(len, sets))) > 1:
        raise UserError(
            f"the {batch_parts(mesh)} data and fsdp parts of the mesh are fed unevenly by its {len(processes)} "
            f"processes ({', '.join(f'{p} feeds {parts}' for p, parts in tuple(found.items())[:3])}); choose other "
            f"sizes of config.mesh."
        )
    return found


def memory_bytes() -> int:
    """Returns the bytes of memory of the first device, or of a machine that computes itself; 0 where nobody says."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
