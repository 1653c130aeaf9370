"""What the command needs, what is there and what is missing; said before anything is measured."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from device_items.record import driver
from greedy_distill_jax import cli
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage import versions as storage_versions

JAX = "0.10.2"  # as setup.py has it
# GiB of a device at 1.3B. Compiled (docs/pods.md): training's generator step, and stage 1, of which there is a trace;
# the others are estimates.
MEMORY = {
    "ceilings": 4,
    "correctness": 4,
    "streaming": 16,
    "torch_peer": 24,
    "attention": 24,
    "training": 72,
    "trace": 51,
}
FRACTION = "0.93"  # of the device, that jax takes for an item
SECONDS = 120  # until a device that does not answer counts as none
_KEY = "found: "


def missing(size: str, items: Sequence[str]) -> str:
    """Prints what is needed and what is there; returns what is missing, "" if nothing is.

    Args:
      size: "tiny" runs on a CPU, too; any other needs an accelerator.
      items: that are to be measured.
    """
    most = max(items, key=MEMORY.__getitem__)
    device = "no accelerator" if size == "tiny" else f"a device with {MEMORY[most]} GiB free ({most})"
    print(f"needs: {device}, jax {JAX} or newer and what else the package imports; PyTorch for the rows beside it")
    installed = versions()
    if "jax" in installed and _numbers(installed["jax"]) < _numbers(JAX):
        return f"jax {installed['jax']} is too old; {JAX} or newer is needed."
    found, card = _look(items), driver()
    free = _free(found, card)
    here = [found.get("kind", "no device")] + ([f"{free:.1f} GiB free"] if free else [])
    here += [f"driver {card['driver_version']}"] if card else []
    print(f"here: {', '.join(here + [f'{name} {version}' for name, version in installed.items()])}", flush=True)
    if "error" in found or size == "tiny":
        return found.get("error", "")
    if found["platform"] == "cpu":
        return _no_device(card)
    large = [item for item in items if free and free < MEMORY[item]]
    if not large:
        return ""
    fit = " ".join(item for item in items if item not in large)
    told = ", ".join(f"{item} needs {MEMORY[item]}" for item in large)
    remedy = f"end what else uses it, or measure the others (--only {fit})" if fit else "end what else uses it"
    return f"{free:.1f} GiB of the device are free and {told}; {remedy}."


def _no_device(card: Mapping[str, str]) -> str:
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return "JAX_PLATFORMS is 'cpu', so that jax uses no accelerator; unset it, or try --size tiny."
    if card:
        return f"jax does not use the {card['name']}; install its build for CUDA (pip install -e '.[cuda]')."
    return "there is no accelerator; --size tiny tries the command on a CPU."


def versions() -> dict[str, str]:
    """Of what the package runs on, and of PyTorch, which items import when they need it."""
    found = storage_versions.versions()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["torch"] = importlib.metadata.version("torch")
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _free(found: Mapping[str, Any], card: Mapping[str, str]) -> float:
    """GiB; 0 where nobody says."""
    known = [found["free"] / 2**30] if found.get("free") else []
    told = card.get("memory.free", "").split()  # what other processes have is known to the driver alone
    if found.get("platform") in ("gpu", "cuda") and told and told[0].isdigit():
        known.append(float(told[0]) / 1024)
    return min(known, default=0.0)


def _look(items: Sequence[str]) -> dict[str, Any]:
    """What a process of its own sees, so that the one that starts the items never holds a device."""
    command = [sys.executable, "-m", "device_items.needs", *items]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", FRACTION)
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"the device has not answered for {SECONDS} s; end what holds it, or start the machine again."}
    lines = [line for line in done.stdout.splitlines() if line.startswith(_KEY)]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1].removeprefix(_KEY))
    words = [line for line in done.stderr.splitlines() if line.strip()] or [f"it ended with {done.returncode}"]
    told = words[-1].strip()
    return {"error": told.removeprefix("error: ") if told.startswith("error: ") else f"looking for a device: {told}"}


def load(items: Sequence[str]) -> None:
    """Imports what the items import; UserError for what is not there."""
    try:
        for item in items:
            importlib.import_module(f"device_items.{item}")
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the package {package} is not installed (pip install -e . installs all).") from error
        raise UserError(f"the package {package} that is installed has no {error.name}.") from error


def _main(items: Sequence[str]) -> None:
    load(items)
    import jax

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    print(_KEY + json.dumps({"platform": device.platform, "kind": device.device_kind, "free": free}), flush=True)


if __name__ == "__main__":
    cli.run(_main)
