"""The streaming decoders compile for TPUs that are not there (skipped without libtpu)."""

import importlib.util
import re
import subprocess
import sys

import pytest

HBM = {"v5p": 95 * 2**30, "v6e": 32 * 2**30}  # bytes of one device


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is missing")
@pytest.mark.slow
@pytest.mark.subprocesses
@pytest.mark.timeout(3600)
@pytest.mark.xdist_group("libtpu")
@pytest.mark.parametrize("decoder", ["tiny", "wan"])
@pytest.mark.parametrize("target", list(HBM))
def test_both_steps_fit_a_device_at_480p(target, decoder, subprocess_env):
    command = [sys.executable, "-m", "greedy_distill_jax.compile", "vae", "--target", target, "--decoder", decoder]
    env = {**subprocess_env, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3500)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    needed = [int(n) for n in re.findall(r"(\d+) bytes", done.stdout)]
    assert len(needed) == 2 and all(0 < n < HBM[target] for n in needed)
