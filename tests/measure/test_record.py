"""Records of benchmarks."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from greedy_distill_jax.measure import record
from greedy_distill_jax.measure.record import command_line

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_a_command_is_one_of_a_shell_without_the_folders_of_a_machine():
    given = ["--workdir", "/data/runs/rl", "--output=/data/out", "--rows", "direct, stage 2's loss", "--x=runs/a", "-v"]
    told = command_line("benchmarks/rl.py", given)
    assert shlex.split(told) == ["python", "benchmarks/rl.py", "--workdir", "rl", "--output=out", *given[3:]]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    """JSON has none; other programs would refuse the whole record."""
    record.write_json(tmp_path / "a.json", {"error": float("nan"), "rows": [(1.5, np.float64("inf"))]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"error": None, "rows": [[1.5, None]]}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_are_json(path):
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{path}: {name}"))
