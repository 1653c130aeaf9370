"""Turns raw material into what training reads: `python -m greedy_distill_jax.prepare COMMAND --help`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from greedy_distill_jax import cli
from greedy_distill_jax.cli.config_flags import read_config
from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.config import keys as configuration
from greedy_distill_jax.data.sources.clips import Cutting, prepare_clips, read_captions
from greedy_distill_jax.data.sources.latents import prepare_latents
from greedy_distill_jax.data.sources.trajectories import write_trajectories
from greedy_distill_jax.distribution.mesh import join_hosts
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.storage.records import fingerprint
from greedy_distill_jax.text.encoders import WAN_NEGATIVE_PROMPT, read_prompts, write_text_store
from greedy_distill_jax.text.umt5 import TEXT_LEN, UMT5Encoder, encoder_plan
from greedy_distill_jax.weights.pipeline import CODEC, load_codec

_MOST_IN_MEMORY = 128  # prompts; one has 8 MiB of rows at Wan's size


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command.

    Raises:
      UserError: bad input; nothing was written (`cli.run` makes it one line and exit code 2).
    """
    parser = cli.Parser(prog="python -m greedy_distill_jax.prepare", description=__doc__.split(":")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    _add_clips(commands)
    _add_text(commands)
    _add_latents(commands)
    _add_ode(commands)
    args = parser.parse_args(argv)
    args.run(args)


def _add_clips(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "clips",
        help="cut video files into captioned windows",
        description="Cuts video files into windows of frames, writes array_record shards, dataset.json and codec.npz.",
    )
    _add_cutting(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a folder prepared before")
    parser.set_defaults(run=_clips)


def _add_cutting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clips", required=True, metavar="DIR", help="folder of mp4, webm, mov, avi or mkv files")
    parser.add_argument("--captions", required=True, metavar="FILE", help="CSV file with the columns clip,caption")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--size", default="32x32", metavar="WxH", help="pixels, as the codec divides them: multiples of 4 for patches "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--frames", type=int, default=16, help="frames per window (default: %(default)s)")
    parser.add_argument("--fps", type=float, help="resample to this rate (default: each clip's own frames)")
    parser.add_argument("--stride", type=int, help="frames between starts of windows (default: half of --frames)")
    parser.add_argument(
        "--held-out", type=float, default=0.15, help="last part of each clip in time to hold out (default: %(default)s)"
    )
    parser.add_argument(
        "--crops", type=int, default=0, help="further training windows through random crops (default: %(default)s)"
    )


def _size(args: argparse.Namespace) -> tuple[int, int]:
    """(width, height)."""
    match = re.fullmatch(r"(\d+)x(\d+)", args.size)
    if not match:
        raise UserError(f"--size {args.size!r} is not WIDTHxHEIGHT; write it as in 32x32")
    return int(match[1]), int(match[2])


def _clips(args: argparse.Namespace) -> None:
    width, height = _size(args)
    info = prepare_clips(
        args.clips,
        args.captions,
        args.output,
        width=width,
        height=height,
        frames=args.frames,
        fps=args.fps,
        stride=args.stride,
        held_out=args.held_out,
        crops=args.crops,
        overwrite=args.overwrite,
    )
    _note_rates(info)
    counts = info["counts"]
    print(
        f"{args.output}: {counts['train']} training and {counts['held_out']} held-out windows of {info['frames']} "
        f"frames, {info['width']}x{info['height']}, {info['fps']:g} fps, from {len(info['clips'])} clips; "
        f"{len(info['skipped'])} skipped"
    )


def _note_rates(info: dict[str, Any]) -> None:
    rates = sorted({round(clip["fps"], 2) for clip in info["clips"]})
    if len(rates) > 1:
        print(f"note: clips of different rates ({', '.join(map(str, rates))} fps) are mixed; --fps N resamples them.")


def _add_latents(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "latents",
        help="encode clips into latents, and their captions",
        description="Cuts clips as the command clips does and stores the latents of the windows, for "
        "config.data.source=latents:DIR. Goes on where it was killed; a clip that does not decode is named and "
        "skipped.",
    )
    _add_cutting(parser)
    parser.add_argument(
        "--codec", required=True, metavar="PATH", help="codec.npz, a folder that holds one, or a model folder with vae/"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the stored latents")
    parser.add_argument("--group", type=int, default=32, help="clips of a shard (default: %(default)s)")
    parser.add_argument(
        "--text-model", metavar="DIR", help="also encode the captions with this model folder's text encoder, into the "
        "store OUTPUT/text",
    )  # fmt: skip
    _add_negative(parser)
    _add_share(parser)
    parser.set_defaults(run=_latents)


def _latents(args: argparse.Namespace) -> None:
    width, height = _size(args)
    _at_least(args, "group", 1)
    cutting = Cutting(width, height, args.frames, args.fps, args.stride, args.held_out, args.crops)
    with cli.option("--codec", args.codec):
        codec = load_codec(args.codec)
    share, output = _share(args), Path(args.output).expanduser()
    plan, path = _codec_plan(codec)
    with cli.option("--text-model", args.text_model):
        texts = encoder_plan(args.text_model, args.text_len, "stored") if args.text_model else None
    info = prepare_latents(
        args.clips, args.captions, output, cutting, codec, codec_path=path, plan=plan, dtype=args.dtype,
        group=args.group, share=share, overwrite=args.overwrite,
    )  # fmt: skip
    if texts:
        captions = sorted(set(read_captions(args.clips, args.captions).values()))
        stored = write_text_store(
            [*captions, args.negative], output / "text", lambda: UMT5Encoder(args.text_model, text_len=args.text_len),
            plan=texts[0], dtype=texts[1], share=share, overwrite=args.overwrite,
        )  # fmt: skip
        info = info if stored is not None else None
    if _all_done(args, info):
        _note_rates(info)
        counts = info["counts"]
        print(
            f"{args.output}: {counts['train']} training and {counts.get('held_out', 0)} held-out windows, latents "
            f"{'x'.join(map(str, info['latent_shape']))} {args.dtype}, from {len(info['clips'])} clips; "
            f"{len(info['skipped'])} skipped"
        )


def _codec_plan(codec: VideoCodec) -> tuple[dict[str, str], str]:
    """(what latents depend on of a codec, where the prepared folder finds it: a copy, or the model folder)."""
    if isinstance(codec, PatchCodec):
        arrays = (codec.mean, codec.components, np.float32(codec.scale))
        return {"codec": fingerprint(array.tobytes().hex() for array in arrays)}, CODEC
    vae = Path(codec.source) / "vae" if (Path(codec.source) / "vae").is_dir() else Path(codec.source)
    files = sorted(vae.iterdir()) if vae.is_dir() else [vae]
    return {"codec": fingerprint(f"{file.name} {file.stat().st_size}" for file in files)}, codec.source


def _add_ode(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "ode",
        help="follow a teacher's ODE at a student's noise levels",
        description="Stores what a teacher makes of noise, with the states at every noise level of a student, as data "
        "for ODE regression. Goes on where it was killed.",
    )
    teacher = parser.add_mutually_exclusive_group(required=True)
    teacher.add_argument("--teacher", metavar="DIR", help="run directory of a teacher")
    teacher.add_argument("--model", metavar="DIR", help="model folder in the layout of diffusers")
    parser.add_argument(
        "--student", required=True, metavar="CONFIG", help="configuration file of the student, such as "
        "configs/quickstart.py:student; its sample.steps and shift say the noise levels",
    )  # fmt: skip
    parser.add_argument("--prompts", required=True, metavar="FILE", help=".txt or .csv, as for the command text")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--steps", type=int, default=48, help="evaluations of a trajectory (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="default: the teacher run's, with --model 6")
    parser.add_argument("--negative", metavar="TEXT", help="default: the teacher run's, with --model Wan2.1's own")
    parser.add_argument("--text", metavar="DIR", help="text store or model folder that encodes the prompts instead")
    parser.add_argument("--per-prompt", type=int, default=1, help="trajectories of each prompt (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="trajectories followed together (default: %(default)s)")
    parser.add_argument("--group", type=int, default=16, help="trajectories of a shard (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the stored states")
    parser.add_argument("--size", default="832x480", metavar="WxH", help="pixels, with --model (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=81, help="of video, with --model (default: %(default)s)")
    _add_share(parser)
    parser.set_defaults(run=_ode)


def _ode(args: argparse.Namespace) -> None:
    for name in ("steps", "per_prompt", "batch", "group", "frames"):
        _at_least(args, name, 1)
    student = read_config(args.student, "--student")
    if student.stage == "teacher":
        raise UserError(f"--student {args.student} configures a teacher; name the configuration of a student")
    share, prompts = _share(args), read_prompts(args.prompts)
    sigmas = tuple(sorted({sigma for row in configuration.step_plan(student).sigmas for sigma in row}, reverse=True))
    if args.teacher:
        with cli.option("--teacher", args.teacher), cli.option("--text", args.text):
            run = Run.load(args.teacher, text=args.text)
        if run.is_student:
            raise UserError(f"--teacher {args.teacher} holds a student; name the run of a teacher")
        source = f"{Path(args.teacher).name}, trained on {run.meta['data_position']} examples"
    else:
        width, height = _size(args)
        if not args.text and len(prompts) > _MOST_IN_MEMORY:
            raise UserError(
                f"--prompts {args.prompts} holds {len(prompts)} prompts, whose rows do not fit into memory; encode "
                "them with python -m greedy_distill_jax.prepare text, and name the store with --text"
            )
        with cli.option("--model", args.model), cli.option("--text", args.text):
            run = Run.from_model_folder(
                args.model, load_codec(args.model), prompts, height=height, width=width, frames=args.frames,
                negative=WAN_NEGATIVE_PROMPT if args.negative is None else args.negative, text=args.text,
            )  # fmt: skip
        run.config.sample.guidance, source = 6.0, Path(args.model).name
    if args.guidance is not None:
        run.config.sample.guidance = args.guidance
    if args.negative is not None:
        run.config.data.negative_prompt = args.negative
    shift = student.sample.shift
    plan = {
        "teacher": source, "steps": args.steps, "shift": shift, "guidance": run.config.sample.guidance,
        "negative": run.config.data.negative_prompt,
    }  # fmt: skip
    info = write_trajectories(
        prompts, args.output,
        lambda noise, text: run.trajectories(noise, text, sigmas, args.steps, shift), run.encoder,
        sigmas=sigmas, latent_shape=run.latent_shape, plan=plan, per_prompt=args.per_prompt, seed=args.seed,
        batch=args.batch, group=args.group, dtype=args.dtype, share=share, overwrite=args.overwrite,
    )  # fmt: skip
    if _all_done(args, info):
        levels = ", ".join(f"{sigma:.4g}" for sigma in sigmas)
        print(f"{args.output}: {info['counts']['train']} trajectories at noise levels {levels} and 0")


def _add_text(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "text",
        help="encode prompts with Wan's text encoder",
        description="Encodes prompts with the UMT5 of a model folder into a store, which config.data.text names. "
        "Goes on where it was killed.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder with tokenizer/ and text_encoder/")
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help=".txt with a prompt a line, or .csv with a column prompt or "
        "caption",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    _add_negative(parser)
    parser.add_argument(
        "--dtype", default="stored", choices=("stored", "float32", "bfloat16"), help="to compute and store in"
    )
    parser.add_argument("--batch", type=int, default=8, help="prompts encoded together (default: %(default)s)")
    _add_share(parser)
    parser.set_defaults(run=_text)


def _text(args: argparse.Namespace) -> None:
    for name in ("text_len", "batch"):
        _at_least(args, name, 1)
    with cli.option("--model", args.model):
        plan, dtype = encoder_plan(args.model, args.text_len, args.dtype)
    info = write_text_store(
        [*read_prompts(args.prompts), args.negative],
        args.output,
        lambda: UMT5Encoder(args.model, text_len=args.text_len, dtype=args.dtype),
        plan=plan,
        dtype=dtype,
        batch=args.batch,
        share=_share(args),
        overwrite=args.overwrite,
    )
    if _all_done(args, info):
        print(
            f"{args.output}: {len(info['prompts'])} prompts, {info['text_len']} rows of {info['text_dim']} {dtype}, "
            f"cleaned by {plan['cleaning']}"
        )


def _add_negative(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--negative", default=WAN_NEGATIVE_PROMPT, metavar="TEXT",
        help="prompt of the unconditional branch, stored too (default: Wan2.1's own; the empty prompt always is)",
    )  # fmt: skip
    parser.add_argument("--text-len", type=int, default=TEXT_LEN, help="rows of a prompt (default: %(default)s)")


def _add_share(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("work on several processes, and resuming")
    group.add_argument("--shard-index", type=int, help="of this process (default: from jax.distributed, or 0)")
    group.add_argument(
        "--num-shards", type=int, help="processes that share the work (default: jax.distributed's, or 1)"
    )
    group.add_argument("--overwrite", action="store_true", help="start again in a folder prepared before")


def _share(args: argparse.Namespace) -> tuple[int, int]:
    """(index, count) of this process, checked."""
    if (args.shard_index is None) != (args.num_shards is None):
        raise UserError("--shard-index and --num-shards belong together; give both, or neither")
    if args.num_shards is None:
        join_hosts()
        share = (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)
    else:
        share = args.shard_index, args.num_shards
        if not 0 <= share[0] < share[1]:
            raise UserError(f"--shard-index {share[0]} of --num-shards {share[1]}: use 0 to {max(0, share[1] - 1)}")
    if args.overwrite and share[1] > 1:
        raise UserError("--overwrite on several processes would remove each other's work; remove the folder first")
    return share


def _all_done(args: argparse.Namespace, info: dict[str, Any] | None) -> bool:
    """False, with a line that says so, when other processes have not finished their part."""
    if info is None:
        print(f"{args.output}: this process is done; the folder is finished when the others are")
    return info is not None


def _at_least(args: argparse.Namespace, name: str, least: int) -> None:
    if getattr(args, name) < least:
        raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")


if __name__ == "__main__":
    cli.run(main)
