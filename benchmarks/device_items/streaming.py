"""ETM + SDD as a stream with random weights: ms per latent frame by steps, context and decoder.

Frames are checked against those that XLA's scan makes (``ways.py``). Every stream does the same work at every frame, so
that the cost does not depend on which are timed.
"""

import functools
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import second_start
import stream
from sizes import SIZES

from device_items import ceilings, ways
from device_items.record import Record
from device_items.timing import error
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.measure import clock, memory
from greedy_distill_jax.models import flops
from greedy_distill_jax.testing import tiny

EARLY, LATE, SPAN = 20, 100, 16
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # of a frame against one by the scan, relative norm
VIDEO = 4  # frames of video per latent frame
OURS, SCAN, KERNELS = "ours", "XLA scan", "Hopper kernels"


class Streams:
    """Compiled streams of one size, made when they are needed."""

    def __init__(self, size: str):
        self.size = SIZES[size]

    @functools.cached_property
    def run(self):
        """The student; kernels are stored in the dtype that they are used in."""
        return self.size.run("etm_sdd", "float32" if self.size is SIZES["tiny"] else "bfloat16")

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return self.run.model.cfg.base.dtype

    @functools.cache  # noqa: B019 (one object per process)
    def get(self, way: str, steps: int | str, context: str = "clean") -> stream.Stream:
        """A stream by one way to attend."""
        text = tiny.text_rows(1, jax.random.key(1), self.run.model.cfg.base)
        make = functools.partial(stream.Stream, self.run, context, StepPlan(stream.SCHEDULES[str(steps)], "renoise"))
        if way == OURS:
            return make(text)
        with ways.by_scan() if way == SCAN else ways.by_kernels():
            return make(text)

    @functools.cached_property
    def codecs(self):
        """The decoders' codecs by name."""
        return self.size.codecs()


def run(record: Record) -> None:
    """The most telling rows first."""
    streams = Streams(record.data["size"])
    ceiling = ceilings.matmul_flops(record, "float32" if jax.default_backend() == "cpu" else "bfloat16")
    left = record.left

    def row(name, work, needs=20.0, **options):
        record.row(name, functools.partial(work, streams, ceiling=ceiling, left=left, **options), needs)

    row("4 steps", steady, steps=4, share=0.5, late=True)
    row("4 steps + tiny VAE", decoded, codec="tiny VAE")
    row("4 steps, no context pass", steady, steps=4, context="last_step_kv")
    row("diagonal, no context pass", steady, steps="diagonal", context="last_step_kv", opening=True)
    row("4 steps, Hopper kernels", steady, way=KERNELS, steps=4)
    row("2 steps", steady, steps=2)
    row("2 steps, Hopper kernels", steady, way=KERNELS, steps=2)
    row("1 step", steady, steps=1)
    row("4 steps + Wan VAE", decoded, needs=40.0, codec="Wan VAE")
    row("4 steps, XLA scan", steady, needs=10.0, way=SCAN, steps=4, share=0.1)
    record.row("saved executable", lambda: started_again(record.data["size"], left), needs=45.0)


def lap(program: stream.Stream, state, decode=None):
    """(state after one chunk, milliseconds per frame, latents or what ``decode`` makes of them)."""
    start = clock.now()
    state, out = jax.block_until_ready(program.chunk_of(state, decode))
    return state, 1e3 * (clock.now() - start) / program.chunk, out


def timed(program: stream.Stream, state, seconds: float, most: int = SPAN, decode=None):
    """(state, milliseconds per frame, last output): at least three chunks, more while ``seconds`` last."""
    times, out = [], None
    while len(times) < 3 or (len(times) < most and sum(times) < 1e3 * seconds):
        state, ms, out = lap(program, state, decode)
        times.append(ms)
    return state, times, out


def after(program: stream.Stream, frames: int, seconds: float):
    """The state after so many frames; None if that would take longer than ``seconds``."""
    state, ms, _ = lap(program, program.open())
    state, ms, _ = lap(program, state)  # the first one may have met work that was still going on
    if 1e-3 * ms * frames > seconds:
        return None
    for _ in range(frames - 2):
        state, _ = program.chunk_of(state)
    return jax.block_until_ready(state)


def steady(
    streams: Streams,
    *,
    steps: int | str,
    ceiling: float,
    left,
    way: str = OURS,
    context: str = "clean",
    share: float = 0.3,
    late: bool = False,
    opening: bool = False,
) -> dict:
    """Figures of one program; see the head of this file. ``opening``: also of its first frames, which take longer."""
    program = streams.get(way, steps, context)
    budget, checks = share * left(), {}
    if way != SCAN:
        checks |= against(streams, program, steps, context, 0.25 * left())
    state = after(program, EARLY, budget)
    where = EARLY if state is not None else 1
    if state is None:  # too slow to get there; the cost of a frame is the same anywhere
        state, _, _ = lap(program, program.open())
    state, times, x = timed(program, state, budget / 3)
    ms = statistics.median(times)
    checks["values that are not finite"] = (float(jnp.sum(~jnp.isfinite(x))), 1)
    cfg, patch = program.streamer.cfg, streams.run.model.cfg.base.patch
    tokens = program.shape[0] * program.shape[1] // patch**2
    work = flops.stream_step(cfg, tokens, int(program.streamer.plan.lengths[-1])).total / program.chunk
    figures = {"ms/frame": ms, "FPS": VIDEO * 1e3 / ms, "MFU": 1e3 * work / ms / ceiling}
    if ms < 200 * budget:  # else it is as long as any other frame
        figures["first ms"] = _median(program.first, budget / 6)
    out = {
        "frame": where,
        "times_ms": times,
        "model_flops_per_frame": work,
        "context": context,
        "batch": 1,
        "latents": list(program.shape),
        "dtype": streams.dtype,
        "compile_s": program.compile_s,
        "program_bytes": memory.program_bytes(program.programs.steady.make),
        "cache_bytes": program.cache_bytes,
        "peak": memory.peak_bytes(),
    }
    figures["compile s"] = program.compile_s
    if opening:
        _, out["opening_times_ms"], _ = timed(program, program.open(), budget, most=EARLY + 1)
        figures[f"ms/frame, first {len(out['opening_times_ms'])}"] = statistics.mean(out["opening_times_ms"])
    if late:
        there = after(program, LATE, budget)
        if there is not None:
            _, later, x = timed(program, there, budget / 3)
            figures[f"frame {LATE} / {EARLY}"] = statistics.median(later) / ms
            checks[f"values that are not finite, frame {LATE}"] = (float(jnp.sum(~jnp.isfinite(x))), 1)
            out["late_times_ms"] = later
        else:
            out["late"] = f"frame {LATE} was out of reach in {budget:.0f} s"
    return {"figures": figures, "checks": checks, **out}


def _median(work, seconds: float) -> float:
    times = []
    work()
    while len(times) < 2 or (len(times) < 5 and sum(times) < seconds):
        times.append(clock.seconds(work))
    return 1e3 * statistics.median(times)


def against(
    streams: Streams, program: stream.Stream, steps: int | str, context: str, seconds: float
) -> dict[str, tuple[float, float]]:
    """{which frame: (its relative difference from a trusted program's, the limit)}, from the same states.

    A stream is compared with the scan's at frame 0, where slots are empty, at frame 2, and, if ``seconds`` allow, at
    the first frame that sees every slot; a stream without its context pass with the one that has it at frame 0, where
    both are the same.
    """
    trusted = SCAN if context == "clean" else OURS
    known = streams.get(trusted, steps)
    full = known.programs.warm_up
    compared = (0, 2, full) if context == "clean" else (0,)
    checks, state, begin = {}, known.open(), time.perf_counter()
    for index in range(compared[-1] + 1):
        mine = None
        if context != "clean":
            mine = program.open()
        elif index in compared:
            mine = state._replace(state=jax.tree.map(jnp.copy, state.state))
        state, expected = known.chunk_of(state)
        if mine is not None:
            _, found = program.chunk_of(mine)
            checks[f"frame {index} against {trusted}"] = (error(found, expected), TOLERANCE[streams.dtype])
        if checks and time.perf_counter() - begin > seconds:
            break
    return checks


def decoded(streams: Streams, *, codec: str, ceiling: float, left, steps: int = 4) -> dict:
    """A stream with its pixels on the host."""
    del ceiling
    program, start = streams.get(OURS, steps), clock.now()
    decoder = stream.Decoder(streams.codecs[codec], streams.size)
    compile_s, decode, budget = clock.now() - start, decoder.open(), 0.3 * left()
    state, _, video = lap(program, program.open(), decode)
    state, _, video = lap(program, state, decode)
    state, times, video = timed(program, state, budget, decode=decode)
    first = _median(lambda: decoder.open()(program.first()), budget / 3)
    ms = statistics.median(times)
    spread = float(np.std(np.asarray(video, np.float32)))
    return {
        "figures": {"ms/frame": ms, "FPS": VIDEO * 1e3 / ms, "first ms": first, "compile s": compile_s},
        "checks": {"pixels that are all the same": (float(spread == 0), 1)},
        "times_ms": times,
        "video": list(np.shape(video)),
        "dtype": decoder.codec.vae.cfg.dtype,
        "decoder_program_bytes": memory.program_bytes(decoder.programs[1]),
        "peak": memory.peak_bytes(),
    }


def started_again(size: str, left) -> dict:
    """Seconds to the first frame in a first start, and in second ones; see ``second_start.py``."""
    starts, without = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for way in second_start.WAYS:
            try:
                starts[way] = second_start.measure(size, "etm_sdd", way, Path(folder), max(left(), 1.0))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                if way == second_start.WAYS[0]:
                    raise
                without[way] = str(error)
    told = {"first": "first start s", "cache": "second start s", "serialised": "with serialised executables s"}
    parts = {"first": "of it compiling s", "cache": "of it reading s", "serialised": "reading these s"}
    figures, checks = {}, {}
    for way, found in starts.items():
        figures |= {told[way]: found["seconds"], parts[way]: found["compile_or_read_s"]}
        if "difference" in found:
            checks[f"frames, {way}"] = (found["difference"], second_start.TOLERANCE)
    return {"figures": figures, "checks": checks, "starts": starts, "not measured": without}
