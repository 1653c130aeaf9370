"""Axes of the mesh that span two processes: all learn and stream as on one device. The long form, of every stage and
axis, is the part "spans" of `benchmarks/faults.py`."""

import types

import jax
import numpy as np
import pytest

from greedy_distill_jax.config import read_settings
from greedy_distill_jax.distribution import rows
from greedy_distill_jax.distribution.mesh import feeding, make_mesh
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.training.check_mesh import check_mesh


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


@pytest.mark.parametrize(
    "parts, processes, shares",
    [
        (8, 2, [(0, 2), (1, 2)]),
        (2, 2, [(0, 2), (1, 2)]),
        (2, 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (1, 2, [(0, 1), (0, 1)]),
        (3, 2, [(0, 0), (0, 0)]),
    ],
)
def test_who_feeds_which_share_of_a_batch(parts, processes, shares):
    assert [feeding(parts, process, processes) for process in range(processes)] == shares


@pytest.mark.parametrize(
    "mesh, processes, bad, message",
    [
        (dict(data=2, tensor=2), 4, 0, None),
        (dict(data=2, tensor=2), 4, 3, "max_bad_records is 3, but with 2 data and fsdp parts over 4 processes several"),
        (dict(data=2, tensor=2), 2, 3, None),
        (dict(data=3), 2, 0, "the mesh has 3 data and fsdp parts, which do not divide over the 2 processes"),
    ],
)
def test_a_mesh_whose_parts_several_processes_feed(mesh, processes, bad, message):
    settings = read_settings(tiny.train_config(data__max_bad_records=bad, data__batch=12))
    mesh = make_mesh(mesh, jax.devices()[: int(np.prod(list(mesh.values())))])
    if message is None:
        return check_mesh(settings, mesh, (4, 4, 4, 16), processes)
    with pytest.raises(UserError, match=message):
        check_mesh(settings, mesh, (4, 4, 4, 16), processes)


def test_of_rows_that_two_processes_judged_the_first_ones_count(monkeypatch):
    """Process 1 of 2 on a mesh without a batch axis: what a reward said there is not what all go on with."""
    mesh = make_mesh({"tensor": 2}, jax.devices()[:2])
    monkeypatch.setattr(rows, "jax", types.SimpleNamespace(**vars(jax) | {"process_count": lambda: 2}))
    monkeypatch.setattr(rows.jax, "process_index", lambda: 1)
    monkeypatch.setattr(rows.multihost_utils, "process_allgather", lambda own: np.stack([own + 1, own]))
    np.testing.assert_array_equal(rows.global_rows(np.arange(4.0, dtype=np.float32), mesh), [1, 2, 3, 4])
    assert rows.global_rows(np.asarray(3.0, np.float32), mesh) == 3
