"""Streaming at a named size with random weights: time to the first frame, time per frame, memory.

    python benchmarks/stream.py --size wan1_3b --output benchmarks/results/stream.json
    JAX_PLATFORMS=cpu python benchmarks/stream.py --size small

Runs the programs that `sample` runs (`session.programs`, `VideoCodec.decode_next`), one video at a time, for two
students, ETM + SDD and the causal one (LongLive's setting), and four schedules of denoising steps. Speed does not
depend on the weights. Columns of the table, from the text's rows on the device to what is named:

  text      a new stream: the students' own projection of the text rows, and empty caches. The text encoder (UMT5) runs
            before, in PyTorch (`prepare text`), and is not in any figure here
  first     the first chunk of a new stream, text included: latents, pixels by the tiny VAE, pixels by Wan's
  handed    ms per latent frame until a chunk's latents are handed out, its clean pass not yet made
  model     ms per latent frame of the denoising calls alone: keys for later frames come from the last of them (context
            "last_step_kv")
  + clean   with the pass that writes clean keys (context "clean", the default); "fused" is the same numbers by one
            call less (ETM + SDD only). First-frame times are of "clean", too
  + VAE     with the pixels decoded as a stream and copied to the host
  MFU       counted FLOPs (`flops.py`) of "+ clean" over its time, as a share of a large matmul's rate in the same run
  late      milliseconds at the last frames over those at frame 20, two streams in turns: 1 is constant cost

Frames are frames of latents; four frames of video each, after the first. Times are synchronised medians; on a CPU they
are CPU time of one pinned thread. Before anything is timed, at a small size: streamed frames are those of the parallel,
masked form. The file is rewritten after every row.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sizes import SIZES, Size

from greedy_distill_jax import cli
from greedy_distill_jax.codecs.vae_codec import VAECodec
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.diffusion import noise_levels
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.measure import clock, environment, memory, record
from greedy_distill_jax.models import flops
from greedy_distill_jax.models.students.base import ContextGrad
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.streaming.loop import cache_bytes
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.streaming.session import WEIGHTS, Step, programs
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.training.rollout import recompute, roll_out

STUDENTS = ("etm_sdd", "causal")
SCHEDULES = {
    **{str(n): (noise_levels.uniform_steps(n, 5.0),) for n in (4, 2, 1)},
    "diagonal": StepPlan.parse("diagonal-4322222", shift=5.0).sigmas,
}
CONTEXTS = {"model": "last_step_kv", "clean": "clean", "fused": "fused"}
EARLY = 20  # frame from which the steady state is timed
SPAN = 16  # chunks timed there, and at the end
LATE, HANDED = "late", "handed"  # names of the laps at the end, and of those without the pass for later chunks
TOLERANCE = 1e-4  # of streamed against parallel frames in float32, relative to their standard deviation


class At(NamedTuple):
    """Where a stream is."""

    made: int  # chunks
    state: Any


class Stream:
    """One student, context mode and schedule, compiled: for the first chunks, and for those after them."""

    def __init__(self, run: Run, context: str, plan: StepPlan, text):
        cfg = dataclasses.replace(run.model.cfg, context=context)
        self.params, self.text, self.shape = run.params, text, run.latent_shape[1:]
        self.streamer, self.chunk = make_streamer(make_student(cfg), plan), cfg.chunk
        self.programs = programs(self.streamer)
        state, start = self.open().state, clock.now()
        filling, steady = (
            Step(
                step.make.lower(self.params, state).compile(),
                step.finish.lower(self.params, *jax.eval_shape(step.make, self.params, state)).compile(),
            )
            for step in (self.programs.filling, self.programs.steady)
        )
        self.compile_s, self.cache_bytes = clock.now() - start, cache_bytes(state)
        self.programs = self.programs._replace(filling=filling, steady=steady)

    def open(self, seed: int = 0) -> At:
        """A new stream."""
        return At(0, self.programs.init(self.params, self.text, jax.random.key(seed), self.shape))

    def make(self, at: At):
        """(the state before the pass that later chunks need, the next chunk), see ``session.Step``."""
        return self.programs.step(at.made).make(self.params, at.state)

    def first(self):
        """The first chunk of a new stream."""
        return self.make(self.open())[1].x0

    def at(self, frame: int) -> At:
        """A stream that has made ``frame`` frames or up to a chunk more."""
        at = self.open()
        for _ in range(-(-frame // self.chunk)):
            at, _ = self.chunk_of(at)
        return jax.block_until_ready(at)

    def finish(self, at: At, made) -> At:
        """The stream after what ``make`` has made."""
        return At(at.made + 1, self.programs.step(at.made).finish(self.params, *made))

    def chunk_of(self, at: At, decode=None):
        """(the stream after one chunk, its latents or what ``decode`` makes of them)."""
        made = self.make(at)
        out = decode(made[1].x0) if decode else made[1].x0
        return self.finish(at, made), out


class Decoder:
    """A codec's stream, compiled: both programs, for the first latent frame and for all others."""

    def __init__(self, codec: VAECodec, size: Size):
        self.codec = codec
        latent = jax.random.normal(jax.random.key(0), (1, *size.latent_shape), jnp.float32)
        jitted, start = jax.jit(codec.decode_next, donate_argnums=1), codec.open_decoder()
        self.programs = [jitted.lower(codec.params, start, latent).compile()]
        state, first = self.programs[0](codec.params, start, latent)
        self.programs.append(jitted.lower(codec.params, state, latent).compile())
        _, other = self.programs[1](codec.params, state, latent)
        for name, video, frames in (("first", first, 1), ("other", other, codec.temporal_stride)):
            if (video.shape, video.dtype) != ((1, frames, size.height, size.width, 3), jnp.uint8):
                raise RuntimeError(f"the {name} latent frame became {video.dtype} {video.shape}, not {frames} frames")

    def open(self):
        """A function from chunks of latents to pixels on the host, for one stream."""
        state = None

        def decode(latents_BFhwC):
            nonlocal state
            frames = []
            for i in range(latents_BFhwC.shape[1]):
                begun = state is not None
                inputs = state if begun else self.codec.open_decoder()
                state, more = self.programs[begun](self.codec.params, inputs, latents_BFhwC[:, i])
                frames.append(more)
            return np.concatenate([np.asarray(more) for more in frames], axis=1)

        return decode


def check(name: str, students: Sequence[str]) -> dict[str, float]:
    """How far apart a student's streamed, rolled-out and parallel frames are, relative to their standard deviation.

    Raises:
      RuntimeError: further than ``TOLERANCE``.
    """
    size = SIZES[name if name in ("tiny", "small") else "small"]
    out = {}
    with jax.default_matmul_precision("highest"):
        for student in students:
            run = size.run(student)
            text = tiny.text_rows(1, jax.random.key(1), run.model.cfg.base)
            plan = StepPlan((*SCHEDULES["diagonal"],), "renoise")
            streamer, chunk = make_streamer(run.model, plan), run.model.cfg.chunk
            frames, key = max(8, 5 * chunk), jax.random.key(2)  # longer than either window
            shape = (frames, *run.latent_shape[1:])
            drawn = jax.jit(lambda p, s=streamer, t=text, k=key, d=shape: roll_out(s, p, t, k, d, "last"))(run.params)
            again = jax.jit(lambda p, m=run.model, t=text, d=drawn: recompute(m, p, t, d, ContextGrad()))(run.params)
            own = programs(streamer)
            state = own.init(run.params, text, jax.random.split(key)[1], shape[1:])
            streamed = []
            for made in range(frames // chunk):
                state, x = own.step(made)(run.params, state)
                streamed.append(np.asarray(x))
            expected = np.asarray(drawn.x0_BTHWC)
            for form, got in (("streamed", np.concatenate(streamed, axis=1)), ("parallel", np.asarray(again))):
                out[f"{student}, {form}"] = difference = float(np.abs(got - expected).max() / expected.std())
                if not difference < TOLERANCE:  # not a number is no pass either
                    raise RuntimeError(f"{student}: {form} frames differ from the rollout's by {difference:.1e}")
    return out


def measure(run: Run, plan: StepPlan, decoders: dict[str, Decoder], ceiling: float, frames: int, repeats: int) -> dict:
    """Figures of one student and schedule, see the head of this file.

    Args:
      run: of a student.
      plan: its schedule.
      decoders: by name.
      ceiling: FLOPs per second.
      frames: latent frames of the long stream.
      repeats: first chunks that are timed.
    """
    text = tiny.text_rows(1, jax.random.key(1), run.model.cfg.base)
    names = [name for name in CONTEXTS if name != "fused" or run.settings.student.kind == "etm_sdd"]
    first, compile_s, needed, laps = {}, {}, {}, clock.Laps()
    for name in names:
        stream = Stream(run, CONTEXTS[name], plan, text)
        compile_s[name], needed[name] = stream.compile_s, memory.program_bytes(stream.programs.steady.make)
        state = stream.at(EARLY)
        if state.made < stream.programs.warm_up:
            raise RuntimeError(f"slots are still empty after {EARLY} frames; nothing steady is timed")
        if name != "clean":
            for _ in range(SPAN):
                state, _ = laps.time(name, stream.chunk_of, state, per=stream.chunk)
            continue
        kept, late = stream, stream.at(frames - SPAN * stream.chunk)
        for _ in range(SPAN):
            state, _ = laps.time(name, stream.chunk_of, state, per=stream.chunk)
            late, x = laps.time(LATE, stream.chunk_of, late, per=stream.chunk)
            made = laps.time(HANDED, stream.make, state, per=stream.chunk)
            state = jax.block_until_ready(stream.finish(state, made))
        first["latents"] = clock.median_ms(stream.first, repeats)
    if not np.isfinite(x).all():
        raise RuntimeError(f"frame {frames} of a stream is not finite; random weights of scale one should not do that")
    for name, decoder in decoders.items():
        decode, state = decoder.open(), kept.at(EARLY)
        decode(x)
        for _ in range(SPAN):
            state, _ = laps.time(name, kept.chunk_of, state, decode, per=kept.chunk)
        first[name] = clock.median_ms(lambda d=decoder: d.open()(kept.first()), repeats)
    per_frame = laps.medians_ms()
    late_ms, handed_ms = per_frame.pop(LATE), per_frame.pop(HANDED)
    switch = jax.jit(kept.streamer.switch_prompt)
    stride, patch = next(iter(decoders.values())).codec.temporal_stride, run.model.cfg.base.patch
    tokens = run.latent_shape[1] * run.latent_shape[2] // patch**2
    work = flops.stream_step(kept.streamer.cfg, tokens, len(plan.sigmas[-1])).total / kept.chunk
    return {
        "chunk": kept.chunk,
        "steps": [len(row) for row in plan.sigmas],
        "text_ms": clock.median_ms(kept.open, repeats),
        "switch_ms": clock.median_ms(lambda: switch(kept.params, state.state, text), repeats),
        "first_chunk_ms": first,
        "handed_out_ms_per_latent_frame": handed_ms,
        "ms_per_latent_frame": per_frame,
        "model_flops_per_latent_frame": work,
        "mfu": 1e3 * work / per_frame["clean"] / ceiling,
        "pixel_fps": {name: stride * 1e3 / ms for name, ms in per_frame.items()},
        "late": {"frame": frames, "ms": late_ms, "over_early": late_ms / per_frame["clean"]},
        "compile_s": compile_s,
        "program_bytes": needed,
        "cache_bytes": kept.cache_bytes,
        "peak": memory.peak_bytes(),
    }


def show(rows: list[dict]) -> str:
    """The table."""
    header = [
        "student",
        "steps",
        "text ms",
        "first: latents",
        "tiny VAE",
        "Wan VAE",
        "ms/frame: handed",
        "model",
        "+ clean",
        "fused",
        "+ tiny VAE",
        "+ Wan VAE",
        "FPS: + clean",
        "+ tiny VAE",
        "+ Wan VAE",
        "late",
        "MFU + clean",
        "program MiB",
    ]
    cells = []
    for row in rows:
        first, ms, fps = row["first_chunk_ms"], row["ms_per_latent_frame"], row["pixel_fps"]
        cells.append(
            [
                row["student"],
                row["schedule"],
                row["text_ms"],
                first["latents"],
                first["tiny VAE"],
                first["Wan VAE"],
                row["handed_out_ms_per_latent_frame"],
                ms["model"],
                ms["clean"],
                ms.get("fused"),
                ms["tiny VAE"],
                ms["Wan VAE"],
                fps["clean"],
                fps["tiny VAE"],
                fps["Wan VAE"],
                round(row["late"]["over_early"], 3),
                row["mfu"],
                row["program_bytes"]["clean"]["total"] / 2**20,
            ]
        )
    return record.table(header, cells)


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python benchmarks/stream.py", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--student", choices=STUDENTS, nargs="+", default=STUDENTS)
    parser.add_argument("--steps", choices=SCHEDULES, nargs="+", default=tuple(SCHEDULES), help="denoising schedules")
    parser.add_argument("--frames", type=int, default=400, help="latent frames of the long stream (400)")
    parser.add_argument("--repeats", type=int, default=7, help="first chunks that are timed (7)")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default=WEIGHTS[0],
        help="how kernels are held (compute: in the dtype that they are used in, as `sample` holds them)",
    )
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    return parser


def main(argv: list[str]) -> None:
    """Command line."""
    args = _parser().parse_args(argv)
    size, begin = SIZES[args.size], time.perf_counter()
    configs = {student: size.config(student) for student in args.student}
    least = EARLY + SPAN * max(config.student.chunk for config in configs.values())
    if args.frames < least or args.repeats < 1:
        raise UserError(f"--frames {args.frames} --repeats {args.repeats}: use at least {least} frames and 1 repeat.")
    clock.one_thread()
    dtype = read_settings(configs[args.student[0]], imagine_runs=True).wan.dtype
    result = {
        "size": args.size,
        "video": [size.height, size.width],
        "latents": list(size.latent_shape),
        "batch": 1,
        "dtype": dtype,
        "weights": args.weights,
        "schedules": {name: SCHEDULES[name] for name in args.steps},
        "text": "the students' projection of the text rows; the text encoder is not measured",
        **environment.environment(),
        "ceilings": environment.ceilings(dtype),
        "checks": check(args.size, args.student),
        "rows": [],
    }
    ceiling = result["ceilings"]["matmul_flops_per_s"]
    decoders = {name: Decoder(codec, size) for name, codec in size.codecs().items()}
    result["decoder_program_bytes"] = {
        name: memory.program_bytes(decoder.programs[1]) for name, decoder in decoders.items()
    }
    for student in args.student:
        run = size.run(student)
        run = run.computing() if args.weights == "compute" else run
        result["models"] = result.get("models", {}) | {student: dataclasses.asdict(run.model.cfg)}
        for name in args.steps:
            row = measure(run, StepPlan(SCHEDULES[name], "renoise"), decoders, ceiling, args.frames, args.repeats)
            result["rows"].append({"student": student, "schedule": name, **row})
            result["wall_s"] = time.perf_counter() - begin
            record.write_json(args.output, result)
            print(f"{student}, {name} steps: {row['ms_per_latent_frame']['clean']:.3g} ms per frame", flush=True)
    print(f"{result['device']} ({result['cpu']}), {result['clock']}")
    print(f"{size.width}x{size.height}, {result['wall_s']:.0f} s in all")
    for what, difference in result["checks"].items():
        print(f"{what} frames against the rollout's: {difference:.1e} of their standard deviation")
    peak = result["rows"][-1]["peak"]
    print(f"peak memory {peak['bytes'] / 2**20:.0f} MiB: {peak['source']}")
    print(show(result["rows"]))


if __name__ == "__main__":
    cli.run(main)
