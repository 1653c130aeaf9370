"""Records of benchmarks."""

import shlex

from greedy_distill_jax.measure.record import command_line


def test_a_command_is_one_of_a_shell_without_the_folders_of_a_machine():
    given = ["--workdir", "/data/runs/rl", "--output=/data/out", "--rows", "direct, stage 2's loss", "--x=runs/a", "-v"]
    told = command_line("benchmarks/rl.py", given)
    assert shlex.split(told) == ["python", "benchmarks/rl.py", "--workdir", "rl", "--output=out", *given[3:]]
