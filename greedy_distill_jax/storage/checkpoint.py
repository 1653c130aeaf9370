"""Checkpoints: the only file that knows Orbax.

A checkpoint is one directory per step with two items, written together and committed last:
  state   arrays, as nested dictionaries of plain names (tuples and named tuples become dictionaries), so that any
          part of it can be read without the classes that made it;
  meta    JSON: data position (ONE global example index, valid for any number of processes), configuration, stage,
          architecture, versions.
Saving is asynchronous. A step interrupted in the middle never counts. Restoring takes explicit target shardings, so a
run moves between device counts.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from greedy_distill_jax.errors import UserError

Path = tuple[str, ...]
LAYOUT = 2  # of the state: 1 had params, ema, opt_state, critic; 2 has nets/NAME/{params,ema,opt_state}
_READ_BYTES = 2**29


class Checkpointer:
    """The checkpoints of one run.

    Args:
      directory: local path or a `scheme://` URL; created if missing.
      max_to_keep: newest steps that stay; None keeps all.
      async_save: `save` returns after the copy to host memory, the writing goes on in the background.
      read_only: never creates or cleans up anything; for readers of a run that may still be training.
      write_bytes: most bytes on their way to disk at once (more than the largest leaf), uncompressed, to save memory;
        None for no limit.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        max_to_keep: int | None = 3,
        async_save: bool = True,
        read_only: bool = False,
        write_bytes: int | None = None,
    ):
        self.directory, self._read_only = _absolute(directory), read_only
        if not read_only:
            _check_writable(self.directory)
        elif "://" not in self.directory and not os.path.isdir(self.directory):
            raise _none_in(self.directory)
        with _quiet():
            options = ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else max_to_keep,
                enable_async_checkpointing=async_save and not read_only,
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
            )
            limited = {} if write_bytes is None else dict(save_concurrent_gb=write_bytes / 1e9, use_compression=False)
            state_handler = ocp.PyTreeCheckpointHandler(**limited)
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=options,
                item_handlers={"state": state_handler, "meta": ocp.JsonCheckpointHandler()},
            )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The complete checkpoints, oldest first."""
        if self._read_only:
            self._manager.reload()  # the run may have saved more since
        return sorted(step for step in self._manager.all_steps() if self._is_complete(step))

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, meta: Mapping[str, Any], *, force: bool = False) -> bool:
        """Saves a step.

        Args:
          step: name of the checkpoint.
          state: tree of arrays (typed PRNG keys included). It may be donated as soon as this returns.
          meta: JSON; versions are added.
          force: replace an existing checkpoint of that step.

        Returns:
          False if the step existed already and `force` is off.
        """
        meta = {"layout": LAYOUT, "versions": versions(), **meta}
        json.dumps(meta)  # fails here, not in the background thread
        step = int(step)
        if step in self._manager.all_steps():
            if self._is_complete(step) and not force:
                return False
            self._manager.delete(step)
        nested = _nest({path: _storable(leaf) for path, leaf in _flatten(state)})
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(nested), meta=ocp.args.JsonSave(meta))
        return bool(self._manager.save(step, args=args, force=True))

    def restore(self, step: int | None, target: Any, *, architecture: Mapping[str, Any] | None = None) -> Any:
        """Reads a state.

        Args:
          step: None for the newest.
          target: tree of `jax.ShapeDtypeStruct(shape, dtype, sharding=...)` (or arrays); its structure, dtypes and
            shardings are those of the result. Without a sharding a leaf goes to the default device.
          architecture: compared with the `architecture` in the checkpoint's meta first, if given.

        Raises:
          UserError: there is no checkpoint, or it holds another architecture (names the first differing leaves).
        """
        step = self._existing(step)
        if architecture is not None:
            self._check_architecture(step, architecture)
        wanted = dict(_flatten(target))
        shapes = {path: _stored_shape(leaf) for path, leaf in wanted.items()}
        self._check_leaves(step, shapes)
        read = self._read(step, shapes)
        leaves = [_typed(read[path], leaf) for path, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(target), leaves)

    def restore_subtree(
        self,
        step: int | None,
        subtree: str,
        *,
        sharding: Sharding | Callable[[Any], Any] | None = None,
        dtype: Any = None,
    ) -> Any:
        """Reads one part of a state as nested dictionaries, without knowing the rest of it.

        Args:
          step: None for the newest.
          subtree: path of the part, such as "nets/student/params".
          sharding: one sharding for every leaf, or a function from the tree of shapes to a tree of shardings.
          dtype: of the floating-point leaves of the result; None keeps the stored ones.
        """
        step = self._existing(step)
        prefix = tuple(part for part in subtree.split("/") if part)
        stored = self._stored(step)
        chosen = {path[len(prefix) :]: shape for path, shape in stored.items() if path[: len(prefix)] == prefix}
        if not chosen:
            tops = ", ".join(sorted({path[0] for path in stored}))
            raise UserError(f"{self.directory} step {step} holds no {subtree!r}; it holds {tops}.")
        if dtype is not None:
            floating = {p for p, s in chosen.items() if jnp.issubdtype(s.dtype, jnp.floating)}
            chosen = {p: jax.ShapeDtypeStruct(s.shape, dtype if p in floating else s.dtype) for p, s in chosen.items()}
        if callable(sharding) and not isinstance(sharding, Sharding):
            placed = dict(_flatten(sharding(_nest(chosen))))
        else:
            placed = dict.fromkeys(chosen, sharding or _default_sharding())
        shapes = {
            (*prefix, *path): jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=placed[path])
            for path, shape in chosen.items()
        }
        read: dict[Path, jax.Array] = {}
        for group in _groups(shapes):
            read |= self._read(step, group)
        return _nest({path[len(prefix) :]: read[path] for path in shapes})

    def shapes(self, step: int | None, subtree: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Path below ``subtree`` ("a/b/c") -> shape and dtype of every leaf stored there; {} if there is none."""
        prefix = tuple(part for part in subtree.split("/") if part)
        stored = self._stored(self._existing(step))
        return {"/".join(p[len(prefix) :]): shape for p, shape in stored.items() if p[: len(prefix)] == prefix}

    def read_groups(
        self, step: int | None, subtree: str, wanted: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Iterator[dict[str, np.ndarray]]:
        """Leaves below ``subtree``, in the order of ``wanted`` (from ``shapes``), a part of them at a time."""
        step, prefix, here = self._existing(step), tuple(subtree.split("/")), _default_sharding()
        shapes = {
            (*prefix, *path.split("/")): jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=here)
            for path, shape in wanted.items()
        }
        for group in _groups(shapes):
            read = self._read(step, group)
            yield {"/".join(path[len(prefix) :]): np.asarray(read.pop(path)) for path in group}

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The JSON saved with a step (None for the newest)."""
        step = self._existing(step)
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        layout = meta.get("layout", 1)
        if layout != LAYOUT:
            wrote = meta.get("versions", {}).get("greedy_distill_jax", "an older one")
            raise UserError(
                f"{self.directory} step {step} is in checkpoint layout {layout}, this version reads layout {LAYOUT}; "
                f"use the version that wrote it ({wrote}), or train again."
            )
        return meta

    def wait(self) -> None:
        """Blocks until everything saved is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the threads."""
        self._manager.close()

    def _is_complete(self, step: int) -> bool:
        here = self._manager.directory / str(step)
        return (here / "state" / "_METADATA").exists() and (here / "meta" / "metadata").exists()

    def _existing(self, step: int | None) -> int:
        self._manager.wait_until_finished()
        steps = self.steps()
        if not steps:
            raise _none_in(self.directory)
        if step is not None and step not in steps:
            raise UserError(f"{self.directory} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}.")
        return steps[-1] if step is None else step

    def _stored(self, step: int) -> dict[Path, jax.ShapeDtypeStruct]:
        tree = self._manager.item_metadata(step)["state"].tree
        return {path: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype) for path, leaf in _flatten(tree)}

    def _read(self, step: int, shapes: dict[Path, jax.ShapeDtypeStruct]) -> dict[Path, jax.Array]:
        tree = _nest(shapes)
        restore = ocp.args.PyTreeRestore(
            tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
        )
        return dict(_flatten(self._manager.restore(step, args=ocp.args.Composite(state=restore))["state"]))

    def _check_architecture(self, step: int, architecture: Mapping[str, Any]) -> None:
        stored = self.meta(step).get("architecture", {})
        given = json.loads(json.dumps(architecture))
        differing = [key for key in sorted({*stored, *given}) if stored.get(key) != given.get(key)]
        if differing:
            parts = ", ".join(f"{key} {stored.get(key)!r}, not {given.get(key)!r}" for key in differing[:3])
            raise _another(self.directory, step, parts + _more(differing))

    def _check_leaves(self, step: int, wanted: dict[Path, jax.ShapeDtypeStruct]) -> None:
        stored = self._stored(step)
        parts = []
        for path in sorted({*stored, *wanted}):
            has, needs = (_describe(tree.get(path)) for tree in (stored, wanted))
            if has != needs:
                parts.append(f"{'/'.join(path)} is {has}, not {needs}")
        if parts:
            raise _another(self.directory, step, ", ".join(parts[:3]) + _more(parts))


def has_checkpoint(directory: str | os.PathLike) -> bool:
    """Whether a complete checkpoint lies in a directory; creates nothing."""
    if not os.path.isdir(os.path.expanduser(directory)):
        return False
    with Checkpointer(directory, read_only=True) as checkpointer:
        return checkpointer.latest_step() is not None


def load_params(
    directory: str | os.PathLike,
    subtree: str,
    *,
    step: int | None = None,
    sharding: Sharding | Callable[[Any], Any] | None = None,
    dtype: Any = None,
) -> Any:
    """Reads one part of a checkpoint, as `Checkpointer.restore_subtree`; the run may still be training."""
    with Checkpointer(directory, read_only=True) as checkpointer:
        return checkpointer.restore_subtree(step, subtree, sharding=sharding, dtype=dtype)


def load_meta(directory: str | os.PathLike, *, step: int | None = None) -> dict[str, Any]:
    """Reads the JSON saved with a checkpoint; the run may still be training."""
    with Checkpointer(directory, read_only=True) as checkpointer:
        return checkpointer.meta(step)


def versions() -> dict[str, str]:
    """What the checkpoint was written with."""
    names = ("greedy_distill_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # the package itself, run from a checkout that is not installed
    return found


def source_commit() -> str | None:
    """The commit of the checkout that this package runs from; None for an installed package or without git."""
    try:
        command, here = ["git", "rev-parse", "HEAD"], os.path.dirname(os.path.abspath(__file__))
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# --- trees and leaves ---------------------------------------------------------------------------------------------


def _flatten(tree: Any) -> list[tuple[Path, Any]]:
    """(path of names, leaf) in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(tuple(jax.tree_util.keystr((key,), simple=True) for key in path), leaf) for path, leaf in leaves]


def _nest(flat: Mapping[Path, Any]) -> Any:
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        if not path:
            return leaf
        node = root
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return root


def _groups(shapes: dict[Path, jax.ShapeDtypeStruct]) -> list[dict[Path, jax.ShapeDtypeStruct]]:
    """Leaves to read together: up to ``_READ_BYTES``, because Orbax holds them on the host next to the result."""
    groups, size = [{}], 0
    for path, shape in shapes.items():
        size += shape.size * shape.dtype.itemsize
        if groups[-1] and size > _READ_BYTES:
            groups.append({})
            size = shape.size * shape.dtype.itemsize
        groups[-1][path] = shape
    return groups


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)


def _storable(leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _stored_shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding under which a leaf of the target is stored."""
    sharding = getattr(leaf, "sharding", None) or _default_sharding()
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    elif not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _typed(read: jax.Array, leaf: Any) -> jax.Array:
    """Turns stored key data back into the PRNG keys of the target."""
    if not _is_key(leaf):
        return read
    implementation = []
    jax.eval_shape(lambda key: implementation.append(jax.random.key_impl(key)) or jnp.int32(0), leaf)
    return jax.random.wrap_key_data(read, impl=implementation[0])


def _default_sharding() -> Sharding:
    if jax.process_count() == 1:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(Mesh(np.asarray(jax.devices()), ("all",)), PartitionSpec())


@contextlib.contextmanager
def _quiet():
    """Keeps Orbax from warning that a read-only directory is read-only."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- messages -----------------------------------------------------------------------------------------------------


def _absolute(directory: str | os.PathLike) -> str:
    directory = os.fspath(directory)
    return directory if "://" in directory else os.path.abspath(os.path.expanduser(directory))


def _check_writable(directory: str) -> None:
    if "://" in directory:
        return
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{directory} cannot be written ({reason}); choose another directory.") from error


def _none_in(directory: str) -> UserError:
    return UserError(
        f"{directory} holds no complete checkpoint; name the directory of a run that has saved one, or train it first."
    )


def _another(directory: str, step: int, parts: str) -> UserError:
    return UserError(
        f"{directory} step {step} holds another architecture: {parts}; "
        "use the configuration the run was started with, or another directory."
    )


def _more(parts: list) -> str:
    return f" and {len(parts) - 3} more" if len(parts) > 3 else ""


def _describe(leaf: jax.ShapeDtypeStruct | None) -> str:
    return "absent" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
