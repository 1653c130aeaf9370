"""Training steps with random weights (``benchmarks/train_step.py``): milliseconds, MFU by counted FLOPs, memory."""

import jax
import train_step
from sizes import SIZES

from device_items import ceilings, ways
from device_items.record import Record
from greedy_distill_jax.pods.jobs import STREAM, build_job


def run(record: Record) -> None:
    """Stage 1, the steps of stage 2, and the gradient of a self-made video."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    ceiling = ceilings.matmul_flops(record, dtype)
    for name, needs in (("stage 1", 50), ("generator", 55), ("critic", 55)):
        record.row(name, lambda n=name: step(record, n, ceiling), needs=needs)
        if name != "critic":
            record.row(f"{name}, Hopper kernels", lambda n=name: step_by_kernels(record, n, ceiling), needs=needs)
    record.row("rollout gradient", lambda: gradient(record), needs=60)


def step(record: Record, name: str, ceiling: float) -> dict:
    """One step of a job."""
    size = SIZES[record.data["size"]]
    source, part = train_step.STEPS[name]
    job = build_job(train_step.training_settings(size, source), jax.devices()[:1], size.latent_shape[:2], only=part)
    (part,) = [s for s in job.steps if s.name != STREAM]
    row = train_step.measure(job, part, 3 if record.left() > 30 else 1, ceiling)
    figures = {"ms": row["ms"], "MFU": row["mfu"], "HFU": row["hfu"]}
    figures |= {"program GiB": row["program_bytes"]["total"] / 2**30, "compile s": row["compile_s"]}
    # `train_step.measure` raises where a metric is not finite or an update changes nothing.
    return {"figures": figures, **row}


def step_by_kernels(record: Record, name: str, ceiling: float) -> dict:
    """The same by the Hopper kernels."""
    with ways.by_kernels():
        return step(record, name, ceiling)


def gradient(record: Record) -> dict:
    """The gradient of a self-made video, in one parallel pass and chunk by chunk."""
    found = train_step.measure_gradient(SIZES[record.data["size"]], 2)
    difference = found.pop("relative_difference")
    figures = {f"{form} ms": row["ms"] for form, row in found.items()}
    figures |= {f"{form} temporaries GiB": row["temporary_MiB"] / 1024 for form, row in found.items()}
    figures["sequential / parallel"] = found["sequential"]["ms"] / found["parallel"]["ms"]
    limit = max(train_step.TOLERANCE.values())
    return {"figures": figures, "checks": {"difference of the two": (difference, limit)}, "forms": found}
