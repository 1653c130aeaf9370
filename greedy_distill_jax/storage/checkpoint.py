"""Checkpoints: the only file that knows Orbax.

A checkpoint is one directory per step with two items, written together and committed last:
  state   arrays, as nested dictionaries of plain names (tuples and named tuples become dictionaries), so that any
          part of it can be read without the classes that made it;
  meta    JSON: data position (ONE global example index, valid for any number of processes), configuration, stage,
          architecture, versions; sums of every array and of itself (`storage.sums`).
Saving is asynchronous. A step interrupted in the middle never counts. Restoring takes explicit target shardings, so a
run moves between device counts. Whatever is read is compared with its sum; steps of versions that kept no sums are read
without.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.arrays import HANDLERS
from greedy_distill_jax.storage.aside import WHOLE, move_aside, move_parts_aside, warn
from greedy_distill_jax.storage.background import telling, telling_commit, wait_while
from greedy_distill_jax.storage.disk import OF_DAMAGE, absolute, check_writable, disk_reason
from greedy_distill_jax.storage.log import quiet, say_only_news
from greedy_distill_jax.storage.messages import Damaged, check_architecture, check_leaves, none_in
from greedy_distill_jax.storage.records import first_line
from greedy_distill_jax.storage.sums import check, sums, taken_apart, with_sums
from greedy_distill_jax.storage.together import all_said, all_see
from greedy_distill_jax.storage.trees import (
    Path,
    canonical,
    default_sharding,
    flatten,
    groups,
    nest,
    storable,
    stored_shape,
    typed,
)
from greedy_distill_jax.storage.versions import versions

LAYOUT = 2  # of the state: 1 had params, ema, opt_state, critic; 2 has nets/NAME/{params,ema,opt_state}
_OF_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError)
_TEMPORARY = ".orbax-checkpoint-tmp"  # in the names of steps that are being written

T = TypeVar("T")


class _Stored(NamedTuple):
    shapes: dict[Path, jax.ShapeDtypeStruct]
    sums: dict[Path, int] | None  # None: of a version that kept none


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
        self.directory, self._read_only = absolute(directory), read_only
        self._failure: BaseException | None = None  # of a write in the background
        say_only_news()
        if not read_only:
            if "://" not in self.directory:
                check_writable(self.directory)
                if jax.process_index() == 0:  # the others wait for it below
                    move_parts_aside(self.directory)
        elif "://" not in self.directory and not os.path.isdir(self.directory):
            raise none_in(self.directory)
        commit = None  # of a remote folder: Orbax chooses by its kind
        if "://" not in self.directory:
            commit = telling_commit(ocp.path.atomicity.AtomicRenameTemporaryPath, self._failed)
        with quiet():
            options = ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else max_to_keep,
                enable_async_checkpointing=async_save and not read_only,
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
                temporary_path_class=commit,
            )
            limited = {} if write_bytes is None else dict(save_concurrent_gb=write_bytes / 1e9, use_compression=False)
            self._handlers = {
                "state": ocp.PyTreeCheckpointHandler(type_handler_registry=HANDLERS, **limited),
                "meta": ocp.JsonCheckpointHandler(),
            }
            writing = {name: telling(handler, self._failed) for name, handler in self._handlers.items()}
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=writing)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The complete checkpoints, oldest first."""
        # Of the folder: the manager forgets a step that is to go before the one that replaces it is whole.
        return sorted(step for step in ocp.utils.checkpoint_steps(self._manager.directory) if self._is_complete(step))

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def seen_steps(self) -> list[int]:
        """The complete checkpoints as every process of the run sees them; all have to ask. `Lost` where they differ."""
        seen = all_see(self.directory, "steps", lambda: " ".join(map(str, self.steps())))
        return [int(step) for step in seen.split()]

    def save(self, step: int, state: Any, meta: Mapping[str, Any], *, force: bool = False) -> bool:
        """Saves a step.

        Args:
          step: name of the checkpoint.
          state: tree of arrays (typed PRNG keys included). It may be donated as soon as this returns.
          meta: JSON; versions are added.
          force: replace an existing checkpoint of that step.

        Returns:
          False if the step existed already and `force` is off.

        Raises:
          UserError: this step, or one before that was written in the background, could not be written.
          Lost: not every process sees whether this step exists, or one does not end writing that before.
        """
        json.dumps(meta)  # fails here, not after an older step of that name is gone
        step = int(step)
        self._wait_for_others()
        there = all_see(self.directory, f"step {step}", lambda: self._known(step), self._manager.reload)
        if there == "whole" and not force:
            return False
        if there:
            self._manager.delete(step)  # waits for the others
        leaves = {path: storable(leaf) for path, leaf in flatten(state)}
        meta = with_sums({"layout": LAYOUT, "versions": versions(), **meta}, leaves)
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(nest(leaves)), meta=ocp.args.JsonSave(meta))
        with self._writing():
            return bool(self._manager.save(step, args=args, force=True))

    def restore(
        self,
        step: int | None,
        target: Any,
        *,
        architecture: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> Any:
        """Reads a state.

        Args:
          step: None for the newest.
          target: tree of `jax.ShapeDtypeStruct(shape, dtype, sharding=...)` (or arrays); its structure, dtypes and
            shardings are those of the result. Without a sharding a leaf goes to the default device.
          architecture: compared with the `architecture` in the checkpoint's meta first, if given.
          defaults: of its keys, for a checkpoint that is older than some of them.

        Raises:
          UserError: there is no checkpoint, or it holds another architecture (names the first differing leaves), or
            (`Damaged`) it is not what was saved (names the leaf).
        """
        step = self._existing(step)
        where = f"{self.directory} step {step}"
        if architecture is not None:
            check_architecture(where, self.meta(step).get("architecture", {}), architecture, defaults)
        wanted = dict(flatten(target))
        shapes, stored = {path: stored_shape(leaf) for path, leaf in wanted.items()}, self._stored(step)
        check_leaves(where, stored.shapes, shapes)
        read = self._read(step, shapes, stored)
        leaves = [typed(read[path], leaf) for path, leaf in wanted.items()]
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

        Raises:
          UserError: there is no checkpoint or no such part, or (`Damaged`) a leaf is not what was saved.
        """
        step = self._existing(step)
        prefix = tuple(part for part in subtree.split("/") if part)
        stored = self._stored(step)
        chosen = {path[len(prefix) :]: s for path, s in stored.shapes.items() if path[: len(prefix)] == prefix}
        if not chosen:
            tops = ", ".join(sorted({path[0] for path in stored.shapes}))
            raise UserError(f"{self.directory} step {step} holds no {subtree!r}; it holds {tops}.")
        if dtype is not None:
            floating = {p for p, s in chosen.items() if jnp.issubdtype(s.dtype, jnp.floating)}
            chosen = {p: jax.ShapeDtypeStruct(s.shape, dtype if p in floating else s.dtype) for p, s in chosen.items()}
        if callable(sharding) and not isinstance(sharding, Sharding):
            placed = dict(flatten(sharding(nest(chosen))))
        else:
            placed = dict.fromkeys(chosen, sharding or default_sharding())
        shapes = {
            (*prefix, *path): jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=placed[path])
            for path, shape in chosen.items()
        }
        read: dict[Path, jax.Array] = {}
        for group in groups(stored.shapes, shapes):
            read |= self._read(step, {path: shapes[path] for path in group}, stored)
        return nest({path[len(prefix) :]: read[path] for path in shapes})

    def shapes(self, step: int | None, subtree: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Path below ``subtree`` ("a/b/c") -> shape and dtype of every leaf stored there; {} if there is none."""
        prefix = tuple(part for part in subtree.split("/") if part)
        stored = self._stored(self._existing(step)).shapes
        return {"/".join(p[len(prefix) :]): shape for p, shape in stored.items() if p[: len(prefix)] == prefix}

    def read_groups(
        self, step: int | None, subtree: str, wanted: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Iterator[dict[str, np.ndarray]]:
        """Leaves below ``subtree``, in the order of ``wanted`` (from ``shapes``), a part of them at a time.

        Raises:
          Damaged: a leaf of the next part is not what was saved.
        """
        step, prefix, here = self._existing(step), tuple(subtree.split("/")), default_sharding()
        stored = self._stored(step)
        shapes = {
            (*prefix, *path.split("/")): jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=here)
            for path, shape in wanted.items()
        }
        for group in groups(stored.shapes, shapes):
            read = self._read(step, {path: shapes[path] for path in group}, stored)
            yield {"/".join(path[len(prefix) :]): np.asarray(read.pop(path)) for path in group}

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The JSON saved with a step (None for the newest)."""
        step = self._existing(step)
        with self.agreed(step, "meta"):
            meta, _ = self._meta(step)
            if isinstance(meta.get("config"), str):
                json.loads(meta["config"])  # a text of JSON within JSON
        layout = meta.get("layout", 1)
        if layout != LAYOUT:
            wrote = meta.get("versions", {}).get("greedy_distill_jax", "an older one")
            raise UserError(
                f"{self.directory} step {step} is in checkpoint layout {layout}, this version reads layout {LAYOUT}; "
                f"use the version that wrote it ({wrote}), or train again."
            )
        return meta

    def wait(self) -> None:
        """Blocks until everything saved is on disk; raises what went wrong in the background, as `save` does."""
        self._wait_for_others()
        with self._writing():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises what went wrong in the background so far, as `save` does; waits for nothing."""
        if self._failure is not None:
            with self._writing():
                raise self._failure

    def close(self) -> None:
        """Waits and releases the threads; raises as `wait` does."""
        if jax.process_count() > 1:
            self.check()  # threads of such a save wait for the other processes, which do not come
        with self._writing():
            self._manager.close()

    def _failed(self, error: BaseException) -> None:
        self._failure = self._failure or error

    def _wait_for_others(self) -> None:
        """Of several processes, waits for the step that is being written, and no longer than until it has failed."""
        if jax.process_count() > 1:
            wait_while(self._manager.is_saving_in_progress, self.check, self.directory)

    def newest(self, read: Callable[[int], T]) -> tuple[int, T]:
        """Reads the newest checkpoint that is not damaged; those after it are named in a warning.

        A run that is written moves them aside, so that it can save these steps again; a remote folder is not moved:
        there a damaged step is an error. Several processes, which all have to call this, take the same step: one that
        is damaged to any of them is damaged. One that some do not see is neither passed over, which would train again
        what is saved, nor moved: it may be whole.

        Args:
          read: step -> what is wanted of it, by methods of this class.

        Returns:
          (step, what ``read`` returned).

        Raises:
          UserError: there is no checkpoint, or none that can be read; they stay where they are.
          Lost: the processes do not see the same steps.
        """
        damaged: dict[int, Damaged] = {}
        for step in reversed(self.seen_steps()):
            try:
                found = read(step)
            except Damaged as error:
                if not self._read_only and "://" in self.directory:
                    where = self._manager.directory / str(step)
                    raise UserError(f"{error.told}; move {where} away, then run the same command again") from error
                damaged[step] = error
                continue
            if damaged:
                self._pass_over(damaged, step)
            return step, found
        for error in damaged.values():
            raise UserError(f"{error.told}, and no other step can be read; start again in another folder") from error
        raise none_in(self.directory)

    def _pass_over(self, damaged: Mapping[int, Damaged], taken: int) -> None:
        if jax.process_index() == 0:
            for step, error in damaged.items():
                told = f"{error.told}; step {taken} is taken instead"
                if not self._read_only:
                    told += f", and that one moved to {move_aside(self.directory, step)}"
                warn(told)
        all_said("damaged steps moved")
        if not self._read_only:
            self._manager.reload()

    def _known(self, step: int) -> str:
        if step not in self._manager.all_steps():
            return ""
        return "whole" if self._is_complete(step) else "not whole"

    def _is_complete(self, step: int) -> bool:
        return all((self._item(step, item) / file).exists() for item, file in WHOLE)

    def _item(self, step: int, name: str) -> Any:
        return self._manager.directory / str(step) / name

    def _existing(self, step: int | None) -> int:
        self._manager.wait_until_finished()
        steps = self.steps()
        if not steps:
            raise none_in(self.directory)
        if step is not None and step not in steps:
            raise UserError(f"{self.directory} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}.")
        return steps[-1] if step is None else step

    def _meta(self, step: int) -> tuple[dict[str, Any], dict[Path, int] | None]:
        return taken_apart(self._handlers["meta"].restore(self._item(step, "meta")))

    def _stored(self, step: int) -> _Stored:
        with self.agreed(step, "shapes"):
            tree = self._handlers["state"].metadata(self._item(step, "state")).tree
            _, saved = self._meta(step)
            shapes = {path: jax.ShapeDtypeStruct(tuple(x.shape), canonical(x.dtype)) for path, x in flatten(tree)}
            if saved is not None and saved.keys() != shapes.keys():
                raise ValueError(f"{'/'.join(min(saved.keys() ^ shapes.keys()))} was not saved, or is lost")
        return _Stored(shapes, saved)

    def _read(self, step: int, shapes: Mapping[Path, jax.ShapeDtypeStruct], stored: _Stored) -> dict[Path, jax.Array]:
        """Leaves of ``shapes`` in their dtypes, compared with their sums before they are cast to these."""
        as_stored = {
            path: jax.ShapeDtypeStruct(shape.shape, stored.shapes[path].dtype, sharding=shape.sharding)
            for path, shape in shapes.items()
        }
        tree = nest(as_stored)
        how = ocp.checkpoint_utils.construct_restore_args(tree)
        restore = ocp.args.PyTreeRestore(tree, restore_args=how, partial_restore=True)
        with self.agreed(step, "arrays"):  # by the handler: the manager would wait for a process that has met damage
            read = dict(flatten(self._handlers["state"].restore(self._item(step, "state"), args=restore)))
        if stored.sums is not None:
            found = sums(read)
            with self.agreed(step, "sums"):
                check(found, stored.sums)
        for path, shape in shapes.items():  # one after the other: never all in both dtypes
            if read[path].dtype != shape.dtype:
                read[path] = jax.device_put(read[path].astype(shape.dtype), shape.sharding)
        return read

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            bare = type(error) is Exception  # of orbax, where a chunk of an array cannot be decoded
            if isinstance(error, UserError) or not (bare or isinstance(error, _OF_DAMAGE)):
                raise
            reason = disk_reason(error, but=OF_DAMAGE)
            where = f"{self.directory} step {step}"
            if reason:
                raise UserError(f"{where} cannot be read ({reason}); see to the disk, then try again") from error
            others = [other for other in self.steps() if other != step]
            told = first_line((bare and error.__cause__) or error)[:200]
            raise Damaged(f"{where} is damaged ({told})", others) from error

    @contextlib.contextmanager
    def agreed(self, step: int, what: str) -> Iterator[None]:
        """What goes wrong in here is a damaged step (`Damaged`), unless the disk failed; UserErrors pass.

        All processes have to come here, and must not wait for each other in the block: damage at one is at all.

        Args:
          step: that is read.
          what: is read of it, one word.
        """
        damaged = None
        try:
            with self._reading(step):
                yield
        except Damaged as error:
            damaged = error
        for process, told in enumerate(all_said(f"{what} of step {step}", damaged.told if damaged else "")):
            if told:
                raise damaged or Damaged(f"{told} at process {process}", self.steps())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            reason = disk_reason(error)
            if not reason:
                raise
            alone = jax.process_count() == 1  # else others are still writing there; the next start removes it
            for path in self._manager.directory.iterdir() if alone and not self._read_only else ():
                if _TEMPORARY in path.name:  # of a reader they are what the run is writing
                    with contextlib.suppress(OSError):
                        path.rmtree()
            kept = self.latest_step()
            kept = "no step is saved yet" if kept is None else f"step {kept} is kept"
            raise UserError(
                f"{self.directory} cannot be written ({reason}); {kept}. Free space and run the same command again"
            ) from error


def has_checkpoint(directory: str | os.PathLike) -> bool:
    """Whether any process, which all have to ask, sees a complete checkpoint; `Lost` where some see no folder."""
    folder = os.fspath(os.path.expanduser(directory))
    if not all_see(folder, "the folder", lambda: "it" if os.path.isdir(folder) else ""):
        return False
    with Checkpointer(directory, read_only=True) as checkpointer:
        there = checkpointer.latest_step() is not None
    return any(all_said("has a checkpoint", "there" if there else ""))


def read_run(directory: str | os.PathLike, step: int | None, read: Callable[[Checkpointer, int], T]) -> T:
    """Returns what ``read(checkpoints, step)`` makes of a step of a run, which may still be training.

    Args:
      directory: of the checkpoints.
      step: None for the newest that is not damaged.
      read: reads what is wanted.

    Raises:
      UserError: there is no checkpoint, not this one, or (`Damaged`) it cannot be read.
    """
    with Checkpointer(directory, read_only=True) as checkpointer:
        if step is None:
            return checkpointer.newest(lambda step: read(checkpointer, step))[1]
        return read(checkpointer, step)


def load_params(
    directory: str | os.PathLike,
    subtree: str,
    *,
    step: int | None = None,
    sharding: Sharding | Callable[[Any], Any] | None = None,
    dtype: Any = None,
) -> Any:
    """Reads one part of a checkpoint, as `Checkpointer.restore_subtree`; step as for `read_run`."""
    return read_run(directory, step, lambda c, step: c.restore_subtree(step, subtree, sharding=sharding, dtype=dtype))


def load_meta(directory: str | os.PathLike, *, step: int | None = None) -> dict[str, Any]:
    """Reads the JSON saved with a checkpoint; step as for `read_run`."""
    return read_run(directory, step, Checkpointer.meta)
