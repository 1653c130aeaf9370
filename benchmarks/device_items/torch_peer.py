"""The same causal stream in PyTorch with the same weights, eager and compiled (``benchmarks/stream_torch.py``)."""

import functools
import importlib.util
import statistics
import time

import jax
import numpy as np
import stream
import stream_torch
from sizes import SIZES

from device_items import prefix, streaming
from device_items.record import NotHere, Record
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.testing import tiny

STEPS, REPEATS = 4, 7


def run(record: Record) -> None:
    """Ours attends as the probe "prefix" does; the library as it is comes last, for it may be slow."""
    size = record.data["size"]
    record.row("float32, tiny", float32)
    record.row("eager", lambda: peer(size, stream_torch.EAGER), needs=40)
    record.row("ours, causal, as it is", functools.partial(as_it_is, record), needs=40)
    # 30 layers unrolled take Inductor over a minute: only where this item is run by itself.
    record.row("compiled", lambda: peer(size, stream_torch.COMPILED), needs=120)


def _device() -> str:
    if importlib.util.find_spec("torch") is None:
        raise NotHere("PyTorch is not installed")
    return stream_torch._torch_device()


def float32() -> dict:
    """Frames of the peer and of ours where they can be the same."""
    device = _device()
    with jax.default_matmul_precision("highest"):
        found = stream_torch.measure(SIZES["tiny"], STEPS, 1, (stream_torch.EAGER,), device)["largest_difference"]
    return {
        "figures": {"largest difference": found},
        "checks": {"largest difference": (found, stream_torch.TOLERANCE["float32"])},
    }


def peer(size: str, name: str) -> dict:
    """Times in turns; every chunk of the peer is compared with ours."""
    device = _device()
    if device == "cpu" and name == stream_torch.COMPILED:
        raise NotHere("torch.compile is measured on a GPU")
    with prefix.streams_by():
        found = stream_torch.measure(SIZES[size], STEPS, REPEATS if device != "cpu" else 1, (name,), device)
    ms = found["ms_per_latent_frame"]
    short = {name: "PyTorch", stream_torch.CAUSAL: "ours, causal", stream_torch.ETM_SDD: "ours, ETM + SDD"}
    figures = {f"{short[key]} ms/frame": value for key, value in ms.items()}
    figures |= {f"PyTorch / {short[ours]}": ms[name] / ms[ours] for ours in (stream_torch.CAUSAL, stream_torch.ETM_SDD)}
    dtype = found["config"]["dtype"]
    checks = {"largest difference of a chunk": (found["largest_difference"], stream_torch.TOLERANCE[dtype])}
    return {"figures": figures, "checks": checks, "config": found["config"], "steps": STEPS}


def as_it_is(record: Record) -> dict:
    """Our causal student by the library's own attention; the cost of a chunk is the same from the first on."""
    size = SIZES[record.data["size"]]
    run = size.run("causal", "float32" if size is SIZES["tiny"] else "bfloat16")
    text = tiny.text_rows(1, jax.random.key(1), run.model.cfg.base)
    plan, limit = StepPlan(stream.SCHEDULES[str(STEPS)], "renoise"), 0.5 * record.left()
    program = stream.Stream(run, "clean", plan, text)
    with prefix.streams_by():
        other = stream.Stream(run, "clean", plan, text).first()
    state, times, begin = program.open(), [], time.perf_counter()
    state, _, x = streaming.lap(program, state)
    worst = float(np.abs(np.asarray(x) - np.asarray(other)).max() / np.asarray(other).std())
    while len(times) < 2 or (len(times) < 5 and time.perf_counter() - begin < limit):
        state, ms, _ = streaming.lap(program, state)
        times.append(ms)
    checks = {"first chunk against the probe": (worst, stream_torch.TOLERANCE[run.model.cfg.base.dtype])}
    return {
        "figures": {"ms/frame": statistics.median(times)},
        "checks": checks,
        "times_ms": times,
        "compile_s": program.compile_s,
    }
