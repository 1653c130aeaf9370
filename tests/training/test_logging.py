"""Scalars and GIFs reach TensorBoard and scalars.jsonl, also across a kill; progress is readable in a file."""

import errno
import io
import json
import re
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from greedy_distill_jax.cli import progress as progress_lines
from greedy_distill_jax.cli.progress import _Lines, progress
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.train import train
from greedy_distill_jax.training import metrics
from greedy_distill_jax.training.metrics import SCALARS, MetricWriter, read_scalars


def video(frames=5, height=8, width=12):
    rng = np.random.default_rng(0)
    return rng.integers(0, 255, (frames, height, width, 3), dtype=np.uint8)


def test_tensorboard_reads_back_scalars_and_gifs(workdir):
    with MetricWriter(workdir) as writer:
        writer.scalars(1, {"loss": np.float32(0.5), "teacher/rate": 2})
        writer.scalars(2, {"loss": 0.25})
        writer.gif(2, "samples/a red square", video())
        writer.flush()
    events = EventAccumulator(str(workdir)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    image = events.Images("samples/a red square")[0]
    assert (image.step, image.width, image.height) == (2, 12, 8)
    decoded = Image.open(io.BytesIO(image.encoded_image_string))
    assert decoded.n_frames == 5 and decoded.size == (12, 8)


def test_scalars_jsonl(workdir, monkeypatch):
    monkeypatch.setattr(metrics.time, "time", lambda: 1234.5)
    with MetricWriter(workdir / "new" / "folder") as writer:
        writer.scalars(7, {"loss": float("nan"), "a": 1})
    (line,) = read_scalars(workdir / "new" / "folder")
    assert line["step"] == 7 and line["loss"] == "nan" and line["a"] == 1.0 and line["time"] == 1234.5
    assert read_scalars(workdir / "nothing") == []


def test_a_resumed_run_drops_what_the_killed_one_wrote_after_its_checkpoint(workdir, monkeypatch):
    # Files of one second are read in the order of their names, which end with a number that a process counts up: .10
    # comes before .9. Another process begins at 0.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    with MetricWriter(workdir) as writer:
        for step in range(1, 9):
            writer.scalars(step, {"loss": step})
    with (workdir / SCALARS).open("a") as file:
        file.write('{"step": 9, "loss"')  # torn by a kill
    with MetricWriter(workdir, resume_step=5) as writer:
        writer.scalars(6, {"loss": -6})
    lines = read_scalars(workdir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[-1]["loss"] == -6
    assert len([json.loads(line) for line in (workdir / SCALARS).read_text().splitlines()]) == 6
    events = EventAccumulator(str(workdir)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("content", [b"\x00\xff\xfe binary", b"epoch,loss\n1,2\n", b'{"epoch": 3}\n', b"[1, 2]\n"])
def test_a_foreign_file_is_moved_aside(workdir, capsys, content):
    (workdir / SCALARS).write_bytes(content + b"\n")
    (workdir / f"{SCALARS}.1").touch()
    with pytest.raises(UserError, match=r"scalars.jsonl does not hold the scalars of a run \(line 1"):
        read_scalars(workdir)
    with MetricWriter(workdir, resume_step=5) as writer:
        writer.scalars(6, {"loss": 1})
    told = capsys.readouterr().err
    assert told.startswith("warning: ") and told.endswith(f"moved to {workdir / SCALARS}.2\n")
    assert (workdir / f"{SCALARS}.2").read_bytes() == content + b"\n"
    assert [line["step"] for line in read_scalars(workdir)] == [6]


def test_a_full_disk_is_one_line(workdir, monkeypatch):
    writer = MetricWriter(workdir)
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_lines", mock.Mock(write=mock.Mock(side_effect=full)))
        with pytest.raises(UserError, match=rf"{workdir} cannot be written \(No space left on device\); free space"):
            writer.scalars(1, {"loss": 1})
    writer.close()


def test_other_processes_write_nothing(workdir):
    writer = MetricWriter(workdir / "a", enabled=False)
    writer.scalars(1, {"loss": 1})
    writer.gif(1, "x", video())
    writer.flush()
    writer.close()
    assert not (workdir / "a").exists()


def test_an_unwritable_directory_is_a_user_error(workdir):
    (workdir / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        MetricWriter(workdir / "file" / "run")


def test_progress_without_a_terminal_is_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: 0.0)  # less than what is between two lines
    with progress(100, 40, "teacher") as bar:
        for _ in range(60):
            bar.update(1)
        bar.set_postfix(loss="0.1")
    err = capsys.readouterr().err
    assert "\r" not in err
    (line,) = err.splitlines()
    assert line.startswith("teacher: 100/100") and line.endswith("loss=0.1")


def test_progress_lines_have_an_eta(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: now[0])
    with _Lines(10, 0, "x", "step", every=0.0) as bar:
        now[0] += 20.0
        bar.update(5)
    assert "x: 5/10 after 00:20, 00:20 left, 0.25 step/s" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True])
def test_the_first_step_is_no_part_of_the_rate(terminal, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress(101, 0, "teacher") as bar:
        bar._time = lambda: now[0]  # tqdm's clock
        now[0] += 100.0
        bar.update(1, restart=True)
        first = capsys.readouterr().err
        for _ in range(20):
            now[0] += 1.0
            bar.update(1)
        said = re.split(r"[\r\n]+", capsys.readouterr().err.strip())[-1]
    assert "1/101" in first and ("?step/s" in first if terminal else "left" not in first and "/s" not in first)
    assert "21/101" in said and ("<01:20" in said if terminal else "after 02:00, 01:20 left, 1 step/s" in said)


def test_progress_can_be_off(capsys):
    with progress(10, enabled=False) as bar:
        bar.update(1)
        bar.set_postfix(loss=1)
    assert capsys.readouterr().err == ""


def test_a_training_goes_on_without_samples_that_have_no_room(tmp_path, monkeypatch):
    """What the device says of a sampling that does not fit; anything else that it says ends the run."""
    config = tiny.train_config(steps=2, log__samples_every=1)

    def full(self, *args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr(Run, "sample_videos", full)
    with pytest.warns(UserWarning, match="no samples at step 2: .*set config.log.samples_every=0"):
        assert int(train(config, tmp_path / "run", show_progress=False).step) == 2

    def broken(self, *args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(Run, "sample_videos", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        train(config, tmp_path / "other", show_progress=False)
