"""Videos from prompts, written while they are generated.

    python -m greedy_distill_jax.sample --checkpoint runs/student --prompt "a red square moving left" \
        --frames 256 --seed 0 --output out.mp4 --switch 128:"a blue circle moving up"
    python -m greedy_distill_jax.sample --model Wan2.1-T2V-1.3B-Diffusers --prompt "a cat" --output cat.mp4
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from greedy_distill_jax import cli
from greedy_distill_jax.data.text import WAN_NEGATIVE_PROMPT
from greedy_distill_jax.data.video_io import VideoWriter
from greedy_distill_jax.diffusion import solvers
from greedy_distill_jax.export.pipeline import load_codec
from greedy_distill_jax.mesh import use_compile_cache
from greedy_distill_jax.models.codec import stream_decoder
from greedy_distill_jax.run import Run, latent_frames
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
    """Yields uint8 [B, frames, H, W, 3], chunk by chunk, for any number of frames at constant memory.

    Args:
      run: a loaded student.
      prompts: one video each.
      frames: latent frames to make, a multiple of the student's chunk.
      seed: noise.
      switches: latent frame -> prompt that all videos follow from there on; a multiple of the chunk.
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
    switch, decode = jax.jit(run.streamer(steps, first_steps).switch_prompt), stream_decoder(run.codec)
    for frame in range(0, frames, chunk):
        if frame in switches:
            state = switch(run.params, state, run.text([switches[frame]] * len(prompts)))
        state, latents = step(run.params, state)
        yield decode(latents)


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m greedy_distill_jax.sample", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="DIR", help="run directory (the --workdir of training)")
    source.add_argument("--model", metavar="DIR", help="model folder in the layout of diffusers: a teacher")
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--text", metavar="DIR", help="text store or model folder that encodes the prompts instead")
    parser.add_argument("--frames", type=int, help="of the video (default: 64, with --model 81)")
    parser.add_argument("--steps", type=int, help="evaluations per chunk or video (default: the run's, or 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, help="default: the run's, with --model 16")
    parser.add_argument("--upscale", type=int, default=0, help="pixels per pixel; 0 makes small videos about 128 wide")
    parser.add_argument("--output", default="out.mp4", help=".mp4, .webm or .gif")
    student = parser.add_argument_group("streaming students")
    student.add_argument(
        "--switch", action="append", default=[], metavar='FRAME:"PROMPT"', help="new prompt from a frame on"
    )
    student.add_argument("--first-steps", type=int, help="of the first chunk")
    teacher = parser.add_argument_group("teachers (default: the run's; with --model the values in parentheses)")
    teacher.add_argument("--negative-prompt", metavar="TEXT", help="unconditional branch (Wan2.1's own)")
    teacher.add_argument("--solver", choices=solvers.SOLVERS, help="(unipc)")
    teacher.add_argument("--shift", type=float, help="of the noise levels (what scheduler/ says, else 5)")
    teacher.add_argument("--guidance", type=float, help="scale of classifier-free guidance, 1 = off (5)")
    model = parser.add_argument_group("model folders")
    model.add_argument("--height", type=int, help="pixels (480)")
    model.add_argument("--width", type=int, help="pixels (832)")
    model.add_argument("--dtype", choices=("bfloat16", "float32"), help="to compute in (bfloat16)")
    return parser


def _check(args: argparse.Namespace) -> None:
    for name in ("frames", "steps", "first_steps", "height", "width"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    if args.shift is not None and not args.shift > 0:
        raise UserError(f"--shift is {args.shift}; it must be positive.")
    if args.checkpoint:
        _refuse(args, ("height", "width", "dtype"), "belongs to --model; a run has its own")


def _refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(args, name) not in (None, []):
            raise UserError(f"--{name.replace('_', '-')} {why}.")


def _load(args: argparse.Namespace) -> Run:
    """The run or the model folder, with what the command line says about a teacher."""
    if args.checkpoint:
        run = Run.load(args.checkpoint, text=args.text)
    else:
        codec = load_codec(args.model, dtype=args.dtype or "bfloat16")
        run = Run.from_model_folder(
            args.model, codec, args.prompt, height=args.height or 480, width=args.width or 832, frames=args.frames,
            negative=WAN_NEGATIVE_PROMPT if args.negative_prompt is None else args.negative_prompt,
            dtype=args.dtype or "bfloat16", text=args.text,
        )  # fmt: skip
    if run.is_student:
        _refuse(args, ("negative_prompt", "solver", "shift", "guidance"), "needs a teacher; a student has no guidance")
        return run
    _refuse(args, ("switch", "first_steps"), "needs a streaming student; a teacher makes the whole video at once")
    config = run.config.copy_and_resolve_references()
    for key, name in (("sampler", "solver"), ("shift", "shift"), ("guidance", "guidance")):
        if getattr(args, name) is not None:
            config.sample[key] = getattr(args, name)
    if args.negative_prompt is not None:
        config.data.negative_prompt = args.negative_prompt
    return dataclasses.replace(run, config=config)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = _parser().parse_args(argv)
    args.frames = args.frames if args.frames is not None else 81 if args.model else 64
    _check(args)
    paths = output_paths(args.output, len(args.prompt))
    with contextlib.ExitStack() as stack:
        # The files first: a name that cannot be written should not cost a video.
        options = dict(fps=1 if args.fps is None else args.fps, upscale=args.upscale or 1)
        writers = [stack.enter_context(VideoWriter(path, **options)) for path in paths]
        run = _load(args)
        use_compile_cache(run.config.compile_cache)
        if run.is_student:
            switches = dict(parse_switch(value) for value in args.switch)
            switches = {frame and latent_frames(run.codec, frame, "--switch"): p for frame, p in switches.items()}
            chunks = stream_videos(run, args.prompt, latent_frames(run.codec, args.frames), seed=args.seed,
                                   switches=switches, steps=args.steps, first_steps=args.first_steps)  # fmt: skip
        else:
            length = latent_frames(run.codec, args.frames)
            video = run.sample_videos(args.prompt, frames=length, steps=args.steps, seed=args.seed)
            chunks = (video[:, t : t + 1] for t in range(video.shape[1]))
        bar = stack.enter_context(tqdm(total=args.frames, unit="frame", desc="sample"))
        for chunk in chunks:  # [B, g, H, W, 3]
            for writer, frames in zip(writers, chunk, strict=True):
                writer.fps = args.fps or run.config.log.fps
                writer.upscale = args.upscale or max(1, 128 // chunk.shape[3])
                for frame in frames:
                    writer.write(frame)
            bar.update(chunk.shape[1])
    for path, prompt in zip(paths, args.prompt, strict=True):
        print(f"{path}: {args.frames} frames, {prompt!r}")


if __name__ == "__main__":
    cli.run(main)
