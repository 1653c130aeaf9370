"""Devices: the mesh."""

import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from greedy_distill_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")


def make_mesh(shape: Mapping[str, int], devices=None) -> Mesh:
    """Lays devices out over the axes of ``AXES``.

    Args:
      shape: size by axis, 1 where it is missing; one may be -1 and takes the remaining devices.
      devices: in their order; None for all that jax has, which it lists host by host, so that process p feeds the
        p-th part of every batch.

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
    return Mesh(devices.reshape([devices.size // known if s == -1 else s for s in sizes]), AXES)


def batch_parts(mesh: Mesh) -> int:
    """Returns into how many parts a batch is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def feeding(parts: int, process: int, processes: int) -> tuple[int, int]:
    """(the share of every batch that a process feeds, number of shares); (0, 0) where neither number divides the other.

    With more processes than parts, as where ``context`` or ``tensor`` spans hosts, several feed the same share.

    Args:
      parts: see ``batch_parts``.
      process, processes: its number, and how many there are.
    """
    if parts % processes and processes % parts:
        return 0, 0
    shares = min(parts, processes)
    return process * shares // processes, shares


def memory_bytes() -> int:
    """Returns the bytes of memory of the first device, or of a machine that computes itself; 0 where nobody says."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
