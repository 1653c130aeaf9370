"""The TPU kernels compile for devices that are not there (skipped without libtpu)."""

import importlib.util
import json
import subprocess
import sys

import pytest

from greedy_distill_jax.ops.attention import sweep, tuning
from greedy_distill_jax.ops.attention.tuning import Blocks
from greedy_distill_jax.pods.kernels import SPECS

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed"
)


def _compile(*arguments, env):
    # One process per target: libtpu holds a lock, and its options are read once.
    command = [sys.executable, "-m", "greedy_distill_jax.compile", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.subprocesses
@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e"])
def test_every_workload_compiles_and_none_got_worse(target, subprocess_env):
    done = _compile("kernels", "--target", target, env={**subprocess_env, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    for name in SPECS:
        assert name in done.stdout
    assert "kFLOP per bundle" in done.stdout


@pytest.mark.subprocesses
def test_bad_arguments_are_one_line(subprocess_env):
    done = _compile("kernels", "--target", "v4", env=subprocess_env)
    assert done.returncode == 2 and "invalid choice: 'v4'" in done.stderr and done.stderr.count("\n") == 1


def test_tuned_tables_are_complete():
    """Every target has the recorded sweep for the frames it covers, and the chosen blocks are its best."""
    for target in tuning.TARGETS.values():
        record = tuning.record(target)
        assert record["libtpu"]
        for name, tried in record["sweep"].items():
            for kernel, pair in record["blocks"][name].items():
                figures = {blocks: kernels[f"{kernel}_kernel"] for blocks, kernels in tried.items()}
                assert figures["{} x {}".format(*pair)] == max(figures.values())
                assert record["kflop_per_bundle"][name][f"{kernel}_kernel"] == max(figures.values())


def test_a_tuned_table_is_used_and_others_follow_the_rule(monkeypatch, tmp_path):
    table = {"blocks": {tuning.key(1560, 1560, 128, "bfloat16"): dict(forward=[312, 520], dq=[520, 520], dkv=[8, 16])}}
    (tmp_path / "v5p.json").write_text(json.dumps(table))
    monkeypatch.setattr(tuning, "path", lambda target: tmp_path / f"{target}.json")
    tuning.record.cache_clear()
    assert tuning.choose("TPU v5", 1560, 1560, 128, "bfloat16") == Blocks((312, 520), (520, 520), (8, 16))
    rule = Blocks(*[(520, 1560)] * 3)
    assert tuning.choose("TPU v5", 1560, 1560, 64, "bfloat16") == rule
    assert tuning.choose("some TPU", 1560, 1560, 128, "bfloat16") == rule
    assert tuning.default_blocks(3600, 3600) == (600, 1200)
    assert tuning.default_blocks(16, 7) == (16, 7), "short chunks are one block"
    assert tuning.default_block(1567, 640) == tuning.RAGGED, "a prime number of tokens has a masked end"
    tuning.record.cache_clear()


def test_a_regression_fails_only_under_the_same_libtpu(monkeypatch, tmp_path):
    spec = sweep.workload(1560)
    name = tuning.key(1560, 1560, 128, spec.dtype)
    monkeypatch.setattr(sweep.aot, "target_mesh", lambda target: None)
    monkeypatch.setattr(sweep.aot, "libtpu_version", lambda: "1.0")
    monkeypatch.setattr(sweep.aot, "compile_spec", lambda *a, **k: {"kflop_per_bundle": {"dq_kernel": 94.0}})
    for version, before, failures in (("1.0", 100.0, 1), ("0.9", 100.0, 0), ("1.0", 98.0, 0)):
        record = {"libtpu": version, "kflop_per_bundle": {name: {"dq_kernel": before}}}
        monkeypatch.setattr(tuning, "record", lambda target, record=record: record)
        lines = []
        assert len(sweep.regressions("v5p", tmp_path, lines.append)) == failures
        assert len(lines) == 1
