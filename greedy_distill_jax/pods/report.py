"""A job compiled for a slice that is not there, as lines to read and as a record for a file."""

import dataclasses
import resource
from collections.abc import Callable, Iterator
from typing import Any

from greedy_distill_jax.config import Settings
from greedy_distill_jax.distribution.mesh import batch_parts
from greedy_distill_jax.pods import costs, hlo, topologies
from greedy_distill_jax.pods.compile_step import Compiled, compile_step
from greedy_distill_jax.pods.facts import facts
from greedy_distill_jax.pods.goodput import Faults, saving
from greedy_distill_jax.pods.jobs import STREAM, Job, attention_of, build_job, device_bytes, not_taken
from greedy_distill_jax.pods.remedies import remedies
from greedy_distill_jax.pods.topologies import GIB


def report(
    settings: Settings,
    name: str,
    size: str,
    only: str,
    say: Callable[[str], None],
    faults: Faults | None = None,
    search: bool = False,
) -> dict[str, Any]:
    """Compiles a job for a slice and says so line by line; returns the same as a record for a file.

    Args:
      settings, size, only: as for ``pods.build_job``.
      name: of the slice, such as "v5p:4x4x4".
      say: takes one line.
      faults: of its hosts, for how often to save; None for the usual ones.
      search: with one video at a time per group of devices, and no more steps after one that does not fit.
    """
    generation, _ = topologies.check(name)
    chip, steps = topologies.CHIPS[generation], []
    job = build_job(settings, topologies.devices(name), size, only, one_video=search)
    known, saved = facts(job), saving(job, faults or Faults())
    for line in (*_header(job, known, name), _of_attention(job), _of_checkpoints(saved)):
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
        "topology": name,
        "size": size,
        "only": only,
        "compiled_not_run": True,
        "fits": fits,
        "facts": known,
        "checkpoint": saved,
        "steps": steps,
        "host_bytes": host_memory(),
        "device_bytes": {tree: device_bytes(*pair) for tree, pair in job.trees.items()},
    }


def _header(job: Job, known: dict[str, Any], name: str) -> Iterator[str]:
    yield f"{name}: {known['devices']} chips, mesh {known['mesh']}, compiled, not run"
    episode = known.get("episode")
    examples = f"{known['microbatch_per_group']} {'prompts' if episode else 'videos'}"
    yield (
        f"  {known['frames']} latent frames of {known['latents']}, {known['tokens']:,} tokens; batch {known['batch']} "
        f"= {known['accumulate']} microbatches x {examples} x {batch_parts(job.mesh)} groups of chips; CFG branches: "
        f"{known['cfg_branches']}"
    )
    if episode:
        yield (
            f"  {episode['group']} streams per prompt, of up to {episode['frames']} latent frames, the last "
            f"{episode['clip']} apart; without what rewards cost"
        )
    if any(step.name == STREAM for step in job.steps):
        streams = known["streams"]
        yield (
            f"  {streams['streams']} streams of {streams['latents']}, {streams['frames_per_step']} latent frames and "
            f"{streams['denoising_calls']} denoising calls per step"
        )
    yield (
        f"  parameters: {known['parameters']:,} trained and as many averaged, teacher "
        f"{known['teacher_parameters']:,}, critic {known['critic_parameters']:,}"
    )
    stacks = [
        f"{'/'.join(filter(None, (role, stack)))} {layers} x {width}"
        for role, found in known["networks"].items()
        for stack, (layers, width) in found.items()
    ]
    yield f"  blocks x width: {', '.join(stacks)}"
    assumed = costs.assumed(job.settings)
    if assumed:
        yield f"  FLOPs: {', '.join(assumed)}: not losses of the library, taken to call every network they ask for once"
    for tree in dict.fromkeys(tree for step in job.steps for tree in step.holds):
        yield f"  {tree}: {device_bytes(*job.trees[tree]) / GIB:.2f} GiB per device"


def _of_attention(job: Job) -> str:
    place = job.settings, job.mesh, job.latent_shape
    return f"  attention: {', '.join([attention_of(*place).name, *not_taken(*place)])}"


def _of_checkpoints(saved: dict[str, float | int]) -> str:
    return (
        f"  checkpoint: {saved['bytes'] / GIB:.2f} GiB, {saved['bytes_per_host'] / GIB:.2f} GiB by each of "
        f"{saved['hosts']} hosts; save every {saved['every'] / 60:.3g} minutes: goodput {saved['goodput']:.3f} "
        f"(a fault per host and {saved['host_days']:g} days, {saved['write_rate']:g} GB/s per host, "
        f"{saved['restart']:g} s to start again)"
    )


def _record(job: Job, done: Compiled, chip: topologies.Chip) -> dict[str, Any]:
    sent = sum(c.bytes for c in done.collectives.values())
    per_device = done.flops_per_device(job.mesh.size)
    return {
        "step": done.name,
        "fits": done.fits,
        **{k: None if (x := getattr(done, k)) is None else round(x, 1) for k in ("seconds", "cpu_seconds")},
        "memory": done.memory,
        "hbm": done.hbm,
        "attention": done.attention,
        "attention_calls": [call._asdict() | {"traced": count} for call, count in done.calls.items()],
        "message": done.message,
        "model_flops": done.model_flops.total,
        "executed_flops": done.executed_flops.total,
        "model_flops_per_device": per_device,
        "collectives": {
            kind: dataclasses.asdict(count) | {"sources": dict(_largest(count, 5))}
            for kind, count in done.collectives.items()
        },
        "sent_bytes_per_device": sent if done.collectives else None,
        "flops_per_sent_byte": per_device / sent if sent else None,
        "chip_flops_per_link_byte": chip.flops / chip.link_rate,
    }


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
    for call, count in done.calls.items():
        batch, length, heads, dim = call.queries
        yield (
            f"      {call.backend}: {batch} x {length:,} queries, {call.keys:,} keys{' at most' * call.lengths}, "
            f"{call.pairs:,} pairs, {heads} heads of {dim}, {call.dtype}, traced {count} times"
        )
    if stood_in := {call.backend for call in done.calls if call.stand_in}:
        yield (
            f"    {', '.join(sorted(stood_in))} compiles on a card only: its calls were compiled as calls that compute "
            f"nothing, with operands, results and workspace of the same shapes"
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


def host_memory() -> int:
    """Returns the peak of resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
