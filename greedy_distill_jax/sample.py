"""Videos from prompts, written while they are generated.

    python -m greedy_distill_jax.sample --checkpoint runs/student --prompt "a red square moving left" \
        --frames 256 --seed 0 --output out.mp4 --switch 128:"a blue circle moving up"
    python -m greedy_distill_jax.sample --checkpoint runs/student --prompt "a red square moving left" --given in.mp4
    python -m greedy_distill_jax.sample --model Wan2.1-T2V-1.3B-Diffusers --prompt "a cat" --output cat.mp4
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from greedy_distill_jax import cli
from greedy_distill_jax.cli import sample_options as options
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.streaming.timeline import Timeline, check_switches

# What takes seconds to import is imported inside functions, so that --help and mistakes are answered at once.

OPTIONS = ("frames", "steps", "height", "width", "shift", "codec", "text", "fps", "upscale", "output", "weights")
OPTIONS += ("given", "given_frames")
PLACES = {name: f"--{name.replace('_', '-')}" for name in OPTIONS}
PLACES |= {"switches": "--switch", "context_sigma": "--context-sigma"}
PLACES |= {"path": "--output", "directory": "--checkpoint", "folder": "--model"}
OF_A_STUDENT = ("switch", "context_sigma", "given", "given_frames")
OF_A_TEACHER = ("negative_prompt", "solver", "shift", "guidance")


def _check(args: argparse.Namespace) -> None:
    """Refuses what needs no run to be wrong."""
    if args.checkpoint:
        _refuse(args, ("height", "width", "dtype"), "belongs to --model; a run has its own")
        field, folder, remedy = "directory", args.checkpoint, "give the --workdir of a training command"
    else:
        _refuse(args, OF_A_STUDENT, "needs a streaming student (--checkpoint); --model makes whole videos")
        _refuse(args, ("weights",), "belongs to --checkpoint; the weights of a model folder are held in its --dtype")
        field, folder, remedy = "folder", args.model, "give a model folder in the layout of diffusers"
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"{folder}: no such folder; {remedy}", field)
    if args.given_frames and not args.given:
        raise UserError(f"{args.given_frames} frames of what? Name it with --given", "given_frames")
    if args.given and not Path(args.given).expanduser().exists():
        raise UserError(f"{args.given} does not exist; give a video, an image, a folder of images or latents", "given")
    args.switches = options.parse_switches(args.switch)
    if args.frames:
        check_switches(args.switches, args.frames)
    for prompt in dict.fromkeys(args.prompt):
        if (times := args.prompt.count(prompt)) > 1:
            same = f"given {times} times, is the same video {times} times; another --seed makes another"
            print(f"warning: --prompt {prompt!r}, {same}.", file=sys.stderr)


def _refuse(args: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(args, name) not in (None, []):
            raise UserError(f"--{name.replace('_', '-')} {why}")


def _load(args: argparse.Namespace):
    """The run, or the teacher of the model folder."""
    from greedy_distill_jax.runs.model_folder import load_model_folder
    from greedy_distill_jax.runs.run import Run

    if args.model:
        size = dict(height=args.height or 480, width=args.width or 832, frames=args.frames or options.WAN_FRAMES)
        more = dict(negative=args.negative_prompt, dtype=args.dtype or "bfloat16", text=args.text, codec=args.codec)
        return load_model_folder(args.model, args.prompt, **size, **more)
    run = Run.load(args.checkpoint, text=args.text, codec=args.codec)
    foreign = OF_A_TEACHER if run.is_student else OF_A_STUDENT
    _refuse(args, foreign, "needs a teacher" if run.is_student else "needs a streaming student")
    return run if args.weights == "float32" else run.computing()


def _videos(run, args: argparse.Namespace, fps: float | int) -> Iterator:
    """The videos as they are made, uint8 [B, some frames, H, W, 3]; sets ``args.frames`` where it was not given.

    Every prompt is encoded and sampled by itself: in a program for several videos the last bits depend on how many.
    """
    import numpy as np

    from greedy_distill_jax.runs.given import read_given

    if run.is_student:
        timeline = Timeline(run.codec.temporal_stride, run.model.cfg.chunk)
        args.frames = args.frames or timeline.fill(options.FRAMES)
        given = read_given(run, args.given, fps=fps, last=args.given_frames, frames=args.frames) if args.given else None
        more = {name: getattr(args, name) for name in ("seed", "steps", "context_sigma")}
        more["weights"] = args.weights or "compute"
        sessions = [run.session([prompt], **more) for prompt in args.prompt]
        for session in sessions if args.given else ():
            session.give(given)
        playing = [session.play(args.frames, args.switches) for session in sessions]
        return (np.concatenate(frames) for frames in zip(*playing, strict=True))
    trained = (
        options.WAN_FRAMES if args.model else Timeline(run.codec.temporal_stride).video_frames(run.latent_shape[0])
    )
    args.frames = args.frames or trained
    if isinstance(args.steps, str):
        raise UserError(f"{args.steps} is not one number; a teacher makes the whole video at once", "steps")
    sampler = run.teacher_sampler(steps=args.steps, **{name: getattr(args, name) for name in OF_A_TEACHER})
    if args.frames > trained:
        less = "longer videos are likely worse, and cost the square of their length (a student streams any length)"
        print(f"warning: --frames {args.frames}: this teacher was trained on {trained}; {less}.", file=sys.stderr)
    size = args.frames, run.latent_shape[1:], args.seed
    video = np.concatenate([sampler.videos(run.codec, run.text([prompt]), *size) for prompt in args.prompt])
    return (video[:, t : t + 1] for t in range(args.frames))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = options.parser(__doc__.splitlines()[0]).parse_args(argv)
    with cli.places(**PLACES), contextlib.ExitStack() as stack:
        _check(args)

        from tqdm import tqdm

        from greedy_distill_jax.distribution.compile_cache import use_compile_cache
        from greedy_distill_jax.streaming.recording import Recording, output_paths

        paths = output_paths(args.output, len(args.prompt))
        recording = stack.enter_context(Recording(paths, fps=args.fps, upscale=args.upscale))  # before it costs a video
        run = _load(args)
        if args.compile_cache is not None:
            run.settings = dataclasses.replace(run.settings, compile_cache=args.compile_cache)
        use_compile_cache(run.settings.compile_cache)
        run.check_words([*args.prompt, *args.switches.values()])  # in one line, before a video is made
        recording.fps = args.fps or run.settings.log.fps
        videos = _videos(run, args, recording.fps)
        bar = stack.enter_context(tqdm(total=args.frames, unit="frame", desc="sample"))
        for chunk in videos:
            recording.write(chunk)
            bar.update(chunk.shape[1])
    for path, prompt in zip(paths, args.prompt, strict=True):
        print(f"{path}: {args.frames} frames, {prompt!r}")


if __name__ == "__main__":
    cli.run(main)
