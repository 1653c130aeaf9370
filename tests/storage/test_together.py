"""Checkpoints of several processes, of which the others are stood in for: what all see, say and do alike."""

import errno
import os
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.errors import Lost, UserError
from greedy_distill_jax.storage import checkpoint, together
from greedy_distill_jax.storage.aside import move_aside
from greedy_distill_jax.storage.checkpoint import Checkpointer

STATE = {"x": jnp.arange(5.0)}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("read_only", [False, True])
def test_a_step_that_another_process_cannot_read_is_passed_over(folder, monkeypatch, capsys, read_only):
    with Checkpointer(folder, async_save=False) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, STATE, {"data_position": 32 * step})
    asked = []

    def all_said(call, text=""):  # by this process, and by one that sees step 3 late and finds steps 3 and 2 damaged
        asked.append(call)
        if call == "steps":
            return [text, text if asked.count(call) > 2 else "1 2"]
        return [text, f"run {call[8:]} is damaged (y)" if call in ("meta of step 3", "meta of step 2") else text]

    with Checkpointer(folder, read_only=read_only) as checkpointer:
        monkeypatch.setattr(together, "PAUSE", 0.0)
        for module in (checkpoint, together):
            monkeypatch.setattr(module, "all_said", all_said)
        step, (position, found) = checkpointer.newest(
            lambda step: (checkpointer.meta(step)["data_position"], checkpointer.restore(step, STATE))
        )
        monkeypatch.undo()
        assert (step, position) == (1, 32)
        np.testing.assert_array_equal(found["x"], STATE["x"])
        assert checkpointer.steps() == ([1, 2, 3] if read_only else [1])
    assert asked[:4] == ["steps"] * 3 + ["meta of step 3"]
    for step, line in zip((3, 2), capsys.readouterr().err.splitlines(), strict=True):
        told = f"warning: run step {step} is damaged (y) at process 1; step 1 is taken instead"
        assert line == told + ("" if read_only else f", and that one moved to {folder}-damaged-{step}")


def test_a_step_that_another_process_does_not_see_is_neither_moved_nor_removed(folder, monkeypatch):
    with Checkpointer(folder, async_save=False) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, STATE, {"data_position": 32 * step})
        other, reloaded = {"steps": "1", "step 2": "", "step 1": "whole"}, mock.Mock()
        monkeypatch.setattr(together, "PAUSE", 0.0)
        monkeypatch.setattr(together, "all_said", lambda call, text: [text, other[call]])
        monkeypatch.setattr(checkpointer._manager, "reload", reloaded)
        told = f"^{folder}, steps: process 0 sees 1 2, process 1 1, for 0 s; look whether both hosts"
        with pytest.raises(Lost, match=told):
            checkpointer.newest(checkpointer.meta)
        with pytest.raises(Lost, match="step 2: process 0 sees whole, process 1 nothing"):
            checkpointer.save(2, STATE, {}, force=True)
        assert reloaded.call_count == together.LOOKS - 1
        assert not checkpointer.save(1, STATE, {})
        assert checkpointer.steps() == [1, 2] and os.listdir(folder.parent) == ["checkpoints"]


def test_a_folder_that_another_process_does_not_see_is_no_new_run(folder, monkeypatch):
    with Checkpointer(folder, async_save=False) as checkpointer:
        checkpointer.save(1, STATE, {})
    monkeypatch.setattr(together, "PAUSE", 0.0)
    for other in ("it", ""):
        monkeypatch.setattr(together, "all_said", lambda call, text, other=other: [text, other])
        if other:
            assert checkpoint.has_checkpoint(folder)
            continue
        told = f"^{folder}, the folder: process 0 sees it, process 1 nothing, for 0 s; look whether both hosts"
        with pytest.raises(Lost, match=told):
            checkpoint.has_checkpoint(folder)
    monkeypatch.setattr(together, "all_said", lambda call, text: [text, ""])
    assert not checkpoint.has_checkpoint(folder.parent / "other") and not (folder.parent / "other").exists()


def test_a_damaged_step_stays_on_the_disk_that_a_link_points_to(tmp_path, monkeypatch):
    disk, link = tmp_path / "disk" / "c", tmp_path / "run" / "checkpoints"
    (disk / "2").mkdir(parents=True)
    link.parent.mkdir()
    link.symlink_to(disk)
    assert move_aside(str(link), 2) == f"{disk}-damaged-2" and (tmp_path / "disk" / "c-damaged-2").is_dir()
    (disk / "2").mkdir()
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=OSError(errno.EXDEV, "Invalid cross-device link")))
    with pytest.raises(UserError, match=f"^{link}/2 is damaged, and cannot be moved to {disk}-damaged-2.1 .Invalid"):
        move_aside(str(link), 2)


def test_processes_at_different_places_are_told(monkeypatch):
    def rows(mine):  # of this process, and of one that is at "meta of step 9"
        other = np.frombuffer(b"meta of step 9\n", np.uint8)
        return np.stack([mine, np.pad(other, (0, len(mine) - len(other))) if mine.ndim else np.int32(len(other))])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(together.multihost_utils, "process_allgather", rows)
    assert together.all_said("meta of step 9", "x") == ["x", ""]
    with pytest.raises(RuntimeError, match="process 0 is at 'meta of step 3', process 1 at 'meta of step 9'"):
        together.all_said("meta of step 3")
