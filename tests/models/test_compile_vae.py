"""The tiny streaming decoder compiles for a TPU that is not there (skipped without libtpu).

The whole table is `python -m greedy_distill_jax.compile vae --target v5p`: Wan's decoder takes minutes to compile.
"""

import importlib.util
import re
import subprocess
import sys

import pytest

HBM = 32 * 2**30  # bytes of a v6e


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is missing")
@pytest.mark.slow
@pytest.mark.subprocesses
def test_both_steps_fit_a_device_at_480p(subprocess_env):
    command = [sys.executable, "-m", "greedy_distill_jax.compile", "vae", "--target", "v6e", "--decoder", "tiny"]
    env = {**subprocess_env, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    needed = [int(n) for n in re.findall(r"(\d+) bytes", done.stdout)]
    assert len(needed) == 2 and all(0 < n < HBM for n in needed)
