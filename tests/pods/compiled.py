"""The command ``compile train`` in a process of its own, as its user runs it."""

import json
import os
import subprocess
import sys


def compile_train(folder, *arguments):
    """(the record of a job, what the command said)."""
    done = subprocess.run(
        [sys.executable, "-m", "greedy_distill_jax.compile", "train", *arguments, f"--json={folder / 'out.json'}"],
        capture_output=True,
        text=True,
        env={name: x for name, x in os.environ.items() if name != "XLA_FLAGS"},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    (record,) = json.loads((folder / "out.json").read_text())
    return record, done.stdout
