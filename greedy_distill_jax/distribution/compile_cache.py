"""Compiled programs: kept from run to run in jax's compilation cache, and made before they are needed.

jax finds a program by its lowered text, its compiler's options and flags, the versions of jax, jaxlib and the backend,
and the devices it is for. So no program of other code is ever run; what a start still pays is tracing and lowering.
"""

import contextlib
import glob
import os
import re
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

_refused: set[str] = set()  # folders that were warned of
_DAMAGED = re.compile(r"Error reading persistent compilation cache entry for '([^']+)': (.*)", re.S)


def compiled_ahead(call: Callable[..., Any], *args: Any) -> Any:
    """Compiles a jitted function for its arguments, or reads it from the cache, and runs nothing.

    jit finds what was compiled ahead: a call with such arguments traces, lowers and compiles nothing any more.

    Args:
      call: made by ``jax.jit``.
      *args: arrays, or shapes (``jax.ShapeDtypeStruct``); those of arrays on a chosen device have its sharding.

    Returns:
      The shapes of what the call returns, which may be arguments of the next one.
    """
    traced = call.trace(*args)
    program = traced.lower().compile()
    placed = any(_is_placed(x) for x in jax.tree.leaves(args))  # then what comes out is, too, and jit tells them apart

    def shape(out, sharding):
        return jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=sharding if placed else None)

    return jax.tree.map(shape, traced.out_info, program.output_shardings)


def _is_placed(x: Any) -> bool:
    return x.committed if isinstance(x, jax.Array) else getattr(x, "sharding", None) is not None


def use_compile_cache(path: str) -> None:
    """Keeps every compiled program in ``path`` from run to run, in place of another folder; "" changes nothing.

    Programs are run as they are read: a folder that others can put files into is not used, and a line on standard error
    says why, once. A damaged file is named in a line, removed, and its program compiled and kept again.
    """
    if not path:
        return
    folder = Path(path).expanduser()
    if why := "is no folder of this machine; choose one" if "://" in path else _unsafe(folder):
        if path not in _refused:
            print(f"warning: compile_cache {path} {why}; programs are compiled anew.", file=sys.stderr)
        _refused.add(path)
        _keep_in(None)
        return
    _keep_in(str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a start makes dozens of small ones
    if not isinstance(warnings.showwarning, _Mending):
        warnings.showwarning = _Mending(warnings.showwarning)
    warnings.showwarning.folder = folder


def _keep_in(folder: str | None) -> None:
    if jax.config.jax_compilation_cache_dir != folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # jax opens its folder once, at the first compilation


def _unsafe(folder: Path) -> str:
    """Why a folder is not to be used; makes it for this user alone, or takes it away from others."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.geteuid():
            return f"belongs to another user (uid {found.st_uid}), whose programs are not run; choose one of your own"
        if any(owner != found.st_uid for owner in _owners(folder)):
            return "holds files of another user, which are not run; remove them"
        if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):  # whatever the modes of the files in it
            folder.chmod(0o700)
    except OSError as error:
        return f"cannot be used ({error.strerror or error}); choose another"
    return ""


def _owners(folder: Path) -> Iterator[int]:
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process has just removed a damaged one
            yield file.lstat().st_uid


class _Mending:
    """Shows warnings as before, but for jax's of a damaged file, which jax reads past and never replaces."""

    def __init__(self, show: Callable[..., None]):
        self.show, self.folder = show, Path()

    def __call__(self, message, *args, **kwargs) -> None:
        found = _DAMAGED.match(str(message))
        if found is None:
            self.show(message, *args, **kwargs)
            return
        name, why = found[1], found[2].splitlines()[0]
        told = f"a kept program {name!r} is damaged ({why})"
        if jax.process_index() == 0:  # of several processes the one that writes
            told += ": all of that name are removed and compiled anew"
            try:
                for file in self.folder.glob(f"{glob.escape(name)}-*-cache"):
                    file.unlink(missing_ok=True)
            except OSError as error:
                told = f"a kept program {name!r} is damaged ({why}) and cannot be removed ({error.strerror or error})"
        print(f"warning: compile_cache {self.folder}: {told}.", file=sys.stderr)
