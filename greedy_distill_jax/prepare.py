"""Turns raw material into what training reads: `python -m greedy_distill_jax.prepare COMMAND --help`."""

import argparse
from collections.abc import Sequence
from typing import Any

from greedy_distill_jax import cli
from greedy_distill_jax.cli import prepare_options as options
from greedy_distill_jax.cli.config_flags import read_config
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.data.sources.captions import read_captions
from greedy_distill_jax.data.sources.clips import prepare_clips
from greedy_distill_jax.data.sources.cutting import Cutting
from greedy_distill_jax.data.sources.latents import prepare_latents
from greedy_distill_jax.distribution.hosts import join
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.runs.ode import follow_teacher
from greedy_distill_jax.text.prompts import WAN_NEGATIVE_PROMPT, read_prompts
from greedy_distill_jax.text.umt5 import TEXT_LEN, encode_prompts, encoder_plan
from greedy_distill_jax.weights.pipeline import load_codec


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; UserError for bad input, which `cli.run` makes one line and exit code 2."""
    parser = cli.Parser(prog="python -m greedy_distill_jax.prepare", description=__doc__.split(":")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, add, run, told in (
        ("clips", options.add_clips, _clips, "cut video files into captioned windows"),
        ("text", options.add_text, _text, "encode prompts with Wan's text encoder"),
        ("latents", options.add_latents, _latents, "encode clips into latents, and their captions"),
        ("ode", options.add_ode, _ode, "follow a teacher's ODE at a student's noise levels"),
    ):
        command = commands.add_parser(name, help=told)
        add(command, negative=WAN_NEGATIVE_PROMPT, text_len=TEXT_LEN)
        options.add_share(command)
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    args.run(args)


def _clips(args: argparse.Namespace) -> None:
    job = _job(args)
    with cli.places(**options.CUTTING):
        info = prepare_clips(args.clips, args.captions, args.output, _cutting(args), group=args.group, **job)
    if _all_done(args, info):
        _tell_windows(args, info, f"of {info['frames']} frames, {info['width']}x{info['height']}, {info['fps']:g} fps")


def _latents(args: argparse.Namespace) -> None:
    job = _job(args)
    with cli.places(**options.CUTTING, codec="--codec", folder="--text-model", text_len="--text-len"):
        cutting, codec, model = _cutting(args), load_codec(args.codec), args.text_model
        if model:
            encoder_plan(model, args.text_len, "stored")  # a wrong folder shows before the clips are encoded
        info = prepare_latents(
            args.clips, args.captions, args.output, cutting, codec, dtype=args.dtype, group=args.group, **job
        )
        if model:
            captions, texts = sorted(set(read_captions(args.clips, args.captions).values())), f"{args.output}/text"
            stored = encode_prompts([*captions, args.negative], texts, model, text_len=args.text_len, **job)
            info = info if stored is not None else None
    if _all_done(args, info):
        _tell_windows(args, info, f"latents {'x'.join(map(str, info['latent_shape']))} {args.dtype}")


def _tell_windows(args: argparse.Namespace, info: dict[str, Any], what: str) -> None:
    # Earlier versions, whose folders are gone on with, looked neither at rates nor at transparency.
    rates = sorted({round(clip["fps"], 2) for clip in info["clips"]}) if args.fps is None else []
    if rates and rates[-1] > 1.01 * rates[0]:
        print(f"note: clips of different rates ({', '.join(map(str, rates))} fps) are mixed; --fps N resamples them.")
    if transparent := sum(clip.get("alpha", False) for clip in info["clips"]):
        print(f"note: clips that may be transparent, where they were put on black: {transparent}")
    counts = info["counts"]
    print(
        f"{args.output}: {counts['train']} training and {counts.get('held_out', 0)} held-out windows, {what}, from "
        f"{len(info['clips'])} clips; {len(info['skipped'])} skipped"
    )


def _cutting(args: argparse.Namespace) -> Cutting:
    width, height = options.parse_size(args.size)
    return Cutting(width, height, args.frames, args.fps, args.stride, args.held_out, args.crops)


def _text(args: argparse.Namespace) -> None:
    job = _job(args)
    with cli.places(**options.TEXT):
        prompts = [*read_prompts(args.prompts), args.negative]
        info = encode_prompts(
            prompts, args.output, args.model, text_len=args.text_len, dtype=args.dtype, batch=args.batch, **job
        )
    if _all_done(args, info):
        print(
            f"{args.output}: {len(info['prompts'])} prompts, {info['text_len']} rows of {info['text_dim']} "
            f"{info['plan']['dtype']}, cleaned by {info['plan']['cleaning']}"
        )


def _ode(args: argparse.Namespace) -> None:
    job = _job(args)
    student = read_settings(read_config(args.student, "--student"), imagine_runs=True)
    if not student.is_student:
        raise UserError(f"--student {args.student} configures a teacher; name the configuration of a student")
    sigmas = tuple(sorted({sigma for row in student.plan.sigmas for sigma in row}, reverse=True))
    with cli.places(**options.ODE):
        width, height = options.parse_size(args.size)
        info = follow_teacher(
            args.prompts,
            args.output,
            sigmas=sigmas,
            shift=student.sample.shift,
            width=width,
            height=height,
            **{name: getattr(args, name) for name in options.ODE_ARGUMENTS},
            **job,
        )
    if _all_done(args, info):
        levels = ", ".join(f"{sigma:.4g}" for sigma in sigmas)
        print(f"{args.output}: {info['counts']['train']} trajectories at noise levels {levels} and 0")


def _job(args: argparse.Namespace) -> dict[str, Any]:
    """What every job takes: the share (index, count) of this process, checked, and whether it starts again."""
    if (args.shard_index is None) != (args.num_shards is None):
        raise UserError("--shard-index and --num-shards belong together; give both, or neither")
    if args.num_shards is None:
        share = join.share()
    else:
        share = args.shard_index, args.num_shards
        if not 0 <= share[0] < share[1]:
            raise UserError(f"--shard-index {share[0]} of --num-shards {share[1]}: use 0 to {max(0, share[1] - 1)}")
    if args.overwrite and share[1] > 1:
        raise UserError("--overwrite on several processes would remove each other's work; remove the folder first")
    return {"share": share, "overwrite": args.overwrite}


def _all_done(args: argparse.Namespace, info: dict[str, Any] | None) -> bool:
    """False, with a line that says so, when other processes have not finished their part."""
    if info is None:
        print(f"{args.output}: this process is done; the folder is finished when the others are")
    return info is not None


if __name__ == "__main__":
    cli.run(main)
