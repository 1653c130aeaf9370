"""Where the time goes: traces of a streamed frame and of a training step, reduced to their costliest operations."""

import contextlib
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import train_step
from sizes import SIZES

from device_items import streaming
from device_items.record import Record
from greedy_distill_jax.pods.jobs import STREAM, build_job

COSTLIEST = 10
REPEATS = 3
BUFFER = "command_buffer"  # XLA's name for whatever it recorded as one graph: the kernels in it have names of their own
# Lines of a trace that repeat what the kernels' lines have: XLA's own view of the same time.
VIEWS = (
    "XLA Modules",
    "XLA Ops",
    "Steps",
    "XLA TraceMe",
    "Framework Ops",
    "Framework Name Scope",
    "Source code",
    "Launch Stats",
)


def run(record: Record) -> None:
    """A streamed frame and stage 1."""
    streams = streaming.Streams(record.data["size"])
    record.row("frame, 4 steps", lambda: frame(streams), needs=20)
    record.row("stage 1", lambda: stage1(record.data["size"]), needs=20)


def frame(streams: streaming.Streams) -> dict:
    """Frames of a stream."""
    program = streams.get(streaming.OURS, 4)
    state = program.open()
    for _ in range(program.programs.warm_up):
        state, _ = program.chunk_of(state)
    kept = [jax.block_until_ready(state)]

    def work():
        kept[0], x = program.chunk_of(kept[0])
        return kept[0], x

    return costliest(work, REPEATS)


def stage1(name: str) -> dict:
    """Updates of stage 1."""
    size = SIZES[name]
    job = build_job(
        train_step.training_settings(size, "etm_sdd"), jax.devices()[:1], size.latent_shape[:2], only="teacher_forcing"
    )
    (step,) = [s for s in job.steps if s.name != STREAM]
    state, frozen, batch = train_step.arrays(job)
    compiled = step.call.lower(state, frozen, batch, {}).compile()
    kept = [jax.block_until_ready(compiled(state, frozen, batch, {}))[0]]
    del state

    def work():
        kept[0], metrics, _ = compiled(kept[0], frozen, batch, {})
        return metrics, kept[0]

    return costliest(work, REPEATS)


def costliest(work: Callable, repeats: int) -> dict:
    """Milliseconds per run of the costliest operations, and the share of the wall time in which none runs."""
    jax.block_until_ready(work())
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with jax.profiler.trace(folder):
            begin = time.perf_counter()
            for _ in range(repeats):
                jax.block_until_ready(work())
            wall = 1e3 * (time.perf_counter() - begin) / repeats
        traced = time.perf_counter() - start
        (path,) = Path(folder).rglob("*.xplane.pb")
        start = time.perf_counter()
        operations, kernels, busy = reduce(path)
        read = time.perf_counter() - start
    if not kernels:
        raise RuntimeError("the trace holds no operation of the device")
    count = sum(n for _, n in kernels.values())
    figures = {"ms, traced": wall, "busy": 1e-6 * busy / repeats / wall, "operations": count / repeats}

    def table(found):
        top = sorted(found.items(), key=lambda item: -item[1][0])[:COSTLIEST]
        return [
            {"name": name[:120], "ms": 1e-6 * ns / repeats, "calls": n / repeats, "share": ns / busy}
            for name, (ns, n) in top
        ]

    rows = table(kernels) if not operations or BUFFER in operations else table(operations)
    figures |= {f"{row['name'][:40]} (ms)": row["ms"] for row in rows[:3]}
    return {
        "figures": figures,
        "checks": {"operations without a time": (float(busy <= 0), 1)},
        "costliest": table(operations),
        "costliest kernels": table(kernels),
        "seconds_traced": traced,
        "seconds_read": read,
    }


def reduce(path: Path) -> tuple[dict, dict, float]:
    """({HLO operation: (ns, calls)}, {kernel: (ns, calls)}, ns in which some operation runs) of a trace."""
    sums = {"operation": (Counter(), Counter()), "kernel": (Counter(), Counter())}
    spans = []
    for start, duration, name, operation in _events(path):
        spans.append((start, start + duration))
        for kind, key in (("operation", operation), ("kernel", name)):
            if key:
                times, calls = sums[kind]
                times[key] += duration
                calls[key] += 1
    busy, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    both = ({key: (times[key], calls[key]) for key in times} for times, calls in sums.values())
    return *both, busy


def _events(path: Path) -> Iterator[tuple[float, float, str, str]]:
    """(start, duration, kernel, HLO operation without its number) of everything that ran on the device."""
    data = jax.profiler.ProfileData.from_file(str(path))
    planes = list(data.planes)
    devices = [p for p in planes if p.name.startswith("/device:") and "CUSTOM" not in p.name]
    for plane in devices or [p for p in planes if p.name.startswith("/host:CPU")]:
        for line in plane.lines:
            if line.name in VIEWS:
                continue
            for event in line.events:
                operation, whole = "", ("while", "conditional", "call")  # these contain others
                with contextlib.suppress(Exception):  # a statistic that this version cannot read
                    operation = str(dict(event.stats).get("hlo_op", ""))
                operation = re.sub(r"[._]\d+$", "", operation)
                if (devices or operation) and operation not in whole:  # on the host the rest is bookkeeping
                    yield event.start_ns, event.duration_ns, event.name, operation
