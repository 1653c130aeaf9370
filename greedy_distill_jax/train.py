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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from greedy_distill_jax import cli, config as configuration, steps
from greedy_distill_jax.checkpoint import Checkpointer, has_checkpoint
from greedy_distill_jax.config_cli import load_config
from greedy_distill_jax.data.augment import augmented
from greedy_distill_jax.data.loader import SkipBadRecords, make_loader
from greedy_distill_jax.data.text import HashWordEncoder
from greedy_distill_jax.logging import MetricWriter, progress
from greedy_distill_jax.mesh import batch_parts, join_hosts, make_mesh, use_compile_cache
from greedy_distill_jax.models.codec import PatchCodec
from greedy_distill_jax.models.dit import Teacher
from greedy_distill_jax.models.student import Student
from greedy_distill_jax.run import CODEC, NOT_ARCHITECTURE, Run, architecture, data_source
from greedy_distill_jax.sharding import shardings
from greedy_distill_jax.state import TrainState, make_optimizer
from greedy_distill_jax.types import Diverged, Stopped, UserError

# --- Chapter 1: what is trained, and how it is called -------------------------------------------------------------


def build_network(config: ConfigDict):
    """(model with ``init``, ``make_net(params, key)``) of the config's stage."""
    if config.stage == "teacher":
        model = Teacher(configuration.wan_config(config))
        return model, functools.partial(steps.teacher_net, model)
    student = Student(configuration.student_config(config))
    lists = configuration.sampling(config).sigmas
    last = (lists[0][-1], lists[-1][-1]) if student.cfg.context == "last_step_kv" else None
    make_net = functools.partial(
        steps.student_net, student, context_noise=config.student.context_noise, last_sigmas=last
    )
    return student, make_net


def check_teacher(config: ConfigDict, model: Student, teacher: Run) -> None:
    """Raises UserError unless the student can be cut from that run."""
    if teacher.config.stage != "teacher":
        raise UserError(f"config.teacher_from {config.teacher_from} holds stage {teacher.config.stage}, not a teacher.")
    differing = _differences(teacher.model.cfg, model.cfg.base)
    if differing:
        raise UserError(
            f"config.teacher_from {config.teacher_from} has another architecture: {differing}; "
            f"set the same config.model for teacher and student."
        )


def _differences(a, b) -> str:
    fields = [f for f in a.__dataclass_fields__ if f not in NOT_ARCHITECTURE and getattr(a, f) != getattr(b, f)]
    return ", ".join(f"{f} {getattr(a, f)} against {getattr(b, f)}" for f in fields)


def new_parameter_scale(scale: float):
    """Factors on updates: ``scale`` for student parameters that no teacher has, 1 for the rest."""

    def factors(params):
        def factor(path, leaf):
            names = {getattr(k, "key", "") for k in path}
            norm_of_etm = {"etm", "norm"} <= names and "blocks" not in names
            fresh = norm_of_etm or names & {"z_k", "z_v", "norm_z", "z_in", "z_gate", "bos"}
            return jnp.asarray(scale if fresh else 1.0, leaf.dtype).reshape((1,) * leaf.ndim)

        return jax.tree_util.tree_map_with_path(factor, params)

    return factors


# --- Chapter 2: the step function on the mesh ---------------------------------------------------------------------


def make_step(config: ConfigDict, make_net, optimizer, null_MC):
    """``step(state, batch) -> (state, metrics)``, pure."""
    return functools.partial(
        steps.train_step,
        seed=config.seed,
        null_MC=jnp.asarray(null_MC),
        make_net=make_net,
        terms=configuration.terms(config),
        optimizer=optimizer,
        text_dropout=config.text_dropout,
        ema_decay=config.ema.decay,
        ema_start=config.ema.start,
        rate_scale=new_parameter_scale(config.optimizer.new_scale) if config.optimizer.new_scale != 1.0 else None,
    )


def optimizer_of(config: ConfigDict):
    """The optimiser of ``config.optimizer``."""
    o = {k: v for k, v in config.optimizer.items() if k != "new_scale"}
    return make_optimizer(o.pop("name"), steps=config.steps, **{**o, "betas": tuple(o["betas"])})


def make_state(params, optimizer) -> TrainState:
    """Update 0."""
    return TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


# --- Chapter 3: everything that can be refused, before anything is written -----------------------------------------


class Job(NamedTuple):
    """A run that is ready to start."""

    model: Teacher | Student
    teacher: Run | None
    source: Any
    captions: list[str]
    codec: PatchCodec
    encoder: HashWordEncoder
    latent_shape: tuple[int, int, int, int]
    optimizer: optax.GradientTransformation
    state_shape: TrainState
    state_sharding: TrainState
    batch_sharding: dict[str, NamedSharding]
    step: Callable


def prepare_job(config: ConfigDict, workdir: Path, mesh: Mesh) -> Job:
    """Builds network, data and the jitted step, and traces the step once: every mistake in the config shows here."""
    source, codec = data_source(config, "train", frames=config.data.frames, seed=config.seed)
    source = SkipBadRecords(source, config.data.max_bad_records)
    examples = [source[i] for i in range(min(4, len(source)))]
    model, make_net = build_network(config)
    resumed = has_checkpoint(workdir / "checkpoints")
    teacher = None
    if config.teacher_from and isinstance(model, Student) and not resumed:
        teacher = Run.load(config.teacher_from, needs_codec=False)
        check_teacher(config, model, teacher)
        if teacher.codec is not None:
            codec = _agreed_codec(codec, teacher.codec, config.teacher_from)
    elif resumed:
        codec = _agreed_codec(codec, PatchCodec.load(workdir / CODEC), str(workdir))
    wan = configuration.wan_config(config)
    encoder = HashWordEncoder(wan.text_len, wan.text_dim)
    latent_shape = (config.data.frames, *codec.latent_shape(*examples[0]["video"].shape[1:3]))
    if latent_shape[-1] != wan.channels:
        raise UserError(f"The codec has {latent_shape[-1]} channels, config.model.channels is {wan.channels}.")
    parts, processes = batch_parts(mesh), jax.process_count()
    if config.data.batch % parts or parts % processes:
        raise UserError(
            f"config.data.batch is {config.data.batch}; it must divide over the {parts} data and fsdp parts of the "
            f"mesh, and these over the {processes} processes. Change config.data.batch or config.mesh."
        )

    batch_shape = {
        "latents": jax.ShapeDtypeStruct((config.data.batch, *latent_shape), jnp.float32),
        "text": jax.ShapeDtypeStruct((config.data.batch, wan.text_len, wan.text_dim), jnp.float32),
    }
    try:
        optimizer = optimizer_of(config)
        state_shape = jax.eval_shape(lambda k: make_state(model.init(k, latent_shape), optimizer), jax.random.key(0))
        state_sharding, batch_sharding = shardings(state_shape, mesh), shardings(batch_shape, mesh)
        step = jax.jit(
            make_step(config, make_net, optimizer, encoder([""])[0]),
            in_shardings=(state_sharding, batch_sharding),
            out_shardings=(state_sharding, NamedSharding(mesh, PartitionSpec())),
            donate_argnums=0,
        )
        metrics = step.eval_shape(state_shape, batch_shape)[1]
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"config: {error}") from error
    for name, metric in metrics.items():
        if metric.shape:
            raise UserError(f"The metric {name} has shape {metric.shape}; a loss must return scalars as metrics.")
    captions = [example["caption"] for example in examples]
    return Job(model, teacher, augmented(source, config.data.augment, config.seed), captions, codec, encoder,
               latent_shape, optimizer, state_shape, state_sharding, batch_sharding, step)  # fmt: skip


def _agreed_codec(codec: PatchCodec, stored: PatchCodec, run: str) -> PatchCodec:
    """``stored``, the codec that ``run`` was trained with; UserError when the data comes with another one."""
    same = stored.components.shape == codec.components.shape and all(
        np.allclose(getattr(stored, name), getattr(codec, name), atol=1e-3) for name in ("components", "mean", "scale")
    )
    if not same:
        raise UserError(
            f"config.data.source comes with another codec than {run} was trained with; use the same data, or train a "
            f"teacher on this one."
        )
    return stored


def check_resume(config: ConfigDict, workdir: Path, step: int, meta: dict[str, Any]) -> None:
    """Raises UserError when a checkpoint belongs to another stage, seed or data. Rates, losses and steps may change."""
    stored = json.loads(meta["config"])
    for key in ("stage", "seed", "data.source", "data.size", "data.frames", "data.batch", "data.augment"):
        old, new, default = stored, config, configuration.base()
        for part in key.split("."):
            new, default = new[part], default[part]
            old = old.get(part, default)
        if old != new:
            raise UserError(
                f"{workdir} was started with config.{key} = {old!r}, not {new!r}; resume with the same value or choose "
                f"another workdir."
            )
    if meta["data_position"] != step * config.data.batch:
        raise UserError(f"{workdir} step {step} stands at example {meta['data_position']}; the checkpoint is damaged.")


# --- Chapter 4: the loop --------------------------------------------------------------------------------------------


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
      config: see ``greedy_distill_jax.config.base``.
      workdir: directory of the run: checkpoints, TensorBoard events, scalars.jsonl, codec.npz.
      show_progress: a progress bar with ETA on process 0.

    Raises:
      UserError: a config, workdir or checkpoint that cannot be used, naming value, place and remedy.
      Diverged: a loss, a gradient or a parameter is not finite.
      Stopped: SIGTERM came; the run is saved.
    """
    configuration.validate(config)
    workdir = Path(workdir).expanduser()
    use_compile_cache(config.compile_cache)
    join_hosts()
    mesh = make_mesh(config.mesh.to_dict())
    main, alone = jax.process_index() == 0, jax.process_count() == 1
    job = prepare_job(config, workdir, mesh)

    with _Stop() as stop, contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(Checkpointer(workdir / "checkpoints", max_to_keep=config.checkpoint.keep))
        first, cpu_before = checkpointer.latest_step() or 0, 0.0
        if first:
            meta = checkpointer.meta(first)
            check_resume(config, workdir, first, meta)
            target = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), job.state_shape, job.state_sharding
            )
            state = checkpointer.restore(first, target, architecture=architecture(job.model))
            cpu_before = meta["train_cpu_s"]
            if first >= config.steps and main:
                print(f"{config.stage}: already at step {first} of {config.steps} in {workdir}", file=sys.stderr)
        else:
            state = _initial_state(config, job)
            job = job._replace(teacher=None)  # its memory is needed now
        if main:
            job.codec.save(workdir / CODEC)
        cpu_start = time.process_time()

        def meta_of(step):
            return dict(
                stage=config.stage, data_position=step * config.data.batch, config=config.to_json_best_effort(),
                architecture=architecture(job.model), train_cpu_s=cpu_before + time.process_time() - cpu_start,
                latent_shape=list(job.latent_shape), steps=config.steps,
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
        pending, step = [], first
        while step < config.steps and not stop.signal:
            batch, step = next(loader), step + 1
            batch = {
                name: jax.make_array_from_process_local_data(sharding, batch[name])
                for name, sharding in job.batch_sharding.items()
            }
            state, metrics = job.step(state, batch)
            pending.append((step, metrics))
            save = step % config.checkpoint.every == 0 or step == config.steps
            if save or step % config.log.every == 0:
                values, pending = _check_finite(config, pending, checkpointer), []
                mean = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
                writer.scalars(step, {f"{config.stage}/{name}": x for name, x in mean.items()})
                bar.set_postfix(loss=f"{mean['loss']:.4f}")
            if save:
                checkpointer.save(step, state, meta_of(step))
            every = config.log.samples_every
            if alone and every and (step % every == 0 or step == config.steps):
                run = Run(config, job.model, state.ema, job.codec, job.encoder, job.latent_shape, meta_of(step))
                for number, video in enumerate(run.sample_videos(job.captions)):
                    writer.gif(step, f"samples/{number}: {job.captions[number]}", video)
            bar.update(1)
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
    """Update 0: a random network, or a student cut from its teacher, made where it will live."""
    key = jax.random.key(config.seed)
    if job.teacher:
        params = jax.jit(
            lambda k, p: job.model.from_teacher(k, p, job.latent_shape), out_shardings=job.state_sharding.params
        )(key, jax.device_put(job.teacher.params, _replicated(job)))
    else:
        params = jax.jit(
            lambda k: job.model.init(k, job.latent_shape), out_shardings=job.state_sharding.params
        )(key)  # fmt: skip
    return jax.jit(lambda p: make_state(p, job.optimizer), out_shardings=job.state_sharding)(params)


def _replicated(job: Job) -> NamedSharding:
    return NamedSharding(job.batch_sharding["text"].mesh, PartitionSpec())


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
