"""Turns raw material into what training reads: `python -m greedy_distill_jax.prepare COMMAND --help`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from greedy_distill_jax import cli
from greedy_distill_jax.types import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command.

    Raises:
      UserError: bad input; nothing was written (`cli.run` makes it one line and exit code 2).
    """
    parser = cli.Parser(prog="python -m greedy_distill_jax.prepare", description=__doc__.split(":")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    _add_clips(commands)
    args = parser.parse_args(argv)
    args.run(args)


def _add_clips(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "clips",
        help="cut video files into captioned windows",
        description="Cuts video files into windows of frames, writes array_record shards, dataset.json and codec.npz.",
    )
    parser.add_argument("--clips", required=True, metavar="DIR", help="folder of mp4, webm, mov, avi or mkv files")
    parser.add_argument("--captions", required=True, metavar="FILE", help="CSV file with the columns clip,caption")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--size", default="32x32", metavar="WxH", help="pixels, multiples of 4 (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=16, help="frames per window (default: %(default)s)")
    parser.add_argument("--fps", type=float, help="resample to this rate (default: each clip's own frames)")
    parser.add_argument("--stride", type=int, help="frames between starts of windows (default: half of --frames)")
    parser.add_argument(
        "--held-out", type=float, default=0.15, help="last part of each clip in time to hold out (default: %(default)s)"
    )
    parser.add_argument(
        "--crops", type=int, default=0, help="further training windows through random crops (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder prepared before")
    parser.set_defaults(run=_clips)


def _clips(args: argparse.Namespace) -> None:
    from greedy_distill_jax.data.clips import prepare_clips

    match = re.fullmatch(r"(\d+)x(\d+)", args.size)
    if not match:
        raise UserError(f"--size {args.size!r} is not WIDTHxHEIGHT; write it as in 32x32")
    info = prepare_clips(
        args.clips,
        args.captions,
        args.output,
        width=int(match[1]),
        height=int(match[2]),
        frames=args.frames,
        fps=args.fps,
        stride=args.stride,
        held_out=args.held_out,
        crops=args.crops,
        overwrite=args.overwrite,
    )
    rates = sorted({round(clip["fps"], 2) for clip in info["clips"]})
    if len(rates) > 1:
        print(f"note: clips of different rates ({', '.join(map(str, rates))} fps) are mixed; --fps N resamples them.")
    counts = info["counts"]
    print(
        f"{args.output}: {counts['train']} training and {counts['held_out']} held-out windows of {info['frames']} "
        f"frames, {info['width']}x{info['height']}, {info['fps']:g} fps, from {len(info['clips'])} clips; "
        f"{len(info['skipped'])} skipped"
    )


if __name__ == "__main__":
    cli.run(main)
