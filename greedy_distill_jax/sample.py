"""Videos from prompts, written while they are generated.

    python -m greedy_distill_jax.sample --checkpoint runs/student --prompt "a red square moving left" \
        --frames 256 --seed 0 --output out.mp4 --switch 128:"a blue circle moving up"
    python -m greedy_distill_jax.sample --model Wan2.1-T2V-1.3B-Diffusers --prompt "a cat" --output cat.mp4
"""

import argparse
import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from greedy_distill_jax import cli
from greedy_distill_jax.errors import UserError

# What takes seconds to import is imported inside functions, so that --help and mistakes are answered at once.

FRAMES, WAN_FRAMES = 64, 81  # default of a student; what Wan2.1 was trained on


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


def stream_videos(run, prompts: list[str], frames: int, *, seed: int = 0, switches: dict[int, str] | None = None,
                  steps: int | None = None, first_steps: int | None = None) -> Iterator:  # fmt: skip
    """Yields uint8 [B, frames, H, W, 3], chunk by chunk, for any number of frames at constant memory.

    Args:
      run: a loaded student (`run.Run`).
      prompts: one video each.
      frames: latent frames to make, a multiple of the student's chunk.
      seed: noise.
      switches: latent frame -> prompt that all videos follow from there on; a multiple of the chunk.
      steps, first_steps: network evaluations per chunk and of the first chunk; None for the run's own.

    Raises:
      UserError: frames that do not fit, before anything is made.
    """
    chunk, switches = run.model.cfg.chunk, dict(switches or {})
    for what, frame in [("frames", frames), *(("switch", f) for f in switches)]:
        if frame % chunk:
            raise UserError(f"{what} {frame} does not fit the student's chunk of {chunk} frames; use a multiple of it.")
    _check_switches(switches, frames)
    return _stream(run, prompts, frames, seed, switches, steps, first_steps)


def _stream(run, prompts, frames, seed, switches, steps, first_steps):
    import jax

    from greedy_distill_jax.codecs.protocol import stream_decoder

    state, step = run.open_stream(run.text(prompts), jax.random.key(seed), steps, first_steps)
    switch, decode = jax.jit(run.streamer(steps, first_steps).switch_prompt), stream_decoder(run.codec)
    for frame in range(0, frames, run.model.cfg.chunk):
        if frame in switches:
            state = switch(run.params, state, run.text([switches[frame]] * len(prompts)))
        state, latents = step(run.params, state)
        yield decode(latents)


def _check_switches(switches: Iterable[int], frames: int) -> None:
    outside = [frame for frame in switches if not 0 < frame < frames]
    if outside and frames < 2:
        raise UserError(f"--switch at frame {outside[0]}: a video of one frame has nothing to switch; raise --frames.")
    if outside:
        raise UserError(
            f"--switch at frame {outside[0]} lies outside the video of {frames} frames; choose 1 to {frames - 1}"
            + (f", or raise --frames above {outside[0]}." if outside[0] else ", or change --prompt.")
        )


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m greedy_distill_jax.sample", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="DIR", help="run directory (the --workdir of training)")
    source.add_argument("--model", metavar="DIR", help="model folder in the layout of diffusers: a teacher")
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--text", metavar="DIR", help="text store or model folder that encodes the prompts instead")
    parser.add_argument("--codec", metavar="PATH", help="decodes instead: codec.npz, model folder or weights of a VAE")
    parser.add_argument(
        "--frames", type=int, help=f"of the video (default: {FRAMES}, or the next number that fits; a teacher's "
        f"training length, with --model {WAN_FRAMES})",
    )  # fmt: skip
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
    teacher.add_argument("--solver", choices=("euler", "unipc"), help="(unipc)")
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
        what, remedy = "checkpoint", "give the --workdir of a training command"
    else:
        _refuse(args, ("switch", "first_steps"), "needs a streaming student (--checkpoint); --model makes whole videos")
        what, remedy = "model", "give a model folder in the layout of diffusers (transformer/, vae/, ...)"
    if not Path(getattr(args, what)).expanduser().is_dir():
        raise UserError(f"--{what} {getattr(args, what)}: no such folder; {remedy}.")
    if args.frames:
        _check_switches([parse_switch(value)[0] for value in args.switch], args.frames)


def _refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(args, name) not in (None, []):
            raise UserError(f"--{name.replace('_', '-')} {why}.")


def _load(args: argparse.Namespace):
    """The run or the model folder, with what the command line says about a teacher; sets ``args.frames``."""
    from greedy_distill_jax.runs.run import Run, latent_frames
    from greedy_distill_jax.text.prompts import WAN_NEGATIVE_PROMPT
    from greedy_distill_jax.weights.pipeline import load_codec, transformer_config

    with contextlib.ExitStack() as stack:
        for name in ("checkpoint", "model", "codec", "text"):
            stack.enter_context(cli.option(f"--{name}", getattr(args, name)))
        if args.checkpoint:
            run = Run.load(args.checkpoint, text=args.text, codec=args.codec)
        else:
            args.frames, dtype = args.frames or WAN_FRAMES, args.dtype or "bfloat16"
            height, width = args.height or 480, args.width or 832
            codec = load_codec(args.codec or args.model, dtype=dtype)
            latent_shape = latent_frames(codec, args.frames), *codec.latent_shape(height, width)
            _check_length(args, transformer_config(args.model, dtype=dtype), latent_shape, WAN_FRAMES)
            run = Run.from_model_folder(
                args.model, codec, args.prompt, height=height, width=width, frames=args.frames,
                negative=WAN_NEGATIVE_PROMPT if args.negative_prompt is None else args.negative_prompt,
                dtype=dtype, text=args.text,
            )  # fmt: skip
    if run.is_student:
        _refuse(args, ("negative_prompt", "solver", "shift", "guidance"), "needs a teacher; a student has no guidance")
        if args.frames is None:
            args.frames = _video_frames(run, 1 + math.ceil((FRAMES - 1) / run.codec.temporal_stride))
        return run
    _refuse(args, ("switch", "first_steps"), "needs a streaming student; a teacher makes the whole video at once")
    if args.checkpoint:
        trained = 1 + (run.latent_shape[0] - 1) * run.codec.temporal_stride
        args.frames = args.frames or trained
        _check_length(args, run.model.cfg, (latent_frames(run.codec, args.frames), *run.latent_shape[1:]), trained)
    config = run.config.copy_and_resolve_references()
    for key, name in (("sampler", "solver"), ("shift", "shift"), ("guidance", "guidance")):
        if getattr(args, name) is not None:
            config.sample[key] = getattr(args, name)
    if args.negative_prompt is not None:
        config.data.negative_prompt = args.negative_prompt
    return dataclasses.replace(run, config=config)


def _check_length(args: argparse.Namespace, cfg, latent_shape: tuple[int, ...], trained: int) -> None:
    """Refuses what cannot fit; says so when a teacher is asked for more frames than it was trained on."""
    needed, memory = least_bytes(cfg, latent_shape, len(args.prompt)), _memory()
    if memory and needed > memory:
        raise UserError(
            f"--frames {args.frames} needs more than {needed / 2**30:,.0f} GiB at this size, and there are "
            f"{memory / 2**30:,.0f}; use fewer (the teacher was trained on {trained}) or stream with a student."
        )
    if args.frames > trained:
        print(
            f"warning: --frames {args.frames}: this teacher was trained on {trained}; longer videos are likely worse, "
            "and their cost grows with the square of the length (a student streams any length).",
            file=sys.stderr,
        )


def _video_frames(run, latents: int) -> int:
    """Frames of a student's shortest video of whole chunks with at least so many latent frames."""
    chunk = run.model.cfg.chunk
    return 1 + (math.ceil(latents / chunk) * chunk - 1) * run.codec.temporal_stride


def _latents(run, option: str, frame: int) -> int:
    """Latent frames of so many frames of a student's video, whole chunks."""
    from greedy_distill_jax.runs.run import latent_frames

    count, chunk = latent_frames(run.codec, frame, option), run.model.cfg.chunk
    if count % chunk:
        near = [_video_frames(run, n) for n in (count - chunk, count) if n > 0]
        raise UserError(
            f"{option} {frame} does not fit the student's chunk of {chunk} latent frames; choose "
            f"{' or '.join(map(str, near))}."
        )
    return count


def least_bytes(cfg, latent_shape: tuple[int, ...], videos: int) -> int:
    """Less than a teacher needs for videos of this latent shape: residual stream, one MLP, and who sees whom."""
    frames, height, width, _ = latent_shape
    tokens = videos * frames * (height // cfg.patch) * (width // cfg.patch)
    return tokens * (4 * cfg.dim + {"bfloat16": 2, "float32": 4}[cfg.dtype] * cfg.ffn_dim) + 8 * frames**2


def _memory() -> int:
    """Bytes of the device, or of this machine where it computes itself; 0 where nobody says."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def _sample_teacher(run, args: argparse.Namespace):
    """The whole video of a teacher, uint8 [B, T, H, W, 3]."""
    import jax

    from greedy_distill_jax.runs.run import latent_frames

    length = latent_frames(run.codec, args.frames)
    try:
        return run.sample_videos(args.prompt, frames=length, steps=args.steps, seed=args.seed)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"--frames {args.frames} with {len(args.prompt)} --prompt does not fit into the memory of the device; use "
            "fewer of either, or a smaller video."
        ) from error


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = _parser().parse_args(argv)
    _check(args)

    from tqdm import tqdm

    from greedy_distill_jax.data.video_io import VideoWriter
    from greedy_distill_jax.distribution.mesh import use_compile_cache

    paths = output_paths(args.output, len(args.prompt))
    with contextlib.ExitStack() as stack:
        # The files first: a name that cannot be written should not cost a video.
        options = dict(fps=1 if args.fps is None else args.fps, upscale=args.upscale or 1)
        writers = [stack.enter_context(VideoWriter(path, **options)) for path in paths]
        run = _load(args)
        use_compile_cache(run.config.compile_cache)
        if run.is_student:
            switches = dict(parse_switch(value) for value in args.switch)
            _check_switches(switches, args.frames)
            switches = {_latents(run, "--switch", frame): prompt for frame, prompt in switches.items()}
            chunks = stream_videos(run, args.prompt, _latents(run, "--frames", args.frames), seed=args.seed,
                                   switches=switches, steps=args.steps, first_steps=args.first_steps)  # fmt: skip
        else:
            video = _sample_teacher(run, args)
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
