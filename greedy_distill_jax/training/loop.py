"""The one loop that every stage runs in: batches in, parts in their order, scalars, samples and checkpoints out."""

import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from greedy_distill_jax import cli
from greedy_distill_jax.cli.progress import progress
from greedy_distill_jax.data.loader import make_loader
from greedy_distill_jax.distribution.agreement import ServiceStore
from greedy_distill_jax.distribution.compile_cache import compiled_ahead
from greedy_distill_jax.distribution.mesh import batch_parts, parts_of
from greedy_distill_jax.distribution.rows import Rows, assembled, global_rows, whole_at_first
from greedy_distill_jax.distribution.sharding import with_shardings
from greedy_distill_jax.errors import Diverged
from greedy_distill_jax.runs.run import Run, architecture
from greedy_distill_jax.storage.checkpoint import Checkpointer
from greedy_distill_jax.storage.records import first_line
from greedy_distill_jax.storage.together import all_said
from greedy_distill_jax.training.job import DATA_PLACES, Job, check_resume, initial_state
from greedy_distill_jax.training.metrics import UNKNOWN, MetricWriter
from greedy_distill_jax.training.stages.base import Part, returned
from greedy_distill_jax.training.state import TrainState
from greedy_distill_jax.training.stop import Stop

_SAMPLING = 60.0  # seconds of one wait for samples: the coordination service keeps something of every wait


class Progress:
    """Steps made, what they cost, and how both are saved."""

    def __init__(self, job: Job, workdir: Path, checkpointer: Checkpointer):
        self.job, self.checkpointer, self._workdir = job, checkpointer, workdir
        self.first = self.step = 0
        self._cpu_before, self._cpu_start = 0.0, time.process_time()
        self._pending: list[tuple[int, dict[str, Any]]] = []

    def start(self) -> TrainState:
        """The state to go on from: of the newest checkpoint that can be read, or of step 0."""
        if not self.checkpointer.seen_steps():
            state = initial_state(self.job)
        else:
            self.first, (meta, state) = self.checkpointer.newest(self._read)
            self.step, self._cpu_before = self.first, meta["train_cpu_s"]
        self._cpu_start = time.process_time()
        return state

    def _read(self, step: int) -> tuple[dict[str, Any], TrainState]:
        job, meta = self.job, self.checkpointer.meta(step)
        check_resume(job, self._workdir, step, meta)
        target = with_shardings(job.state_shape, job.state_sharding)
        kinds = {"architecture": False, "defaults": True}
        given = {name: architecture(job.stage.model, defaults=default) for name, default in kinds.items()}
        return meta, self.checkpointer.restore(step, target, **given)

    def meta(self) -> dict[str, Any]:
        """What is saved with the state of this step."""
        return self.job.meta(self.step, self._cpu_before + time.process_time() - self._cpu_start)

    def made(self, metrics: dict[str, Any]) -> None:
        """One more step is made; its metrics stay on the device until ``check``."""
        self._pending.append((self.step, metrics))

    def check(self) -> dict[str, float]:
        """Means of the metrics since the last check; raises Diverged at the first that is not finite."""
        settings, values = self.job.settings, []
        for step, metrics in self._pending:
            found = {name: float(x) for name, x in jax.device_get(metrics).items()}
            found = {name: x for name, x in found.items() if not (name.startswith(UNKNOWN) and np.isnan(x))}
            bad = [name for name, x in found.items() if not np.isfinite(x)]
            if bad:
                named = [name for name in bad if name in settings.losses] or bad
                kept = self.checkpointer.latest_step()
                kept = f"step {kept} is kept in {self.checkpointer.directory}" if kept else "there is no checkpoint yet"
                raise Diverged(
                    f"stage {settings.stage}, step {step}: {', '.join(named)} is not finite ({found[named[0]]}); "
                    f"{kept}. Lower the learning rate or look at the data."
                )
            settings.kind.check_metrics(settings, step, found)
            values.append(found)
        self._pending = []
        names = dict.fromkeys(name for v in values for name in v)
        return {name: float(np.mean([v[name] for v in values if name in v])) for name in names}

    def save(self, state: TrainState) -> None:
        """Saves this step."""
        self.checkpointer.save(self.step, state, self.meta())


class Batch(NamedTuple):
    """Arrays on their devices, and the captions of this process's examples."""

    arrays: dict[str, jax.Array]
    captions: list[str]


def run_parts(
    parts: tuple[Part, ...],
    step: int,
    state: TrainState,
    frozen,
    batches: Mapping[str, Batch],
    mesh: Mesh,
    compiled: Collection[str] = (),
):
    """(state after the parts of a step, their metrics, names of those that were due).

    Batches are by ``Part.order``. Several processes run a part that is not among ``compiled`` once all have compiled
    it: a first collective waits for who comes late for seconds only (gloo 30, whatever is set).
    """
    metrics: dict[str, Any] = {}
    carry: Any = {}
    due = [part for part in parts if part.due(step)]
    for part in due:
        batch = batches[part.order]
        if part.host:
            given = Rows(batch.arrays, {"captions": batch.captions}), Rows(carry)
            _, found, carry = returned(part, part.call(None, None, *given))
            carry = {name: x if isinstance(x, jax.Array) else global_rows(x, mesh) for name, x in carry.items()}
        else:
            if jax.process_count() > 1 and part.name not in compiled:
                compiled_ahead(part.call, state, frozen, batch.arrays, carry)
                all_said(f"compiled {part.name}")
            state, found, carry = part.call(state, frozen, batch.arrays, carry)
        metrics |= found
    return state, metrics, {part.name for part in due}


class Feed:
    """Global batches, from where step ``first`` ended; one order of the data per ``Part.order``."""

    def __init__(self, job: Job, first: int):
        self._job, self._first = job, first
        self._orders: dict[str, Iterator[Batch]] = {}

    def __call__(self, step: int) -> dict[str, Batch]:
        """The batches of a step, by order."""
        return {order: next(self._of(order)) for order in self._due(step)}

    def _due(self, step: int) -> set[str]:
        return {part.order for part in self._job.parts if not part.order or part.due(step)}

    def _of(self, order: str) -> Iterator[Batch]:
        if order not in self._orders:
            seed, seen = self._job.settings.seed, self._first
            if order:
                seed = int(np.random.SeedSequence([seed, *order.encode()]).generate_state(1)[0])
                seen = sum(order in self._due(step) for step in range(1, self._first + 1))
            self._orders[order] = _batches(self._job, seed, seen)
        return self._orders[order]


def _batches(job: Job, seed: int, seen: int) -> Iterator[Batch]:
    data = job.settings.data
    size = data.batch // batch_parts(job.mesh)
    rows = [part * size + row for part in parts_of(job.mesh, jax.process_index()) for row in range(size)]
    loader = make_loader(
        job.source,
        codec=job.codec,
        text_encoder=job.encoder,
        global_batch=data.batch,
        seed=seed,
        start=seen * data.batch,
        rows=rows,
        num_threads=data.threads,
        max_bad_records=data.max_bad_records,
    )
    while True:
        with cli.places(**DATA_PLACES):
            batch = next(loader)
        arrays = {name: assembled(batch[name], sharding) for name, sharding in job.batch_sharding.items()}
        yield Batch(arrays, batch["captions"])


def run_loop(
    progress_of: Progress, state: TrainState, frozen: Any, writer: MetricWriter, stop: Stop, show: Callable | bool
) -> TrainState:
    """Steps until the last one of the settings, or until ``stop``; returns the last state, saved."""
    at, job = progress_of, progress_of.job
    settings, feed, compiled = job.settings, Feed(job, at.first), set()
    samples = Samples(job, writer)
    with progress(settings.steps, at.first, settings.stage, enabled=show) as bar:
        while at.step < settings.steps and stop.begins(at.step + 1):
            at.checkpointer.check()
            batches, at.step = feed(at.step + 1), at.step + 1
            state, metrics, due = run_parts(job.parts, at.step, state, frozen, batches, job.mesh, compiled)
            state = state._replace(step=_placed(at.step, job.state_sharding.step))
            at.made(metrics)
            last = at.step == settings.steps
            save = last or at.step % settings.checkpoint.every == 0
            if save or at.step % settings.log.every == 0:
                mean = at.check()
                writer.scalars(at.step, {f"{settings.stage}/{name}": x for name, x in mean.items()})
                shown = {name: x for name, x in mean.items() if name in ("loss", "critic/loss")}
                slowest = {"slowest": told} if (told := stop.slowest()) else {}
                bar.set_postfix(**{name.replace("/", "_"): f"{x:.4f}" for name, x in shown.items()}, **slowest)
            if save:
                at.save(state)
            every = settings.log.samples_every
            if every and (last or at.step % every == 0):
                samples.write(state, at.meta(), at.step)
            bar.update(1, restart=not due <= compiled)  # the first call of a part compiles it
            compiled |= due
    if at.first < at.step < settings.steps:
        mean = at.check()
        if mean:
            writer.scalars(at.step, {f"{settings.stage}/{name}": x for name, x in mean.items()})
        at.save(state)
    at.checkpointer.wait()
    return state


def _placed(step: int, sharding: jax.sharding.Sharding) -> jax.Array:
    """A number that every process has, without asking the others whether they do, as ``device_put`` would."""
    return jax.make_array_from_callback((), sharding, lambda _: np.int32(step))


class Samples:
    """Videos of the first captions, by process 0 alone, so that their noise does not depend on how many there are.

    The others wait for it outside of any computation, which would not wait for as long as samples may take.
    """

    def __init__(self, job: Job, writer: MetricWriter):
        self._job, self._writer, self._told = job, writer, set()
        self._store = ServiceStore() if jax.process_count() > 1 else None

    def write(self, state: TrainState, meta: dict[str, Any], step: int) -> None:
        """Writes the videos of a step's average; all processes have to call this."""
        ema = state.nets[self._job.stage.name].ema
        if self._store:
            ema = whole_at_first(ema)
        if jax.process_index():
            while self._store.get(f"sampled/{step}", _SAMPLING) is None:
                pass
            return
        try:
            self._write(ema, meta, step)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            warnings.warn(
                f"no samples at step {step}: the device has no room for them beside the training "
                f"({first_line(error)[:200]}); set config.log.samples_every=0, and sample from a checkpoint"
            )
        if self._store:
            self._store.set(f"sampled/{step}", "")

    def _write(self, ema: Any, meta: dict[str, Any], step: int) -> None:
        job = self._job
        run = Run(job.settings, job.stage.model, ema, job.codec, job.encoder, job.latent_shape, meta, self._told)
        for number, video in enumerate(run.sample_videos(job.captions, seed=jax.random.key(0))):
            self._writer.gif(step, f"samples/{number}: {job.captions[number]}", video)
