"""Training commands in processes of their own on this machine, and what they say."""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


class Process:
    """A training command; what it says, and when it ends, by the clock."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: Path | None = None):
        self.said: list[tuple[float, str]] = []
        self.ended: float | None = None
        self._process = subprocess.Popen(command, env=env, cwd=cwd, stderr=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stderr:
            self.said.append((time.monotonic(), line.strip()))
        self._process.wait()
        self.ended = time.monotonic()

    def told(self, number: int) -> None:
        """Sends a signal."""
        self._process.send_signal(number)

    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.returncode if self.ended else None

    def end(self) -> None:
        """Ends it for certain."""
        self._process.kill()
        self._reader.join()


def variables(processes: int, devices: int = 1, environment: Mapping[str, str] = os.environ) -> list[dict[str, str]]:
    """The environment of each process of a job that joins over loopback, with so many virtual devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = {**environment, "TQDM_DISABLE": "1"}
    if devices > 1:
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    if processes == 1:
        return [env]
    env |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "JAX_COORDINATOR_ADDRESS": address}
    return [env | {"JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(i)} for i in range(processes)]
