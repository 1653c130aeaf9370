"""Programs that are kept: found again, never stale, mended where they are damaged, refused where others could write."""

import os
import pathlib
import types
import warnings

import jax
import jax.numpy as jnp
import pytest

from greedy_distill_jax.distribution import compile_cache
from greedy_distill_jax.distribution.compile_cache import compiled_ahead

X = jnp.arange(3.0)


def program(factor):
    """A program of always the same name."""

    def scaled(x):
        return factor * x

    return jax.jit(scaled)


def test_a_second_start_compiles_nothing_and_runs_no_other_code(start, tmp_path):
    start()
    assert program(2.0)(X).tolist() == [0, 2, 4] and (start.read, start.kept) == (0, 1)  # however short it took
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    start()
    assert program(2.0)(X).tolist() == [0, 2, 4] and (start.read, start.kept) == (1, 0)
    start()
    assert program(3.0)(X).tolist() == [0, 3, 6] and (start.read, start.kept) == (0, 1)  # the same name and shapes


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"", lambda content: b"x" * 99])
def test_a_damaged_program_is_named_and_made_again(start, tmp_path, capsys, damage):
    start()
    program(2.0)(X)
    (file,) = (tmp_path / "cache").glob("jit_scaled-*")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    start()
    assert program(2.0)(X).tolist() == [0, 2, 4] and (start.read, start.kept) == (0, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: compile_cache {tmp_path / 'cache'}: a kept program 'jit_scaled' is damaged (")
    start()
    program(2.0)(X)
    assert (start.read, start.kept) == (1, 0) and capsys.readouterr().err == ""


def test_other_warnings_are_shown_as_before(start, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: shown.append(str(message)))
    start()
    start()
    warnings.warn("something else")
    assert shown == ["something else"]


def test_a_folder_of_ones_own_is_closed_to_others(start, tmp_path, capsys):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    start(tmp_path / "open")
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "open") and not capsys.readouterr().err


@pytest.mark.parametrize("whose", ["folder", "file"])
def test_what_others_wrote_is_not_run(start, tmp_path, capsys, monkeypatch, whose):
    folder = tmp_path / "theirs"
    folder.mkdir()
    folder.chmod(0o770)
    (folder / "jit_scaled-0-cache").touch()
    own = os.geteuid()
    if whose == "folder":
        monkeypatch.setattr(compile_cache.os, "geteuid", lambda: own + 1)
    else:
        theirs = types.SimpleNamespace(st_uid=own + 1)
        monkeypatch.setattr(pathlib.PosixPath, "lstat", lambda path: theirs)
    start(folder)
    said = {
        "folder": f"belongs to another user (uid {own}), whose programs are not run; choose one of your own",
        "file": "holds files of another user, which are not run; remove them",
    }[whose]
    assert capsys.readouterr().err == f"warning: compile_cache {folder} {said}; programs are compiled anew.\n"
    program(2.0)(X)
    assert jax.config.jax_compilation_cache_dir is None and (start.read, start.kept) == (0, 0)


def test_a_folder_that_cannot_be_made_is_named(start, tmp_path, capsys):
    (tmp_path / "file").touch()
    start(tmp_path / "file" / "cache")
    told = "cannot be used (Not a directory); choose another; programs are compiled anew.\n"
    assert capsys.readouterr().err.endswith(told) and jax.config.jax_compilation_cache_dir is None


def test_what_is_compiled_ahead_is_what_jit_calls(start):
    start("")
    two, three = program(2.0), program(3.0)
    for x in (X, jax.device_put(X, jax.devices()[1])):
        shape = compiled_ahead(two, x)
        assert (shape.shape, shape.dtype) == (x.shape, x.dtype) and compiled_ahead(three, shape).shape == x.shape
        events = []

        def listen(event, _, events=events, **more):
            events.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        y = three(two(x))
        jax.monitoring.unregister_event_duration_listener(listen)
        assert events == [] and y.tolist() == [0, 6, 12] and y.device == x.device
