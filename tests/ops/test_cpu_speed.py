"""The benchmark command runs, and on CPU the op keeps its promises: ratios within one process, CPU time, one thread."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.subprocesses
def test_faster_than_its_peers_and_flat_in_the_number_of_chunks(tmp_path, subprocess_env):
    output = tmp_path / "attention.json"
    done = subprocess.run(
        [sys.executable, f"{ROOT}/benchmarks/attention.py", "--output", str(output)],
        env={**subprocess_env, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    ratios = result["ratios"]
    assert ratios["masked dense / ours, forward_backward"] >= 8
    assert ratios["time per chunk, longest / shortest"] <= 1.15
    if importlib.util.find_spec("torch") is None:
        assert "ModuleNotFoundError" in result["milliseconds"]["cpu 32 x 128, 4 heads"]["torch SDPA on slices"]["error"]
        pytest.skip("torch is not installed: no comparison with it")
    assert ratios["torch SDPA on slices / ours, forward_backward"] >= 1.2
    assert ratios["torch SDPA on slices / ours, forward"] >= 1 / 1.3
