"""Axes of the mesh that span two processes: all learn and stream as on one device. The long form, of every stage and
axis, is the part "spans" of `benchmarks/faults.py`."""

import textwrap

import jax
import numpy as np
import pytest

from greedy_distill_jax.distribution import rows
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.errors import UserError


@pytest.mark.slow
@pytest.mark.subprocesses
def test_axes_that_span_two_processes_change_nothing(benchmarks, tmp_path, subprocess_env):
    spans = benchmarks("fault_items.spans")
    cases = ["teacher:tensor", "teacher_forcing:context", "stream:context"]
    ones = [f"{case.split(':')[0]}:one" for case in cases]
    spans.trained(tmp_path, "1 x 1", ["origin", *ones], 900, subprocess_env)
    spans.trained(tmp_path, "2 x 2", cases, 900, subprocess_env)
    for case in cases:
        found = spans.apart(tmp_path, "2 x 2", case)
        assert found["good"], (case, found)
    (events,) = (tmp_path / "run-teacher_forcing-context").glob("events.out.*")
    assert b"samples/0: " in events.read_bytes()


def test_a_job_of_spans_that_fails_or_hangs_is_one_line(benchmarks, tmp_path, monkeypatch):
    """Also where process 1 says more than a pipe holds while process 0 waits for it."""
    spans = benchmarks("fault_items.spans")
    script = """
    import os, pathlib, sys, time
    root, case = sys.argv[1:]
    if os.environ["JAX_PROCESS_ID"] == "1":
        sys.stderr.write("x" * 2**20)
        pathlib.Path(root, "said").touch()
        sys.exit(case == "fails")
    while case == "hangs" or not pathlib.Path(root, "said").exists():
        time.sleep(0.01)
    """
    (tmp_path / "spans_job.py").write_text(textwrap.dedent(script))
    monkeypatch.setattr(spans, "__file__", str(tmp_path / "spans.py"))
    spans.trained(tmp_path, "2 x 2", ["ends"], 60)
    with pytest.raises(UserError, match=r"2 x 2: fails ended with \[0, 1\]: .*x"):
        spans.trained(tmp_path, "2 x 2", ["fails"], 60)
    with pytest.raises(UserError, match="2 x 2: hangs did not end within 1 s .*; give it more: --limit."):
        spans.trained(tmp_path, "2 x 2", ["hangs"], 1)


def test_of_rows_that_two_processes_judged_the_first_ones_count(monkeypatch):
    """Two processes on a mesh without a batch axis: what a reward said at the second is not what all go on with."""
    mesh = make_mesh({"tensor": 2}, jax.devices()[:2])
    monkeypatch.setattr(rows, "feeding", lambda mesh: {0: (0,), 1: (0,)})
    monkeypatch.setattr(rows.multihost_utils, "process_allgather", lambda own: np.stack([own + 1, own]))
    np.testing.assert_array_equal(rows.global_rows(np.arange(4.0, dtype=np.float32), mesh), [1, 2, 3, 4])
    assert rows.global_rows(np.asarray(3.0, np.float32), mesh) == 3
