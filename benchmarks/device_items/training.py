"""Training steps with random weights (``benchmarks/train_step.py``): milliseconds, MFU by counted FLOPs, memory.

The self-made videos of stage 2 are streams: "prefix" makes them as that probe does, "as it is" as the library does.
"""

import contextlib
import json

import jax
import train_step
from sizes import SIZES

from device_items import ceilings, prefix
from device_items.record import OK, Record
from greedy_distill_jax.pods.jobs import STREAM, build_job


def run(record: Record) -> None:
    """Stage 1 has no stream in it; the rest as the probe first, and as it is where time remains."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    ceiling = ceilings.matmul_flops(record, dtype)
    record.row("stage 1", lambda: step(record, "stage 1", ceiling, contextlib.nullcontext()), needs=50)
    for name in ("critic", "generator"):
        record.row(f"{name}, prefix", lambda n=name: step(record, n, ceiling, prefix.streams_by()), needs=55)
    record.row("rollout gradient, prefix", lambda: gradient(record, prefix.streams_by()), needs=60)
    slow = 45 + 2 * rollout_seconds(record)
    for name in ("critic", "generator"):
        if record.data["size"] == "tiny":  # as tests/test_benchmarks.py runs them
            record.leave_out(f"{name}, as it is", "the tiny size is a test of this command, where one form is enough")
            continue
        record.row(f"{name}, as it is", lambda n=name: step(record, n, ceiling, contextlib.nullcontext()), needs=slow)


def rollout_seconds(record: Record) -> float:
    """What the streaming item says that a self-made video takes; 0 where it says nothing."""
    for path in record.path.parent.glob("*-streaming.json"):
        row = json.loads(path.read_text())["rows"].get("as it is, 4 steps", {})
        if row.get("status") == OK:
            return 1e-3 * row["figures"]["ms/frame"] * SIZES[record.data["size"]].frames
    return 0.0


def step(record: Record, name: str, ceiling: float, way) -> dict:
    """One step of a job."""
    size = SIZES[record.data["size"]]
    source, part = train_step.STEPS[name]
    job = build_job(train_step.training_settings(size, source), jax.devices()[:1], size.latent_shape[:2], only=part)
    (part,) = [s for s in job.steps if s.name != STREAM]
    with way:
        row = train_step.measure(job, part, 3 if record.left() > 30 else 1, ceiling)
    figures = {"ms": row["ms"], "MFU": row["mfu"], "HFU": row["hfu"]}
    figures |= {"program GiB": row["program_bytes"]["total"] / 2**30, "compile s": row["compile_s"]}
    # `train_step.measure` raises where a metric is not finite or an update changes nothing.
    return {"figures": figures, **row}


def gradient(record: Record, way) -> dict:
    """The gradient of a self-made video, in one parallel pass and chunk by chunk."""
    size = SIZES[record.data["size"]]
    with way:
        found = train_step.measure_gradient(size, 2)
    difference = found.pop("relative_difference")
    figures = {f"{form} ms": row["ms"] for form, row in found.items()}
    figures |= {f"{form} temporaries GiB": row["temporary_MiB"] / 1024 for form, row in found.items()}
    figures["sequential / parallel"] = found["sequential"]["ms"] / found["parallel"]["ms"]
    limit = max(train_step.TOLERANCE.values())
    return {"figures": figures, "checks": {"difference of the two": (difference, limit)}, "forms": found}
