"""Videos from prompts, written while they are generated.

    python -m greedy_distill_jax.sample --checkpoint runs/student --prompt "a red square moving left" \
        --frames 256 --seed 0 --output out.mp4 --switch 128:"a blue circle moving up"
"""

import contextlib
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from greedy_distill_jax import cli
from greedy_distill_jax.data.video_io import VideoWriter
from greedy_distill_jax.mesh import use_compile_cache
from greedy_distill_jax.run import Run
from greedy_distill_jax.types import UserError


def parse_switch(value: str) -> tuple[int, str]:
    """ "128:a blue circle moving up" -> (128, prompt)."""
    frame, colon, prompt = value.partition(":")
    if not colon or not frame.strip().isdecimal():
        raise UserError(f'--switch {value!r} is not of the form FRAME:"PROMPT", such as 128:"a blue circle moving up".')
    return int(frame), prompt


def output_paths(output: str, prompts: int) -> list[Path]:
    """One file per prompt: out.mp4, or out-0.mp4, out-1.mp4, ..."""
    path = Path(output)
    return [path] if prompts == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(prompts)]


def stream_videos(run: Run, prompts: list[str], frames: int, *, seed: int = 0, switches: dict[int, str] | None = None,
                  steps: int | None = None, first_steps: int | None = None):  # fmt: skip
    """Yields uint8 [B, g, H, W, 3], chunk by chunk, for any number of frames at constant memory.

    Args:
      run: a loaded student.
      prompts: one video each.
      frames: frames to make, a multiple of the student's chunk.
      seed: noise.
      switches: frame -> prompt that all videos follow from that frame on; a multiple of the chunk.
      steps, first_steps: network evaluations per chunk and of the first chunk; None for the run's own.
    """
    chunk, switches = run.model.cfg.chunk, dict(switches or {})
    for what, frame in [("--frames", frames), *(("--switch", f) for f in switches)]:
        if frame % chunk:
            raise UserError(f"{what} {frame} does not fit the student's chunk of {chunk} frames; use a multiple of it.")
    late = [f for f in switches if not 0 < f < frames]
    if late:
        raise UserError(f"--switch at frame {late[0]} lies outside the video; choose 1 to {frames - 1}.")
    state, step = run.open_stream(run.text(prompts), jax.random.key(seed), steps, first_steps)
    switch = jax.jit(run.streamer(steps, first_steps).switch_prompt)
    for frame in range(0, frames, chunk):
        if frame in switches:
            state = switch(run.params, state, run.text([switches[frame]] * len(prompts)))
        state, latents = step(run.params, state)
        yield run.codec.decode(np.asarray(latents))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = cli.Parser(prog="python -m greedy_distill_jax.sample", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="run directory (the --workdir of training)")
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument(
        "--switch", action="append", default=[], metavar='FRAME:"PROMPT"', help="new prompt from a frame on"
    )
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--steps", type=int, help="network evaluations per chunk (default: the run's)")
    parser.add_argument("--first-steps", type=int, help="of the first chunk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, help="default: the run's")
    parser.add_argument("--upscale", type=int, default=0, help="pixels per pixel; 0 makes small videos about 128 wide")
    parser.add_argument("--output", default="out.mp4", help=".mp4, .webm or .gif")
    args = parser.parse_args(argv)
    for name in ("frames", "steps", "first_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    run = Run.load(args.checkpoint)
    use_compile_cache(run.config.compile_cache)
    switches = dict(parse_switch(value) for value in args.switch)
    if run.is_student:
        chunks = stream_videos(run, args.prompt, args.frames, seed=args.seed, switches=switches, steps=args.steps,
                               first_steps=args.first_steps)  # fmt: skip
    elif switches or args.first_steps:
        option = "--switch" if switches else "--first-steps"
        raise UserError(f"{option} needs a streaming student; a teacher makes the whole video at once.")
    else:
        video = run.sample_videos(args.prompt, frames=args.frames, steps=args.steps, seed=args.seed)
        chunks = (video[:, t : t + 1] for t in range(args.frames))

    width = run.latent_shape[2] * run.codec.patch
    upscale = args.upscale or max(1, 128 // width)
    paths = output_paths(args.output, len(args.prompt))
    fps = run.config.log.fps if args.fps is None else args.fps
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(VideoWriter(path, fps=fps, upscale=upscale)) for path in paths]
        bar = stack.enter_context(tqdm(total=args.frames, unit="frame", desc="sample"))
        for chunk in chunks:  # [B, g, H, W, 3]
            for writer, frames in zip(writers, chunk, strict=True):
                for frame in frames:
                    writer.write(frame)
            bar.update(chunk.shape[1])
    for path, prompt in zip(paths, args.prompt, strict=True):
        print(f"{path}: {args.frames} frames, {prompt!r}")


if __name__ == "__main__":
    cli.run(main)
