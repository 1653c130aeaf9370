"""A job on a TPU slice that is not there: its networks, mesh and steps, as shapes; nothing of real size is allocated.

What ``train.py`` runs is built here from the same parts: the same stage, the same jitted functions, the same table of
shardings. The step "stream" has no such twin: ``sample.py`` streams on one device; only here is a stream whose slots
are full (``Streamer.steady``) laid out over a mesh, one per group of devices. On a mesh that leaves parameters and
frames whole (configs/wan1_3b/sample.py) every device then runs what they run, in one program instead of two.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from greedy_distill_jax.config import Settings
from greedy_distill_jax.distribution.mesh import batch_parts, make_mesh
from greedy_distill_jax.distribution.parallel import on_mesh
from greedy_distill_jax.distribution.sharding import RULES, shardings, with_shardings
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models import flops
from greedy_distill_jax.models.students.base import StreamingModel
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.models.wan.linear import compute_precision
from greedy_distill_jax.ops.attention import Pattern, select
from greedy_distill_jax.ops.attention.backends.record import Backend
from greedy_distill_jax.pods import costs
from greedy_distill_jax.pods.costs import tokens_per_frame
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.text.hashed_words import HashWordEncoder
from greedy_distill_jax.training.check_mesh import check_mesh
from greedy_distill_jax.training.cost import Cost
from greedy_distill_jax.training.job import jit_parts, one_line, state_shapes
from greedy_distill_jax.training.sources import frozen_runs
from greedy_distill_jax.training.stages import rl, rl_keys
from greedy_distill_jax.training.stages.base import Inputs, Stage

GRID = {"480p": (60, 104), "720p": (90, 160)}  # rows and columns of Wan's latents
STREAM = "stream"


class Misfit(UserError):
    """A mesh, or a batch, that these devices cannot have; others might."""


class Step(NamedTuple):
    """One program of a job: its name, the jitted function, the shapes of its arguments, its cost on all devices.

    ``holds`` names the trees of the job that are in memory while it runs; it may not use all that is in them.
    ``dynamic_trips``: mean runs of a loop whose bound is known only while the step runs; None if there is none.
    """

    name: str
    call: Any  # as jax.jit returns it
    arguments: tuple
    cost: Cost
    holds: tuple[str, ...] = ("state", "frozen", "batch")
    dynamic_trips: float | None = None


class Networks(NamedTuple):
    """What a job is before it has devices: stage and shapes."""

    stage: Stage
    latent_shape: tuple[int, int, int, int]
    state: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    names: tuple[str, ...]  # of the steps that are asked for


@dataclasses.dataclass(frozen=True)
class Job:
    """A job on a mesh of described devices."""

    settings: Settings
    mesh: Mesh
    stage: Stage
    latent_shape: tuple[int, int, int, int]
    trees: dict[str, tuple[Any, Any]]  # name -> (shapes, shardings)
    steps: tuple[Step, ...]


def device_bytes(shapes, layout) -> int:
    """Returns the bytes of a tree on one device."""
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(layout), strict=True)
    return sum(int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize for x, s in pairs)


def build_networks(settings: Settings, size: str | tuple[int, int] = "480p", only: str = "") -> Networks:
    """The part of a job that does not depend on devices.

    Args:
      settings: of the job; the runs it starts from need not exist.
      size: of the frames, a key of ``GRID`` or rows and columns of latents.
      only: steps whose name contains this.

    Raises:
      UserError: a config that cannot be, on any devices.
    """
    if isinstance(size, str) and size not in GRID:
        raise UserError(f"frames of {size!r} are not known; choose from {', '.join(GRID)}", "size")
    with one_line():
        model, wan = settings.kind.model(settings), settings.wan
        latent_shape = (settings.data.frames, *(GRID[size] if isinstance(size, str) else size), wan.channels)
        sources = _imagined(settings, model, latent_shape)
        frozen = {name: run.params for name, run in frozen_runs(settings.kind.wanted(settings), sources).items()}
        null = HashWordEncoder(wan.text_len, wan.text_dim)([""])[0]
        stage = settings.kind.build(settings, Inputs(frozen, null, latent_shape))
        state = state_shapes(stage, latent_shape, {name: sources[name].params for name in stage.needed(sources)})
    names = [part.name for part in stage.parts]
    names += [STREAM] if isinstance(model, StreamingModel) else []
    asked = tuple(name for name in names if only in name)
    if not asked:
        raise UserError(
            f"no step of this job has {only!r} in its name; choose from {', '.join(names)}",
            "only",
        )
    return Networks(stage, latent_shape, state, settings.kind.batch_shapes(settings, latent_shape), asked)


def build_job(
    settings: Settings, devices, size: str | tuple[int, int] = "480p", only: str = "", one_video: bool = False
) -> Job:
    """The job that ``train.py`` would run with this config on these devices, with its streaming step.

    Args:
      settings, size, only: as for ``build_networks``.
      devices: described (``topology.devices``) or real.
      one_video: every group of devices takes one video at a time: ``config.data.accumulate`` is set to what makes of
        the global batch.

    Raises:
      UserError: a config that cannot be; ``Misfit``: a mesh or a batch that these devices cannot have.
    """
    try:
        mesh = make_mesh(dataclasses.asdict(settings.mesh), devices)
    except UserError as error:
        raise Misfit(str(error)) from error
    if one_video:
        if settings.data.batch % batch_parts(mesh):
            raise Misfit(
                f"config.data.batch is {settings.data.batch}, less than a video for each of the {batch_parts(mesh)} "
                f"data and fsdp parts of the mesh, or not the same number; choose a multiple, or a larger config.mesh."
                f"{RULES.columns[0]}."
            )
        data = dataclasses.replace(settings.data, accumulate=settings.data.batch // batch_parts(mesh))
        settings = settings.replace(data=data)
        if settings.stage == "dmd" and settings.own["distill"].pg == "actor_critic" and data.accumulate > 1:
            raise Misfit(
                f"distill.pg=actor_critic takes no microbatches, and a batch of {data.batch} makes {data.accumulate} "
                f"of a video for each of the {batch_parts(mesh)} data and fsdp parts."
            )
    stage, latent_shape, state, batch, names = build_networks(settings, size, only)
    try:
        check_mesh(settings, mesh, latent_shape, hosts(mesh))
        parts, of_state, of_frozen, of_batch = jit_parts(stage, mesh, state, batch)
    except UserError as error:
        raise Misfit(f"{error}{_accumulate_instead(settings, mesh)}") from error
    trees = {"state": (state, of_state), "frozen": (stage.frozen, of_frozen), "batch": (batch, of_batch)}
    attention = attention_of(settings, mesh, latent_shape)
    # Inside stripes the kernels' backward pass repeats their forward pass (parallel.py).
    backward = attention.backward_flops + (not attention.partitionable and mesh.shape[RULES.columns[0]] > 1)
    cost, steps = costs.part_costs(settings, stage, latent_shape, backward=backward), []
    trips = loop_trips(settings, stage, latent_shape)
    for part in parts:
        if part.host:
            continue  # there is nothing to compile, and later parts say what they take
        carry = with_shardings(dict(part.takes), shardings(dict(part.takes), mesh))
        arguments = (state, stage.frozen, batch, carry)
        steps.append(Step(part.name, part.call, arguments, cost[part.name], dynamic_trips=trips.get(part.name)))
    if isinstance(stage.model, StreamingModel):
        params, of_params = (tree.nets[stage.name].params for tree in (state, of_state))
        params = compute_precision(params, settings.wan.dtype)  # as a session holds them
        step, shapes, of_stream = _stream(settings, stage.model, mesh, latent_shape, params, of_params)
        trees[STREAM], trees["params"] = (shapes, of_stream), (params, of_params)
        steps.append(step)
    return Job(settings, mesh, stage, latent_shape, trees, tuple(s for s in steps if s.name in names))


def hosts(mesh: Mesh) -> int:
    """Machines that the devices of a mesh belong to."""
    return len({device.process_index for device in mesh.devices.flat})


def _accumulate_instead(settings: Settings, mesh: Mesh) -> str:
    """A hint for a batch that does not divide, if another ``config.data.accumulate`` is all it takes."""
    batch, parts = settings.data.batch, batch_parts(mesh)
    if batch % parts or not batch % (parts * settings.data.accumulate):
        return ""
    return f" Here config.data.accumulate={batch // parts} gives every group of devices one video at a time."


def _imagined(settings: Settings, model, latent_shape) -> dict[str, Any]:
    """The runs that the stage starts from or asks, as shapes."""

    def run(network):
        shapes = jax.eval_shape(lambda key: network.init(key, latent_shape), jax.random.key(0))
        return SimpleNamespace(params=shapes)

    return {
        name: run(Teacher(want.architecture) if isinstance(want.architecture, WanConfig) else model)
        for name, want in settings.kind.wanted(settings).items()
    }


def _stream(settings: Settings, model: StreamingModel, mesh: Mesh, latent_shape, params, of_params):
    """(streaming inference of one chunk for one stream per device group, shapes of its state, their shardings)."""
    wan, plan = model.cfg.base, settings.plan
    streamer, count = make_streamer(model, plan), batch_parts(mesh)
    text = jax.ShapeDtypeStruct((count, wan.text_len, wan.text_dim), jnp.float32)
    init = on_mesh(lambda params, text, key: streamer.init(params, text, key, latent_shape[1:]), mesh)
    with one_line():
        state = jax.eval_shape(init, params, text, jax.random.key(0))
        of_state = shardings(state, mesh)
    batch = NamedSharding(mesh, RULES.spec(("batch",)))
    call = jax.jit(
        on_mesh(streamer.steady().step, mesh),
        in_shardings=(of_params, of_state),
        out_shardings=(of_state, batch),
        donate_argnums=1,
    )
    calls = int(plan.lengths[-1])
    cost = flops.stream_step(model.cfg, tokens_per_frame(latent_shape, wan), calls) * count
    whole = Cost(cost, cost * mesh.shape[RULES.columns[0]])  # streams are not split into stripes: all do the same
    return Step(STREAM, call, (params, state), whole, (STREAM, "params")), state, of_state


def loop_trips(settings: Settings, stage: Stage, latent_shape: tuple[int, int, int, int]) -> dict[str, float]:
    """{part: mean runs of its loops whose bound is known only while it runs}.

    Of stage "dmd" these are the denoising calls of a chunk. Of stage "rl" they are the chunks before the streams of a
    group part; its critic's, which sees whole streams, denoises each chunk up to an exit as in stage "dmd".

    Raises:
      UserError: stage "rl" with several step lists, whose denoising loops are dynamic as well.
    """
    chunk = settings.student.chunk
    if settings.stage == "rl":
        if len(settings.plan.sigmas) > 1:
            raise UserError(
                f"config.sample.steps = {settings.sample.steps!r} has {len(settings.plan.sigmas)} lists, and how often "
                f"the loops of stage rl run is known here for one alone; give one number of steps."
            )
        plan = rl.episode_plan(settings, stage.model, Inputs({}, None, latent_shape))
        start = (plan.lowest + plan.highest) / 2
        critic = rollout_trips(settings, chunk, rl_keys.stream_frames(settings))
        return {"rollout": start - plan.own.given // chunk, "rl": start, "critic": critic}
    if settings.stage == "dmd":
        trips = rollout_trips(settings, chunk, latent_shape[0])
        return dict.fromkeys((part.name for part in stage.parts), trips)
    return {}


def rollout_trips(settings: Settings, chunk: int, frames: int) -> float:
    """Mean denoising calls per chunk of a self-made video.

    Args:
      chunk: latent frames made together.
      frames: latent frames of an example.
    """
    plan, d = settings.plan, settings.own["distill"]
    return float(np.mean([flops.calls_of(plan, i, d.exit) for i in range((d.frames or frames) // chunk)]))


def attention_of(settings: Settings, mesh: Mesh, latent_shape: tuple[int, ...]) -> Backend:
    """The backend that self-attention takes on these devices, for chunks of one latent frame."""
    return _ask(functools.partial(select.choose, None, function="chunk_attention"), settings, mesh, latent_shape)


def not_taken(settings: Settings, mesh: Mesh, latent_shape: tuple[int, ...]) -> list[str]:
    """The backends that could run there as well, each with the reason why it is not taken."""
    others = _ask(select.passed_over, settings, mesh, latent_shape)
    return [f"not {name}, because {why}" for name, why in others.items()]


def _ask(question: Callable, settings: Settings, mesh: Mesh, latent_shape: tuple[int, ...]):
    """``question(queries, pattern)`` of one latent frame on these devices."""
    wan, (_, height, width, _) = settings.wan, latent_shape
    q = jax.ShapeDtypeStruct((1, 8, wan.num_heads, wan.head_dim), jnp.dtype(wan.dtype))
    frame = Pattern.full(1, height * width // wan.patch**2 // mesh.shape[RULES.columns[0]])
    return on_mesh(lambda: question(q, frame), mesh)()
