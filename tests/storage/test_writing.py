"""One writer at a time, files that appear whole, what killed processes left, disks that are full."""

import errno
import fcntl
import json
import os
import socket
import threading
import time

import numpy as np
import pytest

from greedy_distill_jax import cli
from greedy_distill_jax.data import video_io
from greedy_distill_jax.errors import Lost, UserError
from greedy_distill_jax.storage import lock, partial, record_job
from greedy_distill_jax.storage.host import kernel, process_numbers
from greedy_distill_jax.storage.lock import held, sole_writer
from greedy_distill_jax.storage.partial import Partial, abort_all, remove_leftovers, whole
from greedy_distill_jax.storage.record_job import RecordJob
from greedy_distill_jax.streaming.recording import Recording
from greedy_distill_jax.weights.replacing import replacing

GONE = 2**22 + 1  # no process has this number
HERE = dict(host=socket.gethostname(), kernel=kernel(), processes=process_numbers())
NAMESAKE = dict(host=socket.gethostname(), kernel="another boot", processes="another container")


def _full(*_args, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_second_writer_is_refused_in_one_line(tmp_path):
    folder = tmp_path / "new" / "run"
    with sole_writer(folder):
        with pytest.raises(UserError) as error, sole_writer(folder):
            pass
        told = json.loads((folder / lock.FILE).read_text())
        assert f"process {os.getpid()} on {socket.gethostname()}, since {told['since']}" in str(error.value)
        assert str(error.value).startswith(f"{folder} is being written by another process")
        assert error.value.field == "workdir" and "choose another folder" in str(error.value)
    assert not folder.exists(), "a folder in which nothing was written stays"
    with sole_writer(folder):
        (folder / "x").touch()
    assert [p.name for p in folder.iterdir()] == ["x"]
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"file/run cannot be written \(Not a directory\)"),
        sole_writer(tmp_path / "file" / "run"),
    ):
        pass


@pytest.mark.parametrize(
    "holder, locks, renewed, free",
    [
        (dict(HERE, pid=GONE), True, False, True),
        (dict(HERE, pid=os.getpid()), True, False, True),  # the kernel knows: the number was given again
        (dict(HERE, pid=GONE), False, False, True),
        (dict(HERE, pid=os.getpid()), False, True, False),
        (dict(NAMESAKE, pid=GONE), True, True, False),
        (dict(NAMESAKE, kernel=kernel(), pid=GONE), False, True, False),
        (dict(host="elsewhere", pid=1), True, True, False),
        (dict(host="elsewhere", pid=1), True, False, True),
        (dict(host="elsewhere", pid=1), False, False, True),
    ],
)
def test_the_lock_of_a_process_that_is_gone(tmp_path, monkeypatch, capsys, holder, locks, renewed, free):
    path, clock = tmp_path / "a.lock", [0.0]
    path.write_text(json.dumps({**holder, "since": "yesterday"}))

    def sleep(seconds):
        clock[0] += seconds
        if renewed:
            os.utime(path, (clock[0], clock[0]))

    monkeypatch.setattr(lock.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(lock.time, "sleep", sleep)
    if not locks:
        monkeypatch.setattr(fcntl, "flock", lambda *_: _raise(OSError(errno.ENOLCK, "no locks")))
    if free:
        with held(path, "the folder"):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert not path.exists() and "the folder: taking over from a process that is gone" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match="since yesterday"), held(path, "the folder"):
            pass
        assert json.loads(path.read_text())["pid"] == holder["pid"]


@pytest.mark.parametrize(
    "holder, happens, ends",
    [
        (NAMESAKE, "nothing", Lost),
        (NAMESAKE, "a sign of life", UserError),
        (NAMESAKE, "the server frees it", None),
        (NAMESAKE, "its holder removes it", None),
        (HERE, "waits", UserError),  # the kernel knows, without a wait
        ({}, "waits", UserError),  # one that has not written who it is yet
    ],
)
def test_a_lock_that_a_file_server_keeps_for_another_host(tmp_path, monkeypatch, holder, happens, ends):
    path, clock = tmp_path / "run" / lock.FILE, [0.0]
    path.parent.mkdir()
    path.write_text(json.dumps(holder and {**holder, "pid": 1, "since": "yesterday"}))
    kept = os.open(path, os.O_RDWR)
    fcntl.flock(kept, fcntl.LOCK_EX)

    def sleep(seconds):
        clock[0] += seconds
        match happens:
            case "a sign of life":
                os.utime(path, (clock[0], clock[0]))
            case "the server frees it":
                fcntl.flock(kept, fcntl.LOCK_UN)
            case "its holder removes it":
                path.unlink()
            case "waits":
                raise AssertionError

    monkeypatch.setattr(lock.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(lock.time, "sleep", sleep)
    try:
        if ends is None:
            with sole_writer(path.parent):
                assert json.loads(path.read_text())["pid"] == os.getpid()
        else:
            with pytest.raises(ends, match="since yesterday" if holder else "by another process;") as error:
                sole_writer(path.parent).__enter__()
            assert json.loads(path.read_text() or "{}").get("pid") == (1 if holder else None)
            assert cli.outcome(error.value)[0] == (cli.RETRY if ends is Lost else 2)
    finally:
        os.close(kept)


def _raise(error):
    raise error


def test_a_holder_shows_that_it_lives(tmp_path, monkeypatch):
    shown = threading.Event()
    monkeypatch.setattr(lock, "BEAT", 0.001)
    monkeypatch.setattr(lock.os, "utime", lambda *_: shown.set())
    with held(tmp_path / "a.lock", "it"):
        assert shown.wait(30)


def test_a_lock_that_was_not_taken_is_free(tmp_path, monkeypatch):
    path = tmp_path / "a.lock"
    path.write_text(json.dumps(dict(host="elsewhere", pid=1)))
    with monkeypatch.context() as patch:
        patch.setattr(lock.time, "sleep", lambda _: _raise(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt), held(path, "it"):
            pass
        patch.setattr(lock, "SILENT", 0.0)
        patch.setattr(lock.os, "ftruncate", _full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left"), held(path, "it"):
            pass
    with held(path, "it"), monkeypatch.context() as patch:
        patch.setattr(lock.Path, "unlink", lambda *_, **__: _raise(OSError(errno.EROFS, "read-only")))
        with pytest.raises(OSError, match="read-only"), held(tmp_path / "b.lock", "other"):
            pass
    with held(tmp_path / "b.lock", "other"):
        pass
    assert not list(tmp_path.iterdir())


def test_an_overtaken_holder_ends_and_leaves_the_lock_of_the_next(tmp_path, monkeypatch):
    path, other = tmp_path / "a.lock", json.dumps({"token": "another"})
    with held(path, "it"):
        path.write_text(other)
    assert path.read_text() == other
    monkeypatch.setattr(lock, "BEAT", 0.001)
    path.unlink()
    with (
        pytest.raises(UserError, match="^it: another process has taken over"),
        held(path, "it"),
        held(tmp_path / "inner", "x"),
    ):
        path.write_text(other)
        for _ in range(3000):
            time.sleep(0.01)
    assert path.read_text() == other
    with held(tmp_path / "b.lock", "it"):
        time.sleep(0.01)


def test_without_locks_one_of_two_starters_is_told(tmp_path, monkeypatch):
    def other_starts(_):
        (tmp_path / "a.lock").write_text(json.dumps({"token": "another", "pid": 1}))

    monkeypatch.setattr(fcntl, "flock", lambda *_: _raise(OSError(errno.ENOLCK, "no locks")))
    monkeypatch.setattr(lock.time, "sleep", other_starts)
    with pytest.raises(UserError, match=r"written by another process \(process 1 on"), held(tmp_path / "a.lock", "it"):
        pass


def test_what_killed_processes_left_goes_and_what_others_write_stays(tmp_path):
    own, other = (f".x.txt.{host}0123abcd.partial" for host in (partial._HOST, "ffffffff"))
    for name in (own, other):
        (tmp_path / name).touch()
    with whole(tmp_path / "x.txt") as path, whole(tmp_path / "x.txt") as second:
        assert path.exists() and second.exists() and not (tmp_path / own).exists()
        path.write_text("first")
        second.write_text("second")
    assert sorted(p.name for p in tmp_path.iterdir()) == [other, "x.txt"]
    os.utime(tmp_path / other, (0, 0))  # more than a day old
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "x.txt") as path:
        path.write_text("third")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"] and (tmp_path / "x.txt").read_text() == "first"
    for folder in (False, True):  # nobody refers to them
        Partial(tmp_path / "y", folder=folder)
    assert len(list(tmp_path.glob(".y.*"))) == 2
    abort_all()
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_another_takes_for_left_behind_is_made_anew(tmp_path, monkeypatch, folder):
    """Between the creation of a file and its lock nobody holds it."""
    locked, taken = partial._locked, []

    def locked_late(path, **options):
        if options and not taken:
            taken.append(path)
            remove_leftovers(tmp_path / "x")
        return locked(path, **options)

    monkeypatch.setattr(partial, "_locked", locked_late)
    mine = Partial(tmp_path / "x", folder=folder)
    mine.path.write_text("mine")
    assert len(taken) == 1 and not taken[0].exists()
    remove_leftovers(tmp_path / "x")
    mine.commit()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "mine")]


def test_what_another_user_left_stays(tmp_path, monkeypatch):
    left, opened = tmp_path / f".x.{partial._HOST}0123abcd.partial", os.open
    left.touch()
    monkeypatch.setattr(
        partial.os, "open", lambda path, *a: _raise(PermissionError(13, "no")) if path == left else opened(path, *a)
    )
    with whole(tmp_path / "x") as path:
        path.write_text("mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == [left.name, "x"]


def _job(folder, **options):
    return RecordJob(folder, "numbers", {}, items=4, group=2, **options)


def test_two_writers_of_one_part(tmp_path):
    job = _job(tmp_path / "out")
    with job.part(1) as part:
        part.write("train", b"one")
        with pytest.raises(UserError, match=r"out: part 1 is being written by another process"), job.part(1):
            pass
        with pytest.raises(UserError, match="is being written by another process") as error:
            _job(tmp_path / "out", overwrite=True)
        assert error.value.field == "directory"
        with job.part(0) as other:  # of another share
            other.write("train", b"zero")
    with pytest.raises(UserError, match="out is being written by another process; wait"):  # no part is in work
        _job(tmp_path / "out", overwrite=True)
    info = job.finish()
    assert info["counts"] == {"train": 2} and not list(tmp_path.rglob("*.lock"))
    again = _job(tmp_path / "out", overwrite=True)
    assert again.pending() == [0, 1]
    with pytest.raises(KeyboardInterrupt), again.part(0):
        raise KeyboardInterrupt
    assert _job(tmp_path / "out", overwrite=True).pending() == [0, 1], "a job that failed is still at it"


def test_a_folder_that_is_overwritten_cannot_be_joined(tmp_path):
    (path := tmp_path / "plan.json").touch()
    descriptor = lock.join(path, "out", alone=True)
    with pytest.raises(UserError, match="^out is being written by another process; wait"):
        lock.join(path, "out")
    os.close(descriptor)
    os.close(lock.join(path, "out"))


@pytest.mark.parametrize("where", ["write", "close", "mark"])
def test_a_full_disk_leaves_no_part(tmp_path, monkeypatch, where):
    class Full(record_job.ArrayRecordWriter):
        def write(self, record):
            super().write(record)
            if where == "write":
                raise RuntimeError("write() failed: No space left on device; writing /x; at byte 65536")

        def close(self):
            if where in ("write", "close"):
                raise RuntimeError("write() failed: No space left on device; writing /x")
            super().close()

    job = _job(tmp_path / "out")
    monkeypatch.setattr(record_job, "ArrayRecordWriter", Full)
    if where == "mark":
        monkeypatch.setattr(record_job, "_write_json", _full)
    message = r"out cannot be written \(.*No space left on device\); free space"
    with pytest.raises(UserError, match=message) as error, job.part(0) as part:
        part.write("train", b"x")
        part.write("held_out", b"y")
    assert error.value.field == "directory" and job.pending() == [0, 1]
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.lock"))


class _FullContainer:
    mux = close = _full


@pytest.mark.parametrize("suffix, where", [(".mp4", "write"), (".mp4", "finish"), (".gif", "finish")])
def test_a_full_disk_leaves_no_video(tmp_path, monkeypatch, suffix, where):
    paths, frames = [tmp_path / f"{n}{suffix}" for n in range(2)], np.zeros((2, 1, 16, 16, 3), np.uint8)
    save = video_io._save_gif

    def save_the_first(images, path, fps):
        (_full if ".1." in path.name else save)(images, path, fps)

    monkeypatch.setattr(video_io, "_save_gif", save_the_first)
    message = rf"cannot write .*1{suffix} \(No space left on device\); free space"
    with pytest.raises(UserError, match=message), Recording(paths, fps=8) as recording:
        recording.write(frames)
        if suffix == ".mp4":
            recording._writers[1]._container.close()
            recording._writers[1]._container = _FullContainer()
        if where == "write":
            recording.write(frames)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "x"), RuntimeError("Error while serializing: I/O error: (os error 28)")]
)
def test_a_full_disk_leaves_the_old_weights(tmp_path, error):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    message = r"a cannot be written \(No space left on device\); free space"
    with pytest.raises(UserError, match=message), replacing(tmp_path / "a", overwrite=True) as path:
        path.mkdir()
        raise error
    for mistake in (UserError("its own"), RuntimeError("a mistake of ours")):
        with pytest.raises(type(mistake), match=str(mistake)), replacing(tmp_path / "a", overwrite=True):
            raise mistake from OSError(errno.ENOSPC, "x") if isinstance(mistake, UserError) else None
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "old"]


def _weights(path, text, folder):
    if folder:
        path.mkdir()
    (path / "weights" if folder else path).write_text(text)


def _texts(tmp_path):
    return {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["a", "replaced"])
@pytest.mark.parametrize("old, new", [(False, False), (False, True), (True, False), (True, True)])
def test_weights_are_replaced_by_a_file_or_a_folder(tmp_path, name, old, new):
    _weights(tmp_path / name, "old", old)
    with replacing(tmp_path / name, overwrite=True) as path:
        _weights(path, "new", new)
    assert _texts(tmp_path) == {f"{name}/weights" if new else name: "new"}
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.EIO, "x"), "abort_all", "back"])
def test_weights_come_back_where_replacing_them_stops(tmp_path, monkeypatch, stop):
    target, renamed = tmp_path / "a", os.replace

    def rename(source, goal):
        if goal == target and (stop == "back" or source.name == "a"):
            abort_all() if stop == "abort_all" else None
            raise OSError(errno.EIO, "x", str(source)) if isinstance(stop, str) else stop
        renamed(source, goal)

    _weights(target, "old", True)
    monkeypatch.setattr(partial.os, "replace", rename)
    with pytest.raises((UserError, KeyboardInterrupt)) as error, replacing(target, overwrite=True) as path:
        _weights(path, "new", True)
    if stop == "back":
        (left,) = tmp_path.iterdir()
        assert str(error.value) == f"{left}/a.replaced is what {target} was and cannot be put back (x); rename it."
        monkeypatch.undo()
        with pytest.raises(UserError, match="a exists; choose another name"), replacing(target):
            pass
    assert _texts(tmp_path) == {"a/weights": "old"} and [p.name for p in tmp_path.iterdir()] == ["a"]
