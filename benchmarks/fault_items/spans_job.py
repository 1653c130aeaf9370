"""Trains stages on meshes, one after the other in the same processes, and keeps what they learnt and streamed.

    python spans_job.py ROOT CASE...

A case is STAGE:MESH (see ``spans``), stream:MESH, "origin", which trains what the others start from, or
"trajectories", which stage ode learns from. Every update is plain gradient descent, so that it is the gradient, and is
read from the optimiser's state: parameters, many times as large, round its last digits away. Process 0 writes an
.npz of each.
"""

import functools
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from fault_items.spans import MESHES, STEPS
from greedy_distill_jax import cli
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.data.sources.trajectories import write_trajectories
from greedy_distill_jax.distribution.hosts.join import join_hosts
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.distribution.parallel import on_mesh
from greedy_distill_jax.distribution.rows import whole_at_first
from greedy_distill_jax.distribution.sharding import leaf_paths, shardings
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.streaming.loop import noise_keys
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.train import train
from greedy_distill_jax.training.metrics import read_scalars
from greedy_distill_jax.training.stages import base as stage_base

SIZES = dict(model__dim=48, model__ffn_dim=64, model__num_heads=4, data__batch=8)
TRAJECTORIES, CHUNKS = "trajectories", 3
# fsdp is one of the axes along which a batch is cut: a prompt for each of its four devices.
PROMPTS = ("a red square", "a blue circle", "a green square", "a red circle")
# Of descent. The student learns from how far the critic's scores are from those of the teacher, as which it starts:
# while it has not left it, that difference is mostly rounding.
RATE, CRITIC_RATE = 1.0, 30.0
_adaptive = stage_base.make_optimizer


def config_of(root: Path, stage: str, mesh: str) -> Any:
    """A run of a few steps from those of "origin"."""
    changes = SIZES | {"steps": STEPS[stage], "ema__start": 0, "optimizer__learning_rate": RATE}
    changes |= {f"mesh__{axis}": size for axis, size in MESHES[mesh].items()}
    changes |= {"log__samples_every": int(stage == "teacher_forcing" and mesh != "one")}
    if stage in ("teacher", "teacher_forcing", "dmd", "ode"):
        changes["teacher_from"] = str(root / "teacher")
    if stage == "dmd":
        changes |= dict(critic__optimizer__learning_rate=CRITIC_RATE, distill__critic_warmup=1)
    if stage in ("dmd", "rl"):
        changes["student_from"] = str(root / "student")
    if stage == "rl":
        changes |= dict(text_dropout=0.0, sample__sampler="renoise", rl__group=2, rl__frames=8, rl__clip=4)
    if stage == "ode":
        changes |= {"data__source": f"ode:{root / TRAJECTORIES}", "sample__steps": 2}
    config = tiny.train_config(stage, **changes)
    with config.unlocked():
        if stage in ("rl", "ode"):
            del config.losses["flow_matching"]
        if stage == "rl":
            config.losses.grpo = dict(loss="cm_grpo", weight=1.0, options={})
            config.rl.step = "stochastic"
            config.rl.rewards.still = dict(reward="flicker", weight=1.0)
        if stage == "ode":
            config.losses.ode = dict(loss="ode", weight=1.0, options={})
    return config


def origin(root: Path) -> None:
    """A teacher and a student that have learnt a little, so that no gradient is zero."""
    stage_base.make_optimizer = _adaptive
    for name, stage, changes in (
        ("teacher", "teacher", {}),
        ("student", "teacher_forcing", {"teacher_from": str(root / "teacher")}),
    ):
        train(tiny.train_config(stage, steps=2, **SIZES, **changes), root / name, show_progress=False)


def trajectories(root: Path) -> None:
    """Of the teacher, at the noise levels of stage ode."""
    run, levels = Run.load(root / "teacher"), read_settings(config_of(root, "ode", "one"), imagine_runs=True)
    sampler = run.teacher_sampler(steps=4)
    sigmas = levels.plan.sigmas[0]
    write_trajectories(
        [f"a red square number {i}" for i in range(8)],
        root / TRAJECTORIES,
        functools.partial(sampler.trajectories, kept=sigmas),
        run.encoder,
        run.codec,
        sigmas=sigmas,
        latent_shape=run.latent_shape,
        plan={},
        progress=False,
    )


def _descent(keys: Any, **_: Any) -> optax.GradientTransformation:
    """Plain gradient descent whose state is the sum of its updates."""

    def update(gradients, moved, params=None):
        updates = jax.tree.map(lambda gradient: -keys.learning_rate * gradient, gradients)
        return updates, jax.tree.map(jnp.add, moved, updates)

    return optax.GradientTransformation(optax.tree.zeros_like, update)


def learnt(root: Path, stage: str, mesh: str) -> dict[str, np.ndarray]:
    """What every network of a stage has moved by, and every scalar that was logged."""
    stage_base.make_optimizer = _descent
    workdir = root / f"run-{stage}-{mesh}"
    if jax.process_index() == 0:
        shutil.rmtree(workdir, ignore_errors=True)
    state = train(config_of(root, stage, mesh), workdir, show_progress=False)
    trees = {name: whole_at_first(net.opt_state) for name, net in state.nets.items()}
    found = {f"moved/{path}": np.asarray(x) for path, x in leaf_paths(trees)}
    lines = read_scalars(workdir) if jax.process_index() == 0 else []
    for line in lines:
        step = line["step"]
        found |= {f"scalar/{step}/{k}": np.float64(x) for k, x in line.items() if k not in ("step", "time")}
    return found


def streamed(root: Path, mesh: str) -> dict[str, np.ndarray]:
    """Chunks of a student that streams the prompts on the mesh."""
    mesh = make_mesh(MESHES[mesh])
    run = Run.load(root / "student", sharding=functools.partial(shardings, mesh=mesh))
    streamer, shape, text = run.streamer(), tuple(run.latent_shape[1:]), np.asarray(run.text(PROMPTS))

    def init(params, text):
        return streamer.init(params, text, noise_keys(0, len(PROMPTS)), shape)

    of_state = shardings(jax.eval_shape(on_mesh(init, mesh), run.params, text), mesh)
    state = jax.jit(on_mesh(init, mesh), out_shardings=of_state)(run.params, text)
    whole = NamedSharding(mesh, PartitionSpec())
    step, chunks = jax.jit(on_mesh(streamer.step, mesh), out_shardings=(of_state, whole)), []
    for _ in range(CHUNKS):
        state, latents = step(run.params, state)
        chunks.append(np.asarray(latents.addressable_data(0)))
    return {"moved/latents": np.concatenate(chunks, axis=1)}


def main(argv: list[str]) -> None:
    """Command line."""
    root = Path(argv[0])
    join_hosts()
    for case in argv[1:]:
        if case in ("origin", "trajectories"):
            {"origin": origin, "trajectories": trajectories}[case](root)
            continue
        stage, mesh = case.split(":")
        found = streamed(root, mesh) if stage == "stream" else learnt(root, stage, mesh)
        if jax.process_index() == 0:
            np.savez(root / f"{jax.process_count()}x{jax.local_device_count()}-{stage}-{mesh}.npz", **found)


if __name__ == "__main__":
    cli.run(lambda argv: main(argv or sys.argv[1:]))
