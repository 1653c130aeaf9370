"""One step of a job, compiled for a slice that is not there: whether it fits, and what it sends.

Memory is the compiler's account of one device, plus what the job keeps there that the step does not use: the critic's
step has no use for the frozen teacher, but it is there. Any machine with libtpu, or jax's CUDA plugin, does it.

XLA asks cuDNN, and that its card, when it compiles a call of it. Such calls are compiled as their stand-ins, with
operands, results and workspace of the same shapes, and the result says so.
"""

import dataclasses
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from greedy_distill_jax.models.flops import Flops
from greedy_distill_jax.ops.attention import aot
from greedy_distill_jax.ops.attention.calls import Recorded, recorded_calls
from greedy_distill_jax.pods import hlo
from greedy_distill_jax.pods.jobs import STREAM, Job, Step, attention_of, device_bytes
from greedy_distill_jax.training.job import one_line


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said about one step.

    memory: bytes of one device. "held": all that the job keeps while the step runs, used by it or not; "arguments",
    "outputs", "aliased", "temporaries", "code": the program's; "peak": all of it together, as far as it is known.
    calls: every attention call that was traced, by what it is; those of a scanned stack of blocks once. Calls that were
    compiled as stand-ins say so.
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
    calls: dict[Recorded, int] = dataclasses.field(default_factory=dict)
    message: str = ""

    @property
    def shortfall(self) -> int:
        """Bytes that are missing on one device, at least: libtpu does not always say all that a step needs."""
        return max(0, self.memory["peak"] - self.hbm)

    def flops_per_device(self, devices: int) -> float:
        """Returns model FLOPs; where a stream runs whole on several devices, on each of them."""
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
    attention = attention_of(job.settings, job.mesh, job.latent_shape)
    common = dict(
        name=step.name,
        model_flops=step.cost.model,
        executed_flops=step.cost.executed,
        attention=attention.name,
        hbm=int(hbm),
    )
    if held > hbm:  # no compiler is needed to see that
        return Compiled(
            fits=False,
            seconds=None,
            cpu_seconds=None,
            memory={"held": held, "peak": held},
            collectives={},
            message="what the job keeps on a device does not fit, whatever the step needs beside it",
            **common,
        )
    with one_line(), recorded_calls(stand_ins=True) as calls:
        lowered = step.call.lower(*step.arguments)
    common["calls"] = dict(Counter(calls))
    stand_ins = any(call.stand_in for call in calls)
    with tempfile.TemporaryDirectory() as folder:
        try:
            options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            if _platform(job) == "gpu":
                # What would run in their place is not asked for: nothing is run.
                options = {"xla_gpu_mock_custom_calls": True} if stand_ins else {}
            compiled = aot.interruptible(lambda: lowered.compile(compiler_options=options))
        except jax.errors.JaxRuntimeError as error:
            return Compiled(
                fits=False,
                memory=_asked(error, held),
                collectives={},
                message=str(error).splitlines()[0][:200],
                **_since(start),
                **common,
            )
        memory, text = _memory(compiled.memory_analysis(), held), _text(compiled, Path(folder))
    found = hlo.counts(text, step.dynamic_trips)
    if (attention.kernels or stand_ins) and not found["kernels"].instructions:
        raise RuntimeError(f"{step.name}: attention is said to be {attention.name}, but no kernel is called.")
    return Compiled(fits=memory["peak"] <= hbm, memory=memory, collectives=found, **_since(start), **common)


def _platform(job: Job) -> str:
    return job.mesh.devices.flat[0].platform


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
