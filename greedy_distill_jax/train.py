"""The one training loop: config -> mesh -> network -> step function -> checkpoints.

    python -m greedy_distill_jax.train --config=configs/quickstart.py:teacher --workdir=runs/teacher
    python -m greedy_distill_jax.train --config=configs/quickstart.py:student --workdir=runs/student \
        --config.teacher_from=runs/teacher

A stage is a network and a way to call it; losses come from ``config.losses``; nothing here knows a method.
SIGTERM and Ctrl-C save a checkpoint; the same command resumes it, bit for bit.
"""

import functools
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from greedy_distill_jax import cli, config as configuration, steps
from greedy_distill_jax.checkpoint import Checkpointer
from greedy_distill_jax.config_cli import load_config
from greedy_distill_jax.data.augment import augmented
from greedy_distill_jax.data.loader import load_source, make_loader
from greedy_distill_jax.data.text import HashWordEncoder
from greedy_distill_jax.logging import MetricWriter, progress
from greedy_distill_jax.mesh import batch_parts, make_mesh, start
from greedy_distill_jax.models.dit import Teacher
from greedy_distill_jax.models.student import Student
from greedy_distill_jax.run import Run, architecture, write_assets
from greedy_distill_jax.sharding import shardings
from greedy_distill_jax.state import TrainState, make_optimizer
from greedy_distill_jax.types import UserError


class Diverged(RuntimeError):
    """A loss or gradient is not finite; the last good checkpoint is kept."""


# --- Chapter 1: what is trained, and how it is called -------------------------------------------------------------


def build_network(config: ConfigDict):
    """(model with ``init``, ``make_net(params, key)``) of the config's stage."""
    if config.stage == "teacher":
        model = Teacher(configuration.wan_config(config))
        return model, functools.partial(steps.teacher_net, model)
    student = Student(configuration.student_config(config))
    last = configuration.sampling(config).sigmas[-1][-1] if student.cfg.context == "last_step_kv" else None
    make_net = functools.partial(
        steps.student_net, student, context_noise=config.student.context_noise, last_sigma=last
    )
    return student, make_net


def data_source(config: ConfigDict, split: str):
    """(source, codec) of ``config.data``; clips have a size of their own."""
    size = config.data.size if config.data.source == "moving_shapes" else None
    return load_source(config.data.source, split, size=size, frames=config.data.frames, seed=config.seed)


def initial_params(config: ConfigDict, model, latent_shape):
    """A random teacher, or a student cut from the teacher of ``config.teacher_from``."""
    key = jax.random.key(config.seed)
    if isinstance(model, Teacher) or not config.teacher_from:
        return jax.jit(lambda k: model.init(k, latent_shape))(key)
    teacher = Run.load(config.teacher_from)
    if teacher.config.stage != "teacher":
        raise UserError(f"config.teacher_from {config.teacher_from} holds stage {teacher.config.stage}, not a teacher.")
    differing = _differences(teacher.model.cfg, model.cfg.base)
    if differing:
        raise UserError(
            f"config.teacher_from {config.teacher_from} has another architecture: {differing}; "
            f"set the same config.model for teacher and student."
        )
    return jax.jit(lambda k, p: model.from_teacher(k, p, latent_shape))(key, teacher.params)


def _differences(a, b) -> str:
    ours = ("dtype", "remat", "gate_init", "text_init", "time_init")  # no effect on a trained teacher's meaning
    fields = [f for f in a.__dataclass_fields__ if f not in ours and getattr(a, f) != getattr(b, f)]
    return ", ".join(f"{f} {getattr(a, f)} against {getattr(b, f)}" for f in fields)


def new_parameter_scale(scale: float):
    """Factors on updates: ``scale`` for student parameters that no teacher has, 1 for the rest."""

    def factors(params):
        def factor(path, leaf):
            names = {getattr(k, "key", "") for k in path}
            norm_of_etm = {"etm", "norm"} <= names and "blocks" not in names
            fresh = norm_of_etm or names & {"z_k", "z_v", "z_in", "z_gate", "bos"}
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


# --- Chapter 3: the loop --------------------------------------------------------------------------------------------


class _Stop:
    """Set by SIGTERM and Ctrl-C; the loop saves and leaves at the next update."""

    def __init__(self):
        self.signal = 0
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
        self.signal = number


def _check_finite(config: ConfigDict, pending: list, directory) -> list[dict]:
    """Device metrics of the updates since the last check as floats; raises at the first that is not finite."""
    out = []
    for step, metrics in pending:
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        bad = [name for name, x in values.items() if not np.isfinite(x)]
        if bad:
            named = [name for name in bad if name in config.losses] or bad
            raise Diverged(
                f"stage {config.stage}, step {step}: {', '.join(named)} is not finite ({values[named[0]]}); "
                f"the last good checkpoint is kept in {directory}. Lower the learning rate or look at the data."
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
      Diverged: a loss is not finite.
    """
    configuration.validate(config)
    workdir = Path(workdir).expanduser()
    if config.compile_cache:
        start(config.compile_cache)
    mesh = make_mesh(config.mesh.to_dict())
    main = jax.process_index() == 0

    source, codec = data_source(config, "train")
    examples = [source[i % len(source)] for i in range(4)]
    source = augmented(source, config.data.augment, config.seed)
    wan = configuration.wan_config(config)
    encoder = HashWordEncoder(wan.text_len, wan.text_dim)
    model, make_net = build_network(config)
    latent_shape = (config.data.frames, *codec.latent_shape(*examples[0]["video"].shape[1:3]))
    if latent_shape[-1] != wan.channels:
        raise UserError(f"The codec has {latent_shape[-1]} channels, config.model.channels is {wan.channels}.")

    optimizer = optimizer_of(config)
    step_fn = make_step(config, make_net, optimizer, encoder([""])[0])
    shape = jax.eval_shape(lambda k: make_state(model.init(k, latent_shape), optimizer), jax.random.key(0))
    state_sharding = shardings(shape, mesh)
    batch_shape = {
        "latents": jax.ShapeDtypeStruct((config.data.batch, *latent_shape), jnp.float32),
        "text": jax.ShapeDtypeStruct((config.data.batch, wan.text_len, wan.text_dim), jnp.float32),
    }
    parts = batch_parts(mesh)
    if config.data.batch % parts:
        raise UserError(
            f"config.data.batch is {config.data.batch}, which does not divide over the {parts} parts of the mesh; "
            f"choose a multiple of {parts} or another config.mesh."
        )
    batch_sharding = shardings(batch_shape, mesh)
    jitted = jax.jit(
        step_fn,
        in_shardings=(state_sharding, batch_sharding),
        out_shardings=(state_sharding, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )

    checkpointer = Checkpointer(workdir / "checkpoints", max_to_keep=config.checkpoint.keep)
    begun, cpu_before = checkpointer.latest_step(), 0.0
    if begun is None:
        params = jax.device_put(initial_params(config, model, latent_shape), state_sharding.params)
        state = jax.jit(lambda p: make_state(p, optimizer), out_shardings=state_sharding)(params)
    else:
        target = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shape, state_sharding)
        state = checkpointer.restore(begun, target, architecture=architecture(model))
        stored = checkpointer.meta(begun)
        cpu_before = stored["train_cpu_s"]
        if stored["data_position"] != begun * config.data.batch:
            raise UserError(
                f"{workdir}: the checkpoint stands at example {stored['data_position']}, not a multiple of "
                f"config.data.batch = {config.data.batch} after {begun} steps; resume with the batch it was made with."
            )
    first = begun or 0
    if main:
        write_assets(workdir, codec)

    def meta(step):
        return dict(
            stage=config.stage, data_position=step * config.data.batch, config=config.to_json_best_effort(),
            architecture=architecture(model), train_cpu_s=cpu_before + time.process_time() - cpu_start,
            latent_shape=list(latent_shape), steps=config.steps,
        )  # fmt: skip

    writer = MetricWriter(workdir, enabled=main, resume_step=first, fps=config.log.fps)
    cpu_start, pending, saved = time.process_time(), [], begun
    loader = make_loader(
        source, codec=codec, text_encoder=encoder, global_batch=config.data.batch, seed=config.seed,
        start=first * config.data.batch, process_index=jax.process_index(), process_count=jax.process_count(),
        num_threads=config.data.threads, max_bad_records=config.data.max_bad_records,
    )  # fmt: skip
    bar = progress(config.steps, first, config.stage, enabled=show_progress and main)
    with _Stop() as stop, bar:
        for step in range(first + 1, config.steps + 1):
            batch = next(loader)
            batch = {
                name: jax.make_array_from_process_local_data(batch_sharding[name], batch[name]) for name in batch_shape
            }
            state, metrics = jitted(state, batch)
            pending.append((step, metrics))
            stopping = stop.signal  # read once: a signal later in this update is for the next one
            last = step == config.steps or stopping != 0
            save = step % config.checkpoint.every == 0 or last
            if save or step % config.log.every == 0:
                values = _check_finite(config, pending, workdir / "checkpoints")
                pending = []
                mean = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
                writer.scalars(step, {f"{config.stage}/{name}": x for name, x in mean.items()})
                bar.set_postfix(loss=f"{mean['loss']:.4f}")
            if save:
                checkpointer.save(step, state, meta(step))
                saved = step
            if config.log.samples_every and (step % config.log.samples_every == 0 or step == config.steps):
                run = Run(config, model, state.ema, codec, encoder, latent_shape, meta(step))
                captions = [example["caption"] for example in examples]
                for caption, video in zip(captions, run.sample_videos(captions), strict=True):
                    writer.gif(step, f"samples/{caption}", video)
            bar.update(1)
            if stopping:
                break
    checkpointer.wait()
    writer.close()
    checkpointer.close()
    if stop.signal and saved < config.steps and main:
        print(f"{config.stage}: stopped by a signal, saved step {saved} of {config.steps} in {workdir}; "
              f"the same command goes on from there.", file=sys.stderr)  # fmt: skip
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt
    return state


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    config, flags = load_config(
        sys.argv[1:] if argv is None else argv, {"workdir": (str, None, "directory of the run (required)")}
    )
    if not flags["workdir"]:
        raise UserError("--workdir is missing; name a directory, such as --workdir=runs/teacher.")
    try:
        train(config, flags["workdir"])
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(4)


if __name__ == "__main__":
    cli.run(main)
