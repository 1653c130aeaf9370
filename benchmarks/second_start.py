"""Seconds to the first frame of a stream in a first start, and in second ones by what they find of the first.

    python benchmarks/second_start.py --size wan1_3b --output benchmarks/results/second_start.json
    JAX_PLATFORMS=cpu python benchmarks/second_start.py --size small

Every start is a process of its own: it draws random weights, and the clock runs from there until all programs of the
stream are ready (`Programs.prepare`) and its first latents are there. Ways to start:

  first       nothing is found: every program is traced, lowered and compiled
  cache       programs are traced and lowered, and found in jax's compilation cache, as `sample` does
  serialised  executables of `jax.experimental.serialize_executable` are loaded: nothing is traced. Here alone, to know
              what that would save: whoever does not look at the lowered text cannot know that the code is the same

The frames of all three have to be the same. Columns: seconds in all, and of these tracing and lowering, compiling or
reading, and running; then the seconds of the whole process, imports and the drawing of weights included. Times are CPU
time of one pinned thread on a CPU, else wall time; those of whole processes are wall time everywhere.
"""

import argparse
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import stream
from jax.experimental import serialize_executable
from sizes import SIZES

from greedy_distill_jax import cli
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.distribution.compile_cache import compiled_ahead, use_compile_cache
from greedy_distill_jax.measure import clock, environment, record
from greedy_distill_jax.streaming.loop import noise_keys
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.streaming.session import Programs, Step, programs
from greedy_distill_jax.testing import tiny

WAYS = ("first", "cache", "serialised")
STEPS = "4"  # of ``stream.SCHEDULES``
PARTS = ("trace_and_lower_s", "compile_or_read_s", "run_s")
TOLERANCE = 1e-6  # of frames against those of the first start, relative norm: nothing but the order of sums may differ
EXECUTABLES, FRAMES = "executables.pickle", "frames.npy"


def start(size_name: str, student: str, way: str, folder: Path) -> dict[str, Any]:
    """What one process measures; the first one leaves what the others find in ``folder``."""
    size = SIZES[size_name]
    run = size.run(student, "float32" if size_name == "tiny" else "bfloat16").computing()
    text, plan = tiny.text_rows(1, jax.random.key(1), run.model.cfg.base), StepPlan(stream.SCHEDULES[STEPS], "renoise")
    arguments = (run.params, text, noise_keys(0, 1), run.latent_shape[1:])
    jax.block_until_ready(arguments[:3])
    use_compile_cache(str(folder / "cache"))  # from here on; weights are drawn with the cache that the process has
    read = _timed_compiler()
    begin = clock.now()
    own = programs(make_streamer(run.model, plan))
    if way == "serialised":
        own = _loaded(own, folder / EXECUTABLES)
        read.append(clock.now() - begin)
        state = own.init(*arguments)
    else:
        compiled_ahead(own.init, *arguments)
        state = own.init(*arguments)
        own.prepare(run.params, state, text, 0, None, True)
    ready = clock.now()
    made = jax.block_until_ready(own.filling.make(run.params, state))
    end, at = clock.now(), time.time()
    parts = ready - begin - sum(read), sum(read), end - ready
    out = {"seconds": end - begin, **dict(zip(PARTS, parts)), "at": at}
    x, frames = made[1].x0, []
    state = own.filling.finish(run.params, *made)
    for number in range(1, own.warm_up + 3):
        frames.append(np.asarray(x))
        state, x = own.step(number)(run.params, state)
    frames = np.concatenate(frames, axis=1)
    if way == "first":
        np.save(folder / FRAMES, frames)
        out["bytes"] = {"cache": sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file())}
        try:
            out["bytes"]["serialised"] = _save(own, arguments, folder / EXECUTABLES)
        except Exception as error:  # the other ways do not need it
            out["not serialised"] = f"{type(error).__name__}: {error}"
        return out
    expected = np.load(folder / FRAMES)
    out["difference"] = float(np.linalg.norm(frames - expected) / np.linalg.norm(expected))
    return out


def _timed_compiler() -> list[float]:
    """Seconds of every compilation from here on, or of reading what an earlier one left."""
    compile_, seconds = jax.stages.Lowered.compile, []

    def timed(lowered, *args, **options):
        begin = clock.now()
        try:
            return compile_(lowered, *args, **options)
        finally:
            seconds.append(clock.now() - begin)

    jax.stages.Lowered.compile = timed
    return seconds


def _save(own: Programs, arguments: tuple, path: Path) -> int:
    """Serialises all programs; bytes."""
    params, text, *_ = arguments
    state, calls = compiled_ahead(own.init, *arguments), {"init": (own.init, arguments)}
    for name in ("filling", "steady"):
        step = getattr(own, name)
        calls[f"{name} make"] = step.make, (params, state)
        calls[f"{name} finish"] = step.finish, (params, *compiled_ahead(step.make, params, state))
    calls["switch_prompt"] = own.switch_prompt, (params, state, text)
    compiled = {name: call.trace(*given).lower().compile() for name, (call, given) in calls.items()}
    path.write_bytes(pickle.dumps({name: serialize_executable.serialize(one) for name, one in compiled.items()}))
    return path.stat().st_size


def _loaded(own: Programs, path: Path) -> Programs:
    """The programs that ``_save`` has written, a moment ago and into a folder of its own."""
    saved = pickle.loads(path.read_bytes())
    found = {name: serialize_executable.deserialize_and_load(*one) for name, one in saved.items()}
    steps = {name: Step(found[f"{name} make"], found[f"{name} finish"]) for name in ("filling", "steady")}
    return own._replace(
        init=lambda params, text, keys, shape: found["init"](params, text, keys),
        switch_prompt=found["switch_prompt"],
        **steps,
    )


def measure(size: str, student: str, way: str, folder: Path, seconds: float | None = None) -> dict[str, Any]:
    """What one start takes, in a process of its own.

    Raises:
      RuntimeError: it fails; the message is the last line that it wrote.
      subprocess.TimeoutExpired: it takes longer than ``seconds``.
    """
    command = [sys.executable, __file__, "--size", size, "--student", student, "--way", way, "--folder", str(folder)]
    begin = time.time()
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise RuntimeError(f"start {way!r} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    found["process_s"] = found.pop("at") - begin
    return found


def show(result: dict[str, Any]) -> str:
    """The table."""
    rows = [
        [way, *(result["starts"][way][name] for name in ("seconds", *PARTS, "process_s"))]
        for way in WAYS
        if way in result["starts"]
    ]
    header = ["start", "s to the first frame", "tracing, lowering", "compiling or reading", "running", "whole process"]
    return record.table(header, rows)


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python benchmarks/second_start.py", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--student", choices=stream.STUDENTS, default=stream.STUDENTS[0])
    parser.add_argument("--repeats", type=int, default=3, help="starts of each way, of which the median counts (3)")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str]) -> None:
    """Command line."""
    args = _parser().parse_args(argv)
    clock.one_thread()
    if args.way:
        print(json.dumps(start(args.size, args.student, args.way, args.folder)))
        return
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for way in WAYS:
                found.setdefault(way, []).append(measure(args.size, args.student, way, Path(folder)))
                print(f"{way}: {found[way][-1]['seconds']:.3g} s", flush=True)
    starts = {}
    for way, times in found.items():
        names = ("seconds", *PARTS, "process_s")
        starts[way] = {**times[0], **{name: statistics.median(one[name] for one in times) for name in names}}
    differences = {way: max(one["difference"] for one in found[way]) for way in WAYS[1:]}
    result = {"size": args.size, "student": args.student, "steps": STEPS, **environment.environment()}
    result |= {"starts": starts, "differences": differences, "repeats": found}
    record.write_json(args.output, result)
    print(f"{result['device']} ({result['cpu']}), {result['clock']}")
    for way, difference in differences.items():
        if not difference < TOLERANCE:
            raise RuntimeError(f"frames of the start {way!r} differ by {difference:.1e} from the first one's")
        print(f"frames of the start {way!r}: they differ by {difference:.1e} from the first one's")
    print(show(result))


if __name__ == "__main__":
    cli.run(main)
