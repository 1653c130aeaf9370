"""The tiny streaming decoder compiles for a TPU that is not there (skipped without libtpu).

The whole table is `python -m greedy_distill_jax.compile vae`: Wan's decoder, and v6e, take minutes more to compile.
"""

import importlib.util
import re
import subprocess
import sys

import pytest

LIMIT = 2 * 2**30  # bytes: it has to fit beside a student, which needs 9.3 GiB of the 15.75 of a v5e


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is missing")
@pytest.mark.slow
@pytest.mark.subprocesses
def test_both_steps_fit_beside_a_student_at_480p(subprocess_env):
    command = [sys.executable, "-m", "greedy_distill_jax.compile", "vae", "--target", "v5p", "--decoder", "tiny"]
    env = {**subprocess_env, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    needed = [int(n) for n in re.findall(r"(\d+) bytes", done.stdout)]
    assert len(needed) == 2 and all(0 < n < LIMIT for n in needed)
