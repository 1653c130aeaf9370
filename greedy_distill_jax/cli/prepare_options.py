"""The options of `prepare`, whose commands share many of them, and which argument of the library each one gives."""

import argparse
import re

from greedy_distill_jax.cli import number, text
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ranges import Count, FrameRate, Momentum, Natural, NotNegative, Seed, Steps

# Argument of the library -> option, for `cli.places`.
CUTTING = {
    "clips": "--clips",
    "captions": "--captions",
    "directory": "--output",
    "width": "--size",
    "height": "--size",
    "frames": "--frames",
    "fps": "--fps",
    "stride": "--stride",
    "held_out": "--held-out",
    "crops": "--crops",
    "group": "--group",
}
TEXT = {
    "folder": "--model",
    "prompts": "--prompts",
    "directory": "--output",
    "text_len": "--text-len",
    "batch": "--batch",
    "dtype": "--dtype",
}
ODE_ARGUMENTS = (
    *("teacher", "model", "text", "steps", "guidance", "negative"),
    *("per_prompt", "batch", "group", "seed", "dtype", "frames"),
)
ODE = {
    **{name: f"--{name.replace('_', '-')}" for name in ODE_ARGUMENTS},
    **{"prompts": "--prompts", "directory": "--output", "sigmas": "--student", "width": "--size", "height": "--size"},
}
_DTYPES = ("float32", "bfloat16")


def add_clips(parser: argparse.ArgumentParser, **_: object) -> None:
    """Adds what says how clips become windows."""
    parser.description = (
        "Cuts video files into windows of frames, writes array_record shards, dataset.json and codec.npz. Goes on "
        "where it was killed; a clip that cannot be read whole and as it looks is named and skipped."
    )
    parser.add_argument("--clips", required=True, metavar="DIR", help="folder of mp4, webm, mov, avi or mkv files")
    parser.add_argument("--captions", required=True, metavar="FILE", help="CSV file with the columns clip,caption")
    _add_output(parser)
    parser.add_argument(
        "--size",
        default="32x32",
        metavar="WxH",
        help="pixels, as the codec divides them: multiples of 4 for patches (default: %(default)s)",
    )
    parser.add_argument("--frames", type=number(Count), default=16, help="frames per window (default: %(default)s)")
    parser.add_argument(
        "--fps", type=number(FrameRate), help="resample to this rate (default: the one that all clips have)"
    )
    parser.add_argument(
        "--stride", type=number(Count), help="frames between starts of windows (default: half of --frames)"
    )
    parser.add_argument(
        "--held-out",
        type=number(Momentum),
        default=0.15,
        help="last part of each clip in time to hold out (default: %(default)s)",
    )
    parser.add_argument(
        "--crops",
        type=number(Natural),
        default=0,
        help="further training windows through random crops (default: %(default)s)",
    )
    parser.add_argument("--group", type=number(Count), default=32, help="clips of a shard (default: %(default)s)")


def add_latents(parser: argparse.ArgumentParser, *, negative: str, text_len: int) -> None:
    """Adds what says how clips become latents, and their captions rows."""
    add_clips(parser)
    parser.description = (
        "Cuts clips as the command clips does and stores the latents of the windows, for "
        "config.data.source=latents:DIR. Goes on where it was killed; a clip that cannot be read whole and as it looks "
        "is named and skipped."
    )
    parser.add_argument(
        "--codec", required=True, metavar="PATH", help="codec.npz, a folder that holds one, or a model folder with vae/"
    )
    parser.add_argument("--dtype", default="float32", choices=_DTYPES, help="of the stored latents")
    parser.add_argument(
        "--text-model",
        metavar="DIR",
        help="also encode the captions with this model folder's text encoder, into the store OUTPUT/text",
    )
    _add_rows(parser, negative, text_len)


def add_text(parser: argparse.ArgumentParser, *, negative: str, text_len: int) -> None:
    """Adds what says how prompts become rows."""
    parser.description = (
        "Encodes prompts with the UMT5 of a model folder into a store, which config.data.text names. Goes on where it "
        "was killed."
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder with tokenizer/ and text_encoder/")
    _add_prompts(parser)
    _add_output(parser)
    _add_rows(parser, negative, text_len)
    parser.add_argument("--dtype", default="stored", choices=("stored", *_DTYPES), help="to compute and store in")
    parser.add_argument(
        "--batch", type=number(Count), default=8, help="prompts encoded together (default: %(default)s)"
    )


def add_ode(parser: argparse.ArgumentParser, **_: object) -> None:
    """Adds what says whose ODE is followed, and where."""
    parser.description = (
        "Stores what a teacher makes of noise, with the states at every noise level of a student, as data for ODE "
        "regression, config.data.source=ode:DIR. Goes on where it was killed."
    )
    teacher = parser.add_mutually_exclusive_group(required=True)
    teacher.add_argument("--teacher", metavar="DIR", help="run directory of a teacher")
    teacher.add_argument("--model", metavar="DIR", help="model folder in the layout of diffusers")
    parser.add_argument(
        "--student",
        required=True,
        metavar="CONFIG",
        help="configuration file of the student, such as configs/quickstart.py:student; its steps say the noise levels",
    )
    _add_prompts(parser)
    _add_output(parser)
    parser.add_argument(
        "--steps", type=number(Steps), default=48, help="evaluations of a trajectory (default: %(default)s)"
    )
    parser.add_argument("--guidance", type=number(NotNegative), help="default: the teacher run's, with --model 6")
    parser.add_argument(
        "--negative", type=text, metavar="TEXT", help="default: the teacher run's, with --model Wan2.1's own"
    )
    parser.add_argument("--text", metavar="DIR", help="text store or model folder that encodes the prompts instead")
    parser.add_argument(
        "--per-prompt", type=number(Count), default=1, help="trajectories of each prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=number(Count), default=1, help="trajectories followed together (default: %(default)s)"
    )
    parser.add_argument(
        "--group", type=number(Count), default=16, help="trajectories of a shard (default: %(default)s)"
    )
    parser.add_argument("--seed", type=number(Seed), default=0)
    parser.add_argument("--dtype", default="float32", choices=_DTYPES, help="of the stored states")
    parser.add_argument("--size", default="832x480", metavar="WxH", help="pixels, with --model (default: %(default)s)")
    parser.add_argument(
        "--frames", type=number(Count), default=81, help="of video, with --model (default: %(default)s)"
    )


def add_share(parser: argparse.ArgumentParser) -> None:
    """Adds what says which part of a job a process does, and whether it starts again."""
    group = parser.add_argument_group("work on several processes, and resuming")
    group.add_argument(
        "--shard-index", type=number(Natural), help="of this process (default: from jax.distributed, or 0)"
    )
    group.add_argument(
        "--num-shards", type=number(Count), help="processes that share the work (default: jax.distributed's, or 1)"
    )
    group.add_argument("--overwrite", action="store_true", help="start again in a folder prepared before")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help=".txt with a prompt a line, or .csv with a column prompt or caption",
    )


def _add_rows(parser: argparse.ArgumentParser, negative: str, text_len: int) -> None:
    parser.add_argument(
        "--negative",
        type=text,
        default=negative,
        metavar="TEXT",
        help="prompt of the unconditional branch, stored too (default: Wan2.1's own; the empty prompt always is)",
    )
    parser.add_argument(
        "--text-len", type=number(Count), default=text_len, help="rows of a prompt (default: %(default)s)"
    )


def parse_size(value: str) -> tuple[int, int]:
    """Returns (width, height) of WIDTHxHEIGHT; UserError for anything else."""
    match = re.fullmatch(r"(\d+)x(\d+)", value)
    if not match:
        raise UserError(f"{value!r} is not WIDTHxHEIGHT; write it as in 32x32", field="width")
    return int(match[1]), int(match[2])
