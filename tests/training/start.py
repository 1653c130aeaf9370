"""Runs that have not made an update: what a stage starts from, without the program of a step."""

from pathlib import Path

from ml_collections import ConfigDict

from greedy_distill_jax.config import read_settings
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.storage.checkpoint import Checkpointer
from greedy_distill_jax.training.job import prepare_job
from greedy_distill_jax.training.loop import Progress
from greedy_distill_jax.training.state import TrainState
from greedy_distill_jax.weights.pipeline import save_codec


def begin(config: ConfigDict, workdir: Path) -> TrainState:
    """The state that a run begins with, saved as its step 0; of a run that is there, the one it goes on from."""
    job = prepare_job(read_settings(config), workdir, make_mesh({"data": -1}))
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        progress = Progress(job, workdir, checkpointer)
        state = progress.start()
        progress.save(state)
    save_codec(job.codec, workdir)
    return state
