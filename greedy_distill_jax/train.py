"""Trains a network: config -> settings -> mesh -> stage -> losses -> loop.

    python -m greedy_distill_jax.train --config=configs/quickstart.py:teacher --workdir=runs/teacher
    python -m greedy_distill_jax.train --config=configs/quickstart.py:student --workdir=runs/student \
        --config.teacher_from=runs/teacher

A stage says which networks it trains, what they start from, and the parts of a step (``training.stages``, one file
each); losses are pure functions that the configuration names (``losses``); the loop knows neither. SIGTERM and Ctrl-C
save a checkpoint; the same command resumes it, bit for bit.
"""

import contextlib
import dataclasses
import os
import signal
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from greedy_distill_jax import cli
from greedy_distill_jax.cli.config_flags import load_config
from greedy_distill_jax.config import open_keys, read_settings
from greedy_distill_jax.distribution.compile_cache import use_compile_cache
from greedy_distill_jax.distribution.freed_memory import keep_freed_memory
from greedy_distill_jax.distribution.hosts import alike
from greedy_distill_jax.distribution.hosts.join import check_devices, check_joined, join_hosts
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.errors import Stopped, UserError
from greedy_distill_jax.pods.jobs import not_taken
from greedy_distill_jax.storage.checkpoint import Checkpointer
from greedy_distill_jax.storage.lock import sole_writer
from greedy_distill_jax.storage.together import all_said
from greedy_distill_jax.training.job import prepare_job
from greedy_distill_jax.training.loop import Progress, run_loop
from greedy_distill_jax.training.metrics import MetricWriter
from greedy_distill_jax.training.state import TrainState
from greedy_distill_jax.training.stop import NOTHING, STOPPED, AgreedStop, Stop
from greedy_distill_jax.weights.pipeline import save_codec


def train(config: ConfigDict, workdir: str | Path, *, show_progress: bool = True) -> TrainState:
    """Trains (or resumes) a run and returns its final state.

    Args:
      config: started from ``greedy_distill_jax.config.base``.
      workdir: directory of the run: checkpoints, TensorBoard events, scalars.jsonl, codec.npz.
      show_progress: a progress bar with ETA on process 0.

    Raises:
      UserError: a config, workdir or checkpoint that cannot be used, naming value, place and remedy.
      Diverged: a loss, a gradient or a parameter is not finite.
      Lost: another process of the job did not come or does not answer, or one that is gone still has workdir locked.
      Stopped: SIGTERM came; the run is saved.

    Of several processes one that raises is ended within seconds, and so are the others.
    """
    # What the run is: settings, devices, then networks, data and jitted parts. All that can be refused is refused here.
    settings, workdir = read_settings(config), Path(workdir).expanduser()
    use_compile_cache(settings.compile_cache)
    process, processes, *_ = joined = join_hosts()
    stop = AgreedStop(settings.stage, process, processes) if processes > 1 else Stop()
    # What ends one of several processes ends the others, too: they hear of it before this one unwinds.
    agreeing = stop if processes > 1 else contextlib.nullcontext()
    with agreeing, contextlib.ExitStack() as stack, stop.telling():
        alike.check_start(joined, settings.text, **{"--workdir": str(workdir)})
        check_joined()
        check_devices(joined, jax.local_device_count(), jax.local_devices()[0].device_kind)
        alike.check_devices_alike(joined)
        all_said("devices")  # the first collective, while all are here: it waits for a late one for seconds only
        if main := jax.process_index() == 0:
            stack.enter_context(sole_writer(workdir))
        job = prepare_job(settings, workdir, make_mesh(dataclasses.asdict(settings.mesh)))
        alike.check_data(joined, job.data | job.fingerprints)
        if processes == 1:
            stack.enter_context(stop)
        # Where it stands: at its newest checkpoint, or at the beginning.
        checkpointer = stack.enter_context(Checkpointer(workdir / "checkpoints", max_to_keep=settings.checkpoint.keep))
        progress = Progress(job, workdir, checkpointer)
        state, frozen = progress.start(), jax.device_put(job.stage.frozen, job.frozen_sharding)
        progress.job = job = job._replace(given={}, stage=job.stage._replace(frozen={}))  # their memory is needed now
        if main:
            for other in not_taken(settings, job.mesh, job.latent_shape):
                print(f"attention: {other}.", file=sys.stderr)
            save_codec(job.codec, workdir)
        if progress.first >= settings.steps and main:
            print(
                f"{settings.stage}: already at step {progress.first} of {settings.steps} in {workdir}", file=sys.stderr
            )
        writer = stack.enter_context(
            MetricWriter(workdir, enabled=main, resume_step=progress.first, fps=settings.log.fps)
        )
        state = run_loop(progress, state, frozen, writer, stop, show_progress and main)

    if progress.step < settings.steps or stop.signal:  # told in the last update, too: what follows is not to begin
        step = progress.step
        saved = f"saved step {step} of {settings.steps} in {workdir}" if step else NOTHING
        message = STOPPED.format(settings.stage, saved)
        if stop.signal == signal.SIGTERM:
            raise Stopped(message if main else "")
        if main:
            print(message, file=sys.stderr)
        raise KeyboardInterrupt
    return state


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    cli.stopped_code(os.environ)  # here, and not when it is needed
    flags = {"workdir": (str, None, "directory of the run (required)")}
    config, flags = load_config(sys.argv[1:] if argv is None else argv, flags, open_keys=open_keys())
    if not flags["workdir"]:
        raise UserError("--workdir is missing; name a directory, such as --workdir=runs/teacher.")
    with cli.places(workdir="--workdir"):
        train(config, flags["workdir"])


if __name__ == "__main__":
    keep_freed_memory()
    cli.run(main)
