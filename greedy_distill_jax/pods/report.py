"""Compiles the steps of a job for a TPU slice that is not there, and says whether they fit and what they send.

Memory is the compiler's account of one device, plus what the job keeps there that the step does not use: the critic's
step has no use for the frozen teacher, but it is there. Any machine with libtpu does it.
"""

import dataclasses
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from greedy_distill_jax.config import Settings
from greedy_distill_jax.distribution.mesh import batch_parts
from greedy_distill_jax.distribution.sharding import RULES
from greedy_distill_jax.ops.attention import aot
from greedy_distill_jax.pods import costs, hlo, topologies
from greedy_distill_jax.pods.flops import Flops
from greedy_distill_jax.pods.jobs import STREAM, Job, Step, attention_of, build_job, device_bytes, hosts
from greedy_distill_jax.training.job import one_line

GIB = topologies.GIB


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said about one step.

    memory: bytes of one device. "held": all that the job keeps while the step runs, used by it or not; "arguments",
    "outputs", "aliased", "temporaries", "code": the program's; "peak": all of it together, as far as it is known.
    seconds, cpu_seconds: of lowering and compilation, by the clock and of all threads; None where nothing had to be
    compiled.
    """

    name: str
    fits: bool
    seconds: float | None
    cpu_seconds: float | None
    memory: dict[str, int]
    hbm: int
    collectives: dict[str, hlo.Count]
    model_flops: Flops
    executed_flops: Flops
    attention: str
    message: str = ""

    @property
    def shortfall(self) -> int:
        """Bytes that are missing on one device, at least: libtpu does not always say all that a step needs."""
        return max(0, self.memory["peak"] - self.hbm)

    def flops_per_device(self, devices: int) -> float:
        """Model FLOPs; where a stream runs whole on several devices, on each of them."""
        return (self.executed_flops if self.name == STREAM else self.model_flops).total / devices


# Two ways in which libtpu refuses: with the peak of the whole program, or before it has one.
_PEAK = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
_TEMPORARIES = re.compile(r"memory required for HLO temporaries \(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compile_step(job: Job, step: Step, hbm: float | int) -> Compiled:
    """Lowers and compiles one step; one that does not fit is a result, not an error.

    Raises:
      UserError: the step cannot be traced with this config.
    """
    start = time.perf_counter(), time.process_time()
    held = sum(device_bytes(*job.trees[name]) for name in step.holds)
    attention = attention_of(job.settings, job.mesh)
    common = dict(
        name=step.name, model_flops=step.cost.model, executed_flops=step.cost.executed,
        attention=attention.name, hbm=int(hbm),
    )  # fmt: skip
    if held > hbm:  # no compiler is needed to see that
        return Compiled(
            fits=False, seconds=None, cpu_seconds=None, memory={"held": held, "peak": held}, collectives={},
            message="what the job keeps on a device does not fit, whatever the step needs beside it", **common,
        )  # fmt: skip
    with one_line():
        lowered = step.call.lower(*step.arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            compiled = aot.interruptible(lambda: lowered.compile(compiler_options=options))
        except jax.errors.JaxRuntimeError as error:
            return Compiled(
                fits=False, memory=_asked(error, held), collectives={}, message=str(error).splitlines()[0][:200],
                **_since(start), **common,
            )  # fmt: skip
        memory, text = _memory(compiled.memory_analysis(), held), _text(compiled, Path(folder))
    found = hlo.counts(text, step.dynamic_trips)
    if attention.kernels and not found["kernels"].instructions:
        raise RuntimeError(f"{step.name}: attention is said to be {attention.name}, but no kernel is called.")
    return Compiled(fits=memory["peak"] <= hbm, memory=memory, collectives=found, **_since(start), **common)


def _since(start: tuple[float, float]) -> dict[str, float]:
    return dict(seconds=time.perf_counter() - start[0], cpu_seconds=time.process_time() - start[1])


def _text(compiled: Any, folder: Path) -> str:
    """The optimised program as libtpu has written it: jaxlib's ``as_text`` cannot read all that libtpu makes (v5p)."""
    for stage in ("after_codegen", "after_optimizations"):
        if written := list(folder.glob(f"*.{stage}.txt")):
            return max(written, key=lambda path: path.stat().st_size).read_text()
    return compiled.as_text()


def _memory(stats, held: int) -> dict[str, int]:
    memory = {
        "held": held,
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    program = sum(memory.values()) - held - 2 * memory["aliased"]
    return memory | {"peak": program + max(0, held - memory["arguments"])}


def _asked(error: Exception, held: int) -> dict[str, int]:
    """What a program that libtpu refused would have needed; any other error is raised again."""
    if found := _PEAK.search(str(error)):
        return {"held": held, "peak": int(float(found[1]) * _UNITS[found[2]])}
    if found := _TEMPORARIES.search(str(error)):
        temporaries = int(float(found[1]) * _UNITS[found[2]])
        return {"held": held, "temporaries": temporaries, "peak": held + temporaries}
    raise error


def host_memory() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def remedies(job: Job, name: str, done: Compiled) -> list[str]:
    """What to change when a step does not fit, the cheapest first.

    Args:
      name: of the slice.
      done: the step.
    """
    c, mesh, wan = job.settings, job.mesh.shape, job.settings.wan
    copies, stripes, split = RULES.batch[0], RULES.columns[0], RULES.embed[0]
    share = c.data.batch // c.data.accumulate // batch_parts(job.mesh)
    columns = job.latent_shape[2] // wan.patch
    compiled, options = done.seconds is not None, []  # else what is kept is too much, however little a step computes
    trained = compiled and done.name != STREAM
    if trained and wan.remat != "full":
        options.append("config.model.remat=full")
    if trained and share > 1:
        options.append(f"config.data.accumulate={c.data.accumulate * share} (microbatch of 1 instead of {share})")
    if mesh[copies] > 1:
        options.append(f"config.mesh.{copies}=1 with config.mesh.{split}=-1 (parameters and moments over all devices)")
    # Streams are not split into stripes, and every host feeds whole groups of devices.
    for n in range(mesh[stripes] + 1, columns + 1) if trained else ():
        groups, rest = divmod(job.mesh.size, n * mesh[RULES.heads[0]])
        if rest or columns % n or groups % mesh[copies] or groups % hosts(job.mesh) or c.data.batch % groups:
            continue
        adjusted = c.data.batch // groups
        also = "" if c.mesh[split] == -1 else f" with config.mesh.{split}=-1"
        also += f" with config.data.accumulate={adjusted}" if adjusted != c.data.accumulate else ""
        options.append(f"config.mesh.{stripes}={n}{also} (activations of a video over more devices)")
        break
    larger = topologies.larger(name)
    if not compiled:  # what is kept is split over all chips, at best
        room = (x for x in larger if done.memory["held"] * job.mesh.size <= done.hbm * topologies.chips(x))
        larger = list(room)
    slice_ = f"a larger slice, such as {larger[0]}" if larger else "chips with more memory"
    options.append(f"{slice_} (missing per device: {done.shortfall / GIB:.2f} GiB)")
    return options


def report(
    settings: Settings, name: str, size: str, only: str, say: Callable[[str], None], search: bool = False
) -> dict[str, Any]:
    """Compiles a job for a slice, line by line; returns the same as a record for a file.

    Args:
      settings, size, only: as for ``pods.build_job``.
      name: of the slice, such as "v5p:4x4x4".
      say: takes one line.
      search: with one video at a time per group of devices, and no more steps after one that does not fit.
    """
    generation, _ = topologies.check(name)
    chip, steps = topologies.CHIPS[generation], []
    job = build_job(settings, topologies.devices(name), size, only, one_video=search)
    facts = job.facts()
    for line in _header(job, facts, name):
        say(line)
    for step in job.steps:
        done = compile_step(job, step, chip.hbm)
        steps.append(_record(job, done, chip))
        for line in _lines(job, name, done, chip):
            say(line)
        if search and not done.fits:
            break
    fits = all(step["fits"] for step in steps)
    say(f"  host memory {host_memory() / GIB:.1f} GiB; {'fits' if fits else 'DOES NOT FIT'}")
    return {
        "topology": name, "size": size, "only": only, "compiled_not_run": True, "fits": fits, "facts": facts,
        "steps": steps, "host_bytes": host_memory(),
        "device_bytes": {tree: device_bytes(*pair) for tree, pair in job.trees.items()},
    }  # fmt: skip


def _header(job: Job, facts: dict[str, Any], name: str) -> Iterator[str]:
    yield f"{name}: {facts['devices']} chips, mesh {facts['mesh']}, compiled, not run"
    yield (
        f"  {facts['frames']} latent frames of {facts['latents']}, {facts['tokens']:,} tokens; batch {facts['batch']} "
        f"= {facts['accumulate']} microbatches x {facts['microbatch_per_group']} videos x {batch_parts(job.mesh)} "
        f"groups of chips; CFG branches: {facts['cfg_branches']}"
    )
    if any(step.name == STREAM for step in job.steps):
        streams = facts["streams"]
        yield (
            f"  {streams['streams']} streams of {streams['latents']}, {streams['frames_per_step']} latent frames and "
            f"{streams['denoising_calls']} denoising calls per step"
        )
    yield (
        f"  parameters: {facts['parameters']:,} trained and as many averaged, teacher "
        f"{facts['teacher_parameters']:,}, critic {facts['critic_parameters']:,}"
    )
    stacks = [
        f"{'/'.join(filter(None, (role, stack)))} {layers} x {width}"
        for role, found in facts["networks"].items()
        for stack, (layers, width) in found.items()
    ]
    yield f"  blocks x width: {', '.join(stacks)}"
    assumed = costs.assumed(job.settings)
    if assumed:
        yield f"  FLOPs: {', '.join(assumed)}: not losses of the library, taken to call every network they ask for once"
    for tree in dict.fromkeys(tree for step in job.steps for tree in step.holds):
        yield f"  {tree}: {device_bytes(*job.trees[tree]) / GIB:.2f} GiB per device"


def _record(job: Job, done: Compiled, chip: topologies.Chip) -> dict[str, Any]:
    sent = sum(c.bytes for c in done.collectives.values())
    per_device = done.flops_per_device(job.mesh.size)
    return {
        "step": done.name, "fits": done.fits,
        **{k: None if (x := getattr(done, k)) is None else round(x, 1) for k in ("seconds", "cpu_seconds")},
        "memory": done.memory, "hbm": done.hbm, "attention": done.attention, "message": done.message,
        "model_flops": done.model_flops.total, "executed_flops": done.executed_flops.total,
        "model_flops_per_device": per_device,
        "collectives": {
            kind: dataclasses.asdict(count) | {"sources": dict(_largest(count, 5))}
            for kind, count in done.collectives.items()
        },
        "sent_bytes_per_device": sent if done.collectives else None,
        "flops_per_sent_byte": per_device / sent if sent else None,
        "chip_flops_per_link_byte": chip.flops / chip.link_rate,
    }  # fmt: skip


def _largest(count: hlo.Count, number: int) -> list[tuple[str, float]]:
    return sorted(count.sources.items(), key=lambda source: -source[1])[:number]


def _lines(job: Job, name: str, done: Compiled, chip: topologies.Chip) -> Iterator[str]:
    gib = ", ".join(f"{part} {size / GIB:.2f}" for part, size in done.memory.items())
    took = "not compiled"
    if done.seconds is not None:
        took = f"compiled in {done.seconds:.0f} s (CPU {done.cpu_seconds:.0f} s)"
    yield f"  {done.name}: {gib} of {done.hbm / GIB:.2f} GiB, {took}"
    calls = f", {done.collectives['kernels'].runs:,.0f} kernel calls" if done.collectives else ""
    yield (
        f"    model FLOPs {done.model_flops.total:.3e} ({done.executed_flops.total:.3e} executed), attention "
        f"{done.attention}{calls}"
    )
    sent = 0.0
    for kind in hlo.KINDS:
        count = done.collectives.get(kind, hlo.Count())
        sent += count.bytes
        if count.instructions:
            yield (
                f"    {kind}: {count.instructions} in the program, {count.runs:,.0f} runs, "
                f"{count.bytes / GIB:.2f} GiB sent per device"
            )
            yield from (f"      {size / GIB:.2f} GiB: {source}" for source, size in _largest(count, 2) if size)
    if sent:
        intensity = done.flops_per_device(job.mesh.size) / sent
        published = chip.flops / chip.link_rate
        yield f"    {intensity:,.0f} FLOPs per byte sent; the chip's published ratio is {published:,.0f}"
    if not done.fits:
        if done.message:
            yield f"    {done.message}"
        yield f"    DOES NOT FIT: at least {done.shortfall / GIB:.2f} GiB too much per device. Change one of:"
        yield from (f"      {option}" for option in remedies(job, name, done))
