"""What the command needs, what is there and what is missing; said before anything is measured.

A process of its own looks, so that the one that starts the items never holds a device.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from device_items.record import driver

JAX = "0.10.2"  # as setup.py has it
# GiB of a device at 1.3B. Training: the generator's step of stage 2 needs most (docs/pods.md). Others: its weights in
# float32 and bfloat16 and a stream's program, and PyTorch's copy of them.
MEMORY = {"training": 72.0}
OTHERS = 20.0
SECONDS = 120  # until a device that does not answer counts as none
_KEY = "needs: "


def missing(size: str, items: Sequence[str]) -> list[str]:
    """Prints what is needed and what is there; returns what is missing, a line each.

    Args:
      size: "tiny" runs on a CPU, too; any other needs an accelerator.
      items: that are to be measured.
    """
    most = max(items, key=lambda item: MEMORY.get(item, OTHERS))
    needed = MEMORY.get(most, OTHERS)
    device = "no accelerator" if size == "tiny" else f"a device with {needed:g} GiB free ({most})"
    print(f"needs: {device}, jax {JAX} or newer, the packages of setup.py; PyTorch for the rows beside it")
    found, card, versions = _look(items), driver(), _versions()
    free = _free(found, card)
    here = [found.get("kind", "no device")] + ([f"{free:.1f} GiB free"] if free else [])
    here += [f"driver {card['driver_version']}"] if card else []
    print(f"here: {', '.join(here + [f'{name} {version}' for name, version in versions.items()])}", flush=True)
    if "jax" in versions and _numbers(versions["jax"]) < _numbers(JAX):
        return [f"jax {versions['jax']} is too old; {JAX} or newer is needed"]
    wrong = [f"the package {name} is not installed (pip install -e . installs all)" for name in found["missing"]]
    wrong += [found["error"]] if "error" in found else []
    if size != "tiny" and not wrong:
        if found["platform"] == "cpu":
            wrong.append(_no_device(card, versions["jax"]))
        elif free and free < needed:
            wrong.append(
                f"{free:.1f} GiB of the device are free and {most} needs {needed:g}; end what else uses it, or leave "
                "the item out (--only)"
            )
    return wrong


def _no_device(card: Mapping[str, str], jax: str) -> str:
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return f"JAX_PLATFORMS is {platforms!r}, so that jax uses no accelerator; unset it, or try --size tiny"
    if card:
        return f"jax {jax} does not use the {card['name']}; install its build for CUDA (pip install -e '.[cuda]')"
    return "there is no accelerator; --size tiny tries the command on a CPU"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("jax", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _free(found: Mapping[str, Any], card: Mapping[str, str]) -> float:
    """GiB; 0 where nobody says."""
    told = card.get("memory.free", "").split()  # what other processes have is known to the driver alone
    return float(told[0]) / 1024 if told and told[0].isdigit() else found.get("free", 0) / 2**30


def _look(items: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "device_items.needs", *items]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"missing": [], "error": f"the device has not answered for {SECONDS} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(_KEY)]
    if lines:
        return json.loads(lines[-1].removeprefix(_KEY))
    words = [line for line in done.stderr.splitlines() if line.strip()] or [f"it ended with {done.returncode}"]
    return {"missing": [], "error": f"the process that looks for a device failed: {words[-1].strip()[:300]}"}


def _packages(items: Sequence[str]) -> list[str]:
    """Those that are not there of what the items import."""
    absent = {}
    for item in items:
        for _ in range(100):
            try:
                importlib.import_module(f"device_items.{item}")
                break
            except ModuleNotFoundError as error:  # an empty one in its place, to get to the next
                absent[error.name] = sys.modules[error.name] = mock.MagicMock()
            except Exception:
                if not absent:
                    raise
                break  # it does not go on with an empty module
    return sorted({name.split(".")[0] for name in absent})


def _main(items: Sequence[str]) -> None:
    found: dict[str, Any] = {"missing": _packages(items)}
    if not found["missing"]:
        import jax

        device = jax.devices()[0]
        stats = device.memory_stats() or {}
        found |= {"platform": device.platform, "kind": device.device_kind}
        found |= {"free": stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)}
    print(_KEY + json.dumps(found), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
