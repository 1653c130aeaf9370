"""The steps of a job compiled for a TPU slice that is not there; nothing of real size is allocated.

Arguments are shapes with shardings, so any machine with libtpu does it. What is compiled is what ``train.py`` runs: the
same stage, the same jitted parts, the same table of shardings.
"""

import dataclasses
import re
import resource
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from greedy_distill_jax import config as configuration, costs, flops, hlo, topology
from greedy_distill_jax.costs import Cost, tokens_per_frame
from greedy_distill_jax.data.text import HashWordEncoder
from greedy_distill_jax.flops import Flops
from greedy_distill_jax.mesh import batch_parts, make_mesh
from greedy_distill_jax.models.dit import Teacher
from greedy_distill_jax.models.student import StreamingModel
from greedy_distill_jax.ops.sliding_window import select
from greedy_distill_jax.parallel import on_mesh
from greedy_distill_jax.sharding import RULES, shardings
from greedy_distill_jax.stages import Sources, Stage, build_model, build_stage
from greedy_distill_jax.stream_causal import make_streamer
from greedy_distill_jax.train import batch_shapes, check_mesh, jit_parts, state_shapes
from greedy_distill_jax.types import UserError

GRID = {"480p": (60, 104), "720p": (90, 160)}  # rows and columns of Wan's latents
STREAM = "stream"


class Step(NamedTuple):
    """One program of a job: its name, the jitted function, the shapes of its arguments, its cost on all devices.

    ``holds`` names the trees of the job that are its arguments.
    """

    name: str
    call: Callable
    arguments: tuple
    cost: Cost
    holds: tuple[str, ...] = ("state", "frozen", "batch")


@dataclasses.dataclass(frozen=True)
class Job:
    """A job on a mesh of described devices."""

    config: Any
    mesh: Mesh
    stage: Stage
    latent_shape: tuple[int, int, int, int]
    trees: dict[str, tuple[Any, Any]]  # name -> (shapes, shardings)
    steps: tuple[Step, ...]

    def facts(self) -> dict[str, Any]:
        """What the job is: nobody can shrink it without changing this."""
        c, (frames, height, width, _) = self.config, self.latent_shape
        wan = configuration.wan_config(c)
        student = isinstance(self.stage.model, StreamingModel)
        joint_teacher = "teacher" in self.stage.frozen
        return {
            "stage": c.stage,
            "frames": frames,
            "tokens_per_frame": tokens_per_frame(self.latent_shape, wan),
            "tokens": frames * tokens_per_frame(self.latent_shape, wan),
            "latents": f"{height}x{width}",
            "text_rows": wan.text_len,
            "parameters": parameters(self.trees["state"][0].params),
            "student": student,
            "teacher_parameters": parameters(self.stage.frozen["teacher"]) if joint_teacher else 0,
            "critic_parameters": parameters(self.trees["state"][0].critic or {}),
            "ema": True,
            "cfg_branches": 2 if joint_teacher and c.distill.guidance != 1.0 else 1,
            "batch": c.data.batch,
            "accumulate": c.data.accumulate,
            "microbatch_per_group": c.data.batch // c.data.accumulate // batch_parts(self.mesh),
            "mesh": {name: int(size) for name, size in self.mesh.shape.items()},
            "devices": int(self.mesh.size),
            "dtype": wan.dtype,
            "remat": wan.remat,
        }


def parameters(tree) -> int:
    """Number of elements."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def device_bytes(shapes, layout) -> int:
    """Bytes of a tree on one device."""
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(layout), strict=True)
    return sum(int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize for x, s in pairs)


def build_job(config, devices, size: str | tuple[int, int] = "480p", only: str = "") -> Job:
    """The job that ``train.py`` would run with this config on these devices, with its streaming step.

    Args:
      config: of the job; the runs it starts from need not exist.
      devices: described (``topology.devices``) or real.
      size: of the frames, a key of ``GRID`` or rows and columns of latents.
      only: steps whose name contains this.

    Raises:
      UserError: a config, or a mesh, that cannot be.
    """
    configuration.validate(config)
    mesh, model = make_mesh(config.mesh.to_dict(), devices), build_model(config)
    wan = configuration.wan_config(config)
    latent_shape = (config.data.frames, *(GRID[size] if isinstance(size, str) else size), wan.channels)
    check_mesh(config, mesh, latent_shape)
    sources = _imagined(config, model, latent_shape)
    null = HashWordEncoder(wan.text_len, wan.text_dim)([""])[0]
    stage = build_stage(config, model, sources, null, latent_shape)
    given = {name: run.params for name, run in sources._asdict().items() if run is not None}
    if not isinstance(model, StreamingModel):
        given = {}
    state, batch = state_shapes(stage, latent_shape, given), batch_shapes(config, latent_shape)
    parts, of_state, of_frozen, of_batch = jit_parts(stage, mesh, state, batch)
    trees = {"state": (state, of_state), "frozen": (stage.frozen, of_frozen), "batch": (batch, of_batch)}
    # Inside stripes the kernels' backward pass repeats their forward pass (parallel.py).
    backward = flops.BACKWARD[_attention(config, mesh)] + (mesh.shape[RULES.columns[0]] > 1)
    cost = costs.part_costs(config, stage, latent_shape, backward=backward)
    steps = [
        Step(part.name or config.stage, part.call, (state, stage.frozen, batch), cost[part.name]) for part in parts
    ]
    if isinstance(model, StreamingModel):
        step, shapes, of_stream = _stream(config, model, mesh, latent_shape, state.params, of_state.params)
        trees[STREAM], trees["params"] = (shapes, of_stream), (state.params, of_state.params)
        steps.append(step)
    return Job(config, mesh, stage, latent_shape, trees, tuple(s for s in steps if only in s.name))


def _imagined(config, model, latent_shape) -> Sources:
    """The runs that the config names or would name, as shapes."""

    def run(network):
        shapes = jax.eval_shape(lambda key: network.init(key, latent_shape), jax.random.key(0))
        return SimpleNamespace(params=shapes)

    if not isinstance(model, StreamingModel):
        return Sources(None, None)
    own, dmd = Teacher(model.cfg.base), config.stage == "dmd"
    teacher = Teacher(configuration.teacher_config(config)) if dmd else own
    return Sources(run(teacher), run(model) if dmd else None, run(own) if dmd and teacher.cfg != own.cfg else None)


def _stream(config, model: StreamingModel, mesh: Mesh, latent_shape, params, of_params):
    """(streaming inference of one chunk for one stream per device group, shapes of its state, their shardings)."""
    wan, sampling = model.cfg.base, configuration.sampling(config)
    streamer, count = make_streamer(model, sampling), batch_parts(mesh)
    text = jax.ShapeDtypeStruct((count, wan.text_len, wan.text_dim), jnp.float32)
    init = on_mesh(lambda params, text, key: streamer.init(params, text, key, latent_shape[1:]), mesh)
    state = jax.eval_shape(init, params, text, jax.random.key(0))
    of_state = shardings(state, mesh)
    batch = NamedSharding(mesh, RULES.spec(("batch",)))
    call = jax.jit(
        on_mesh(streamer.step, mesh), in_shardings=(of_params, of_state), out_shardings=(of_state, batch),
        donate_argnums=1,
    )  # fmt: skip
    cost = flops.stream_step(model.cfg, tokens_per_frame(latent_shape, wan), len(sampling.sigmas[-1])) * count
    return Step(STREAM, call, (params, state), Cost(cost, cost), (STREAM, "params")), state, of_state


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said about one step."""

    name: str
    fits: bool
    seconds: float
    memory: dict[str, int]  # bytes of one device
    hbm: int
    collectives: dict[str, hlo.Count]
    model_flops: Flops
    executed_flops: Flops
    attention: str
    message: str = ""

    @property
    def shortfall(self) -> int:
        """Bytes that are missing on one device."""
        return max(0, self.memory["peak"] - self.hbm)


_OOM = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def compile_step(job: Job, step: Step, hbm: float) -> Compiled:
    """Lowers and compiles one step; one that does not fit is a result, not an error."""
    start = time.perf_counter()
    common = dict(
        name=step.name, model_flops=step.cost.model, executed_flops=step.cost.executed,
        attention=_attention(job.config, job.mesh),
    )  # fmt: skip
    held = sum(device_bytes(*job.trees[name]) for name in step.holds)
    if held > hbm:  # no compiler is needed to see that
        return Compiled(
            fits=False, seconds=0.0, memory={"arguments": held, "peak": held}, hbm=int(hbm), collectives={},
            message="the arguments alone do not fit", **common,
        )  # fmt: skip
    lowered = step.call.lower(*step.arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _OOM.search(str(error))
        if not found:
            raise
        used, has = (int(float(found[i]) * _UNITS[found[i + 1]]) for i in (1, 3))
        return Compiled(
            fits=False, seconds=time.perf_counter() - start, memory={"peak": used}, hbm=has, collectives={},
            message=str(error).splitlines()[0][:200], **common,
        )  # fmt: skip
    stats = compiled.memory_analysis()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    memory["peak"] = sum(memory.values()) - 2 * memory["aliased"]
    sampling = job.config.sample
    unknown = (sampling.steps + 1) / 2 if job.config.distill.exit == "random" else float(sampling.steps)
    return Compiled(
        fits=memory["peak"] <= hbm, seconds=time.perf_counter() - start, memory=memory, hbm=int(hbm),
        collectives=hlo.counts(compiled.as_text(), unknown), **common,
    )  # fmt: skip


def _attention(config, mesh: Mesh) -> str:
    """The implementation that self-attention takes on these devices."""
    wan = configuration.wan_config(config)
    q = jax.ShapeDtypeStruct((1, 8, wan.num_heads, wan.head_dim), jnp.dtype(wan.dtype))
    return on_mesh(lambda: select.choose(None, q, function="chunk_attention"), mesh)()


def host_memory() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def remedies(job: Job, missing: int) -> list[str]:
    """What to change when a step does not fit, the cheapest first."""
    c, mesh, wan = job.config, job.mesh.shape, configuration.wan_config(job.config)
    copies, stripes, split = RULES.batch[0], RULES.columns[0], RULES.embed[0]
    share = c.data.batch // c.data.accumulate // batch_parts(job.mesh)
    columns = job.latent_shape[2] // wan.patch
    options = []
    if wan.remat != "full":
        options.append("config.model.remat=full")
    if share > 1:
        options.append(f"config.data.accumulate={c.data.accumulate * share} (microbatch of 1 instead of {share})")
    if mesh[copies] > 1:
        options.append(f"config.mesh.{copies}=1 with config.mesh.{split}=-1 (parameters and moments over all devices)")
    larger = next((n for n in range(mesh[stripes] + 1, columns + 1) if columns % n == job.mesh.size % n == 0), None)
    if larger:
        options.append(f"config.mesh.{stripes}={larger} (activations of a video over more devices)")
    options.append(f"a larger slice (missing per device: {missing / 2**30:.2f} GiB)")
    return options


def imaginary_runs(config):
    """``config`` with names for the runs that it has to start from: to compile, they need not exist."""
    for key in ("teacher_from", "student_from", "critic_from"):
        config[key] = config[key] or "not loaded"
    return config


def report(config, name: str, size: str, only: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Compiles a job for a slice, line by line; returns the same as a record for a file.

    Args:
      config, size, only: as for ``build_job``.
      name: of the slice, such as "v5p:4x4x4".
      say: takes one line.
    """
    generation, _ = topology.check(name)
    chip, steps = topology.CHIPS[generation], []
    job = build_job(config, topology.devices(name), size, only)
    if not job.steps:
        raise UserError(f"--only is {only!r}, and no step of this job has that in its name.")
    for line in _header(job, name):
        say(line)
    for step in job.steps:
        done = compile_step(job, step, chip.hbm)
        steps.append(_record(job, done, chip))
        for line in _lines(job, done, chip):
            say(line)
    fits = all(step["fits"] for step in steps)
    say(f"  host memory {host_memory() / 2**30:.1f} GiB; {'fits' if fits else 'DOES NOT FIT'}")
    return {
        "topology": name, "compiled_not_run": True, "fits": fits, "facts": job.facts(), "steps": steps,
        "host_bytes": host_memory(),
        "device_bytes": {tree: device_bytes(*pair) for tree, pair in job.trees.items()},
    }  # fmt: skip


def _header(job: Job, name: str) -> Iterator[str]:
    facts = job.facts()
    yield f"{name}: {facts['devices']} chips, mesh {facts['mesh']}, compiled, not run"
    yield (
        f"  {facts['frames']} latent frames of {facts['latents']}, {facts['tokens']:,} tokens; batch {facts['batch']} "
        f"= {facts['accumulate']} x {facts['microbatch_per_group']} x {batch_parts(job.mesh)} groups; CFG branches: "
        f"{facts['cfg_branches']}"
    )
    yield (
        f"  parameters: {facts['parameters']:,} trained (with EMA), teacher {facts['teacher_parameters']:,}, critic "
        f"{facts['critic_parameters']:,}"
    )
    assumed = costs.assumed(job.config)
    if assumed:
        yield f"  FLOPs: {', '.join(assumed)}: not losses of the library, taken to call every network they ask for once"
    for tree, pair in job.trees.items():
        yield f"  {tree}: {device_bytes(*pair) / 2**30:.2f} GiB per device"


def _record(job: Job, done: Compiled, chip: topology.Chip) -> dict[str, Any]:
    sent = sum(c.bytes for c in done.collectives.values())
    per_device = done.model_flops.total / job.mesh.size
    return {
        "step": done.name, "fits": done.fits, "seconds": round(done.seconds, 1), "memory": done.memory,
        "hbm": done.hbm, "attention": done.attention, "message": done.message,
        "model_flops": done.model_flops.total, "executed_flops": done.executed_flops.total,
        "model_flops_per_device": per_device,
        "collectives": {kind: dataclasses.asdict(count) for kind, count in done.collectives.items()},
        "sent_bytes_per_device": sent,
        "flops_per_sent_byte": per_device / sent if sent else None,
        "chip_flops_per_link_byte": chip.flops / chip.link_rate,
    }  # fmt: skip


def _lines(job: Job, done: Compiled, chip: topology.Chip) -> Iterator[str]:
    gib = {part: f"{part} {size / 2**30:.2f}" for part, size in done.memory.items()}
    yield f"  {done.name}: {', '.join(gib.values())} of {done.hbm / 2**30:.2f} GiB, compiled in {done.seconds:.0f} s"
    yield (
        f"    model FLOPs {done.model_flops.total:.3e} ({done.executed_flops.total:.3e} executed), attention "
        f"{done.attention}, {done.collectives['kernels'].runs:,.0f} kernel calls"
        if done.fits
        else f"    model FLOPs {done.model_flops.total:.3e} ({done.executed_flops.total:.3e} executed)"
    )
    sent = 0.0
    for kind in hlo.KINDS:
        count = done.collectives.get(kind, hlo.Count())
        sent += count.bytes
        if count.instructions:
            yield (
                f"    {kind}: {count.instructions} in the program, {count.runs:,.0f} runs, "
                f"{count.bytes / 2**30:.2f} GiB sent per device"
            )
    if sent:
        intensity = done.model_flops.total / job.mesh.size / sent
        published = chip.flops / chip.link_rate
        yield f"    {intensity:,.0f} FLOPs per byte sent; the chip's published ratio is {published:,.0f}"
    if not done.fits:
        yield f"    DOES NOT FIT: {done.shortfall / 2**30:.2f} GiB too much per device. Change one of:"
        yield from (f"      {option}" for option in remedies(job, done.shortfall))
