"""What writes the files of a run: versions of libraries, the commit of the package."""

import importlib.metadata
import os
import platform
import subprocess


def versions() -> dict[str, str]:
    """Versions by name, of Python and of what reads and writes the files of a run."""
    names = ("greedy_distill_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # the package itself, run from a checkout that is not installed
    return found


def source_commit() -> str | None:
    """The commit of the checkout that this package runs from; None for an installed package or without git."""
    try:
        command, here = ["git", "rev-parse", "HEAD"], os.path.dirname(os.path.abspath(__file__))
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
