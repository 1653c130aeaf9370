"""Which kernel this process runs on: whose locks and process numbers mean something here."""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path


@functools.cache
def kernel() -> str:
    """Names the running kernel: the host's name and, where Linux tells it, the boot's id.

    The name alone is not enough: containers of one name may write to the same network file system.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}".strip()


@functools.cache
def process_numbers() -> str:
    """Names the set of processes in which a number is one process: those of a kernel, on Linux those of a container."""
    try:
        space = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        space = ""
    return f"{kernel()} {space}".strip()
