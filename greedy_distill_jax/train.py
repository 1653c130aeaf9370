"""The one training loop: config -> mesh -> network -> step function -> checkpoints.

    python -m greedy_distill_jax.train --config=configs/quickstart.py:teacher --workdir=runs/teacher
    python -m greedy_distill_jax.train --config=configs/quickstart.py:student --workdir=runs/student \
        --config.teacher_from=runs/teacher

A stage is a network and a way to call it; losses come from ``config.losses``; nothing here knows a method.
SIGTERM and Ctrl-C save a checkpoint; the same command resumes it, bit for bit.
"""

import contextlib
import functools
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from greedy_distill_jax import cli
from greedy_distill_jax.cli.config_flags import load_config
from greedy_distill_jax.cli.progress import progress
from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.config import keys as configuration
from greedy_distill_jax.data.augment import augmented
from greedy_distill_jax.data.loader import SkipBadRecords, latents_of, make_loader
from greedy_distill_jax.data.sources.protocol import captions_of
from greedy_distill_jax.distribution.mesh import batch_parts, join_hosts, make_mesh, use_compile_cache
from greedy_distill_jax.distribution.parallel import check_columns, check_heads, on_mesh
from greedy_distill_jax.distribution.sharding import shardings
from greedy_distill_jax.errors import Diverged, Stopped, UserError
from greedy_distill_jax.runs.run import Run, architecture, data_source
from greedy_distill_jax.storage.checkpoint import Checkpointer, has_checkpoint
from greedy_distill_jax.text.load import load_text_encoder
from greedy_distill_jax.text.protocol import TextEncoder
from greedy_distill_jax.text.store import check_captions
from greedy_distill_jax.training.metrics import MetricWriter
from greedy_distill_jax.training.stages.build import (
    Part,
    Sources,
    Stage,
    build_model,
    build_stage,
    given_params,
    initial_params,
    load_sources,
    source_fingerprints,
)
from greedy_distill_jax.training.state import TrainState
from greedy_distill_jax.weights.pipeline import load_codec, save_codec

# --- Chapter 1: everything that can be refused, before anything is written -----------------------------------------


class Job(NamedTuple):
    """A run that is ready to start."""

    stage: Stage
    sources: Sources
    source: Any
    captions: list[str]
    codec: VideoCodec
    encoder: TextEncoder
    latent_shape: tuple[int, int, int, int]
    state_shape: TrainState
    state_sharding: TrainState
    batch_sharding: dict[str, NamedSharding]
    frozen_sharding: Any
    parts: tuple[Part, ...]  # of the stage, jitted


def prepare_job(config: ConfigDict, workdir: Path, mesh: Mesh) -> Job:
    """Builds network, data and the jitted step, and traces the step once: every mistake in the config shows here."""
    source, codec = data_source(config, "train", frames=config.data.frames, seed=config.seed)
    known = captions_of(source)
    source = SkipBadRecords(source, config.data.max_bad_records)
    examples = [source[i] for i in range(min(4, len(source)))]
    if "latents" in examples[0] and config.data.augment != "none":
        raise UserError(
            f"config.data.augment {config.data.augment!r} changes pixels, but {config.data.source} holds latents; set "
            f"config.data.augment=none."
        )
    model = build_model(config)
    resumed = has_checkpoint(workdir / "checkpoints")
    sources = load_sources(config, model, resumed=resumed, sharding=functools.partial(shardings, mesh=mesh))
    named = (("teacher_from", sources.teacher), ("student_from", sources.student), ("critic_from", sources.critic))
    for key, run in named:
        if run is not None and run.codec is not None:
            codec = _agreed_codec(codec, run.codec, config[key])
    if resumed:
        codec = _agreed_codec(codec, load_codec(workdir), str(workdir))
    wan = configuration.wan_config(config)
    encoder = load_text_encoder(config.data.text, text_len=wan.text_len, text_dim=wan.text_dim)
    check_captions(encoder, [config.data.negative_prompt, *known], augment=config.data.augment)
    latent_shape = latents_of(examples[:1], codec).shape[1:]
    if latent_shape[-1] != wan.channels:
        raise UserError(f"The codec has {latent_shape[-1]} channels, config.model.channels is {wan.channels}.")
    check_mesh(config, mesh, latent_shape, jax.process_count())
    batch_shape = batch_shapes(config, latent_shape)
    with one_line():
        stage = build_stage(config, model, sources, encoder([config.data.negative_prompt])[0], latent_shape)
        state_shape = state_shapes(stage, latent_shape)
        jitted, state_sharding, frozen_sharding, batch_sharding = jit_parts(stage, mesh, state_shape, batch_shape)
        metrics = {}
        for part in jitted:
            metrics |= part.call.eval_shape(state_shape, stage.frozen, batch_shape)[1]
    for name, metric in metrics.items():
        if metric.shape:
            raise UserError(f"The metric {name} has shape {metric.shape}; a loss must return scalars as metrics.")
    captions = [example["caption"] for example in examples]
    return Job(stage, sources, augmented(source, config.data.augment, config.seed), captions, codec, encoder,
               latent_shape, state_shape, state_sharding, batch_sharding, frozen_sharding, jitted)  # fmt: skip


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """What goes wrong while a job is built or traced is a mistake in its config: a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"config.losses: a loss asks for batch[{error}], which is not there in this stage.") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"config: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


def check_mesh(config: ConfigDict, mesh: Mesh, latent_shape, processes: int = 1) -> None:
    """Raises UserError when batch, microbatches, frames or heads do not divide over the mesh."""
    check_columns(mesh, latent_shape[2] // configuration.wan_config(config).patch)
    check_heads(mesh, configuration.wan_config(config).num_heads)
    if config.stage == "dmd":
        check_heads(mesh, configuration.teacher_config(config).num_heads)
    batch, count, parts = config.data.batch, config.data.accumulate, batch_parts(mesh)
    if parts % processes:
        raise UserError(
            f"the mesh has {parts} data and fsdp parts, which do not divide over the {processes} processes, each of "
            f"which feeds whole parts; make config.mesh.context or config.mesh.tensor smaller."
        )
    if batch % (parts * count):
        raise UserError(
            f"config.data.batch is {batch}; it must divide over the {parts} data and fsdp parts of the mesh, times "
            f"config.data.accumulate = {count}. Change config.data.batch, config.data.accumulate or config.mesh."
        )


def batch_shapes(config: ConfigDict, latent_shape: tuple[int, int, int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """What the loader will hand over."""
    wan, batch = configuration.wan_config(config), config.data.batch
    return {
        "latents": jax.ShapeDtypeStruct((batch, *latent_shape), jnp.float32),
        "text": jax.ShapeDtypeStruct((batch, wan.text_len, wan.text_dim), jnp.float32),
    }


def state_shapes(stage: Stage, latent_shape: tuple[int, int, int, int], given=None) -> TrainState:
    """The state at step 0, shapes only; ``given`` as for ``initial_params``, whose shapes do not depend on it."""
    return jax.eval_shape(
        lambda key, given: stage.state(*initial_params(stage, key, latent_shape, given)), jax.random.key(0), given or {}
    )


def jit_parts(stage: Stage, mesh: Mesh, state_shape: TrainState, batch_shape):
    """(the stage's parts, jitted for the mesh, shardings of state, of frozen networks, of a batch)."""
    of_state, of_frozen, of_batch = (shardings(tree, mesh) for tree in (state_shape, stage.frozen, batch_shape))
    parts = tuple(
        part._replace(
            call=jax.jit(
                on_mesh(part.call, mesh),
                in_shardings=(of_state, of_frozen, of_batch),
                out_shardings=(of_state, NamedSharding(mesh, PartitionSpec())),
                donate_argnums=0,
            )
        )
        for part in stage.parts
    )
    return parts, of_state, of_frozen, of_batch


def _agreed_codec(codec: VideoCodec, stored: VideoCodec, run: str) -> VideoCodec:
    """``stored``, the codec that ``run`` was trained with; UserError when the data comes with another one."""
    arrays = [[np.asarray(x, np.float32) for x in jax.tree.leaves(c.params)] for c in (codec, stored)]
    same = [x.shape for x in arrays[0]] == [x.shape for x in arrays[1]] and all(
        np.allclose(a, b, atol=1e-3) for a, b in zip(*arrays, strict=True)
    )
    if not same:
        raise UserError(
            f"config.data.source comes with another codec than {run} was trained with; use the same data, or train a "
            f"teacher on this one."
        )
    return stored


def check_resume(
    config: ConfigDict, workdir: Path, step: int, meta: dict[str, Any], fingerprints: dict[str, str]
) -> None:
    """Raises UserError when a checkpoint belongs to another stage, seed, data or frozen network.

    Rates, losses and steps may change. ``fingerprints``: see ``stages.source_fingerprints``.
    """
    stored = json.loads(meta["config"])
    for key in (
        "stage", "seed", "data.source", "data.size", "data.frames", "data.batch", "data.augment", "data.text",
        "data.negative_prompt", "distill.real", "distill.fake",
    ):  # fmt: skip
        old, new, default = stored, config, configuration.base()
        for part in key.split("."):
            new, default = new[part], default[part]
            old = old.get(part, default)
        if old != new:
            raise UserError(
                f"{workdir} was started with config.{key} = {old!r}, not {new!r}; resume with the same value or choose "
                f"another workdir."
            )
    for key, old in meta.get("sources", {}).items():
        if fingerprints.get(key) != old:
            raise UserError(
                f"{workdir} was started with another network than the one now in config.{key} = {config[key]!r} "
                f"(fingerprint {old}, not {fingerprints.get(key)}); name that run or choose another workdir."
            )
    if meta["data_position"] != step * config.data.batch:
        raise UserError(f"{workdir} step {step} stands at example {meta['data_position']}; the checkpoint is damaged.")


# --- Chapter 2: the loop --------------------------------------------------------------------------------------------


class _Stop:
    """Set by SIGTERM and Ctrl-C; the loop saves and leaves. A second Ctrl-C interrupts at once."""

    def __init__(self):
        self.signal, self._interrupts = 0, 0
        self._old = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[number] = signal.signal(number, self._set)
            except ValueError:  # not the main thread (a notebook server): no handlers there
                break
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _set(self, number, _):
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if not self.signal:
            print("\nstopping after this update ...", file=sys.stderr, flush=True)
        self.signal = self.signal or number


def _check_finite(config: ConfigDict, pending: list, checkpointer: Checkpointer) -> list[dict]:
    """Device metrics of the updates since the last check as floats; raises at the first that is not finite."""
    out = []
    for step, metrics in pending:
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        bad = [name for name, x in values.items() if not np.isfinite(x)]
        if bad:
            named = [name for name in bad if name in config.losses] or bad
            kept = checkpointer.latest_step()
            raise Diverged(
                f"stage {config.stage}, step {step}: {', '.join(named)} is not finite ({values[named[0]]}); "
                + (f"step {kept} is kept in {checkpointer.directory}. " if kept else "there is no checkpoint yet. ")
                + "Lower the learning rate or look at the data."
            )
        out.append(values)
    return out


def train(config: ConfigDict, workdir: str | Path, *, show_progress: bool = True) -> TrainState:
    """Trains (or resumes) a run and returns its final state.

    Args:
      config: see ``greedy_distill_jax.config.keys.base``.
      workdir: directory of the run: checkpoints, TensorBoard events, scalars.jsonl, codec.npz.
      show_progress: a progress bar with ETA on process 0.

    Raises:
      UserError: a config, workdir or checkpoint that cannot be used, naming value, place and remedy.
      Diverged: a loss, a gradient or a parameter is not finite.
      Stopped: SIGTERM came; the run is saved.
    """
    configuration.validate(config)
    configuration.check_runs(config)
    workdir = Path(workdir).expanduser()
    use_compile_cache(config.compile_cache)
    join_hosts()
    mesh = make_mesh(config.mesh.to_dict())
    main, alone = jax.process_index() == 0, jax.process_count() == 1
    job = prepare_job(config, workdir, mesh)
    fingerprints = source_fingerprints(config, job.sources)

    with _Stop() as stop, contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(Checkpointer(workdir / "checkpoints", max_to_keep=config.checkpoint.keep))
        first, cpu_before = checkpointer.latest_step() or 0, 0.0
        if first:
            meta = checkpointer.meta(first)
            check_resume(config, workdir, first, meta, fingerprints)
            target = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), job.state_shape, job.state_sharding
            )
            state = checkpointer.restore(first, target, architecture=architecture(job.stage.model))
            cpu_before = meta["train_cpu_s"]
            if first >= config.steps and main:
                print(f"{config.stage}: already at step {first} of {config.steps} in {workdir}", file=sys.stderr)
        else:
            state = _initial_state(config, job)
        frozen = jax.device_put(job.stage.frozen, job.frozen_sharding)
        job = job._replace(sources=None, stage=job.stage._replace(frozen=None))  # their memory is needed now
        if main:
            save_codec(job.codec, workdir)
        cpu_start = time.process_time()

        def meta_of(step):
            return dict(
                stage=config.stage, data_position=step * config.data.batch, config=config.to_json_best_effort(),
                architecture=architecture(job.stage.model), train_cpu_s=cpu_before + time.process_time() - cpu_start,
                latent_shape=list(job.latent_shape), steps=config.steps, sources=fingerprints,
            )  # fmt: skip

        writer = stack.enter_context(
            MetricWriter(workdir, enabled=main, resume_step=first, fps=config.log.fps)
        )  # fmt: skip
        loader = make_loader(
            job.source, codec=job.codec, text_encoder=job.encoder, global_batch=config.data.batch, seed=config.seed,
            start=first * config.data.batch, process_index=jax.process_index(), process_count=jax.process_count(),
            num_threads=config.data.threads, max_bad_records=config.data.max_bad_records,
        )  # fmt: skip
        bar = stack.enter_context(progress(config.steps, first, config.stage, enabled=show_progress and main))
        pending, step, compiled = [], first, set()
        while step < config.steps and not stop.signal:
            batch, step = next(loader), step + 1
            batch = {
                name: jax.make_array_from_process_local_data(sharding, batch[name])
                for name, sharding in job.batch_sharding.items()
            }
            metrics = {}
            due = {number for number, part in enumerate(job.parts) if part.due(step)}
            for number in sorted(due):
                state, found = job.parts[number].call(state, frozen, batch)
                metrics |= found
            pending.append((step, metrics))
            save = step % config.checkpoint.every == 0 or step == config.steps
            if save or step % config.log.every == 0:
                values, pending = _check_finite(config, pending, checkpointer), []
                names = dict.fromkeys(name for v in values for name in v)
                mean = {name: float(np.mean([v[name] for v in values if name in v])) for name in names}
                writer.scalars(step, {f"{config.stage}/{name}": x for name, x in mean.items()})
                shown = [name for name in ("loss", "critic/loss") if name in mean]
                bar.set_postfix(**{name.replace("/", "_"): f"{mean[name]:.4f}" for name in shown})
            if save:
                checkpointer.save(step, state, meta_of(step))
            every = config.log.samples_every
            if alone and every and (step % every == 0 or step == config.steps):
                run = Run(config, job.stage.model, state.ema, job.codec, job.encoder, job.latent_shape, meta_of(step))
                for number, video in enumerate(run.sample_videos(job.captions)):
                    writer.gif(step, f"samples/{number}: {job.captions[number]}", video)
            bar.update(1, restart=not due <= compiled)  # the first call of a part compiles it
            compiled |= due
        if stop.signal and step > first and step < config.steps:
            _check_finite(config, pending, checkpointer)
            checkpointer.save(step, state, meta_of(step))
        checkpointer.wait()
    if stop.signal:
        saved = f"saved step {step} of {config.steps} in {workdir}" if step else "nothing to save yet"
        message = f"{config.stage}: stopped, {saved}; the same command goes on from there."
        if stop.signal == signal.SIGTERM:
            raise Stopped(message)
        print(message, file=sys.stderr)
        raise KeyboardInterrupt
    return state


def _initial_state(config: ConfigDict, job: Job) -> TrainState:
    """Step 0: a random network, or one that starts from other runs, made where it will live."""
    given, mesh = given_params(job.stage, job.sources), job.batch_sharding["text"].mesh
    given = jax.device_put(given, shardings(given, mesh))
    make = on_mesh(functools.partial(initial_params, job.stage, latent_shape=job.latent_shape), mesh)
    params, critic = jax.jit(
        lambda key, given: make(key, given=given),
        out_shardings=(job.state_sharding.params, job.state_sharding.critic),
    )(jax.random.key(config.seed), given)
    return jax.jit(job.stage.state, out_shardings=job.state_sharding)(params, critic)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    config, flags = load_config(
        sys.argv[1:] if argv is None else argv, {"workdir": (str, None, "directory of the run (required)")}
    )
    if not flags["workdir"]:
        raise UserError("--workdir is missing; name a directory, such as --workdir=runs/teacher.")
    train(config, flags["workdir"])


if __name__ == "__main__":
    cli.run(main)
