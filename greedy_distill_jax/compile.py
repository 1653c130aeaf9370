"""Compiles for devices that are not there.

    python -m greedy_distill_jax.compile train --config=configs/wan1_3b/dmd.py --topology=v5e:4x4
    python -m greedy_distill_jax.compile train --config=configs/wan1_3b/dmd.py --topology=v5p --search
    python -m greedy_distill_jax.compile train --config=configs/wan1_3b/nvidia.py:dmd@h100:8 --topology=h100:8
    python -m greedy_distill_jax.compile sharding --config=configs/wan1_3b/dmd.py --topology=v5e:4x4
    python -m greedy_distill_jax.compile kernels --target v5p
    python -m greedy_distill_jax.compile sweep --target v5p
    python -m greedy_distill_jax.compile vae --target v6e --height 480 --width 832

``train`` compiles every step of a job, and streaming with its student, for a slice of TPUs or the NVIDIA cards of a
host, and says whether they fit; it exits with 3 when one does not. It also prints the bytes of a checkpoint and how
often to save. ``--search`` keeps the global batch and gives every group of devices one video at a time, so that
``config.data.accumulate`` follows from the slice. ``sharding`` prints every leaf with its layout. ``kernels`` compiles
every named workload of the attention op and prints its memory and the useful work per bundle; it exits with 1 when one
does not compile or got worse. ``sweep`` chooses the tuned block sizes. ``vae`` compiles the streaming decoders, Wan's
and the tiny one, in bfloat16 and prints the bytes that one device needs.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from greedy_distill_jax import cli
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ranges import between

# What takes seconds to import is imported inside functions, so that --help and mistakes are answered at once.

JOB_FLAGS = {
    "topology": (
        str,
        None,
        "slice such as v5p:4x4x4, cards such as h200:8; with --search v5p or h200 (required)",
    ),
    "size": (str, "480p", "frames: 480p or 720p"),
}
TRAIN_FLAGS = JOB_FLAGS | {
    "only": (str, "", "only steps whose name contains this: teacher, teacher_forcing, dmd, critic, stream"),
    "search": (bool, False, "find the smallest slice of the generation that fits"),
    "json": (str, "", "write the figures to this file, too"),
    "host-days": (float, None, "days between two faults of one host, for how often to save (default: 264)"),
    "write-rate": (float, None, "GB per second that one host writes of a checkpoint, all its processes (default: 1)"),
    "restart": (float, None, "seconds from a fault to the next new step (default: 300)"),
}
PLACES = {name.replace("-", "_"): f"--{name}" for name in TRAIN_FLAGS}
FAILED, DOES_NOT_FIT = 1, 3
SIDE = Annotated[int, between(1, 2**14)]  # pixels of a video


def _read_job(argv: Sequence[str], flags: dict[str, tuple]) -> tuple[Any, dict[str, Any]]:
    from greedy_distill_jax.cli.config_flags import load_config
    from greedy_distill_jax.config import open_keys, read_settings

    config, values = load_config(argv, flags, open_keys=open_keys())
    if not values["topology"]:
        such = "v5p" if values.get("search") else "v5p:4x4x4"
        raise UserError(f"--topology is missing; name it, such as --topology={such}.")
    return read_settings(config, imagine_runs=True), values


def _check_writable(path: str) -> None:
    """Refuses now, and not after minutes of compiling, if there can be no file ``path``."""
    target, there = Path(path), Path(path).parent.is_dir()
    if path and (target.is_dir() or not there or not os.access(target if target.exists() else target.parent, os.W_OK)):
        raise UserError(f"{path} cannot be written; name a file in a folder that exists", "json")


def _say(line: str) -> None:
    print(line, flush=True)


def train(argv: Sequence[str]) -> int:
    """Compiles the steps of a job; returns the exit code."""
    from greedy_distill_jax.pods.goodput import Faults
    from greedy_distill_jax.pods.report import report
    from greedy_distill_jax.pods.search import search

    settings, flags = _read_job(argv, TRAIN_FLAGS)
    _check_writable(flags["json"])
    given = {name: flags[name.replace("_", "-")] for name in Faults._fields}
    faults = Faults(**{name: value for name, value in given.items() if value is not None}).checked()
    job = settings, flags["topology"], flags["size"], flags["only"], _say, faults
    records = []
    for record in search(*job) if flags["search"] else [report(*job)]:
        records.append(record)
        if flags["json"]:  # what is known stays, whatever the compiler makes of the next slice
            Path(flags["json"]).write_text(json.dumps(records, indent=1) + "\n")
    return 0 if records and records[-1]["fits"] else DOES_NOT_FIT


def sharding(argv: Sequence[str]) -> int:
    """Prints every leaf of a job, its layout and its bytes on one device."""
    from greedy_distill_jax.pods import jobs, topologies
    from greedy_distill_jax.pods.layout import layout_lines

    settings, flags = _read_job(argv, JOB_FLAGS)
    job = jobs.build_job(settings, topologies.devices(flags["topology"]), flags["size"])
    for line in layout_lines(job, flags["topology"]):
        print(line)
    return 0


def main(argv: Sequence[str]) -> int:
    """Command line."""
    jobs = {"train": train, "sharding": sharding}
    if argv and argv[0] in jobs:  # these read a configuration file and its overrides
        with cli.places(**PLACES):
            return jobs[argv[0]](argv[1:])
    from greedy_distill_jax.ops.attention.aot import CARDS, TOPOLOGIES
    from greedy_distill_jax.pods.compile_decoders import DECODERS, compile_decoders
    from greedy_distill_jax.pods.compile_kernels import compile_kernels, sweep_blocks

    parser = cli.Parser(prog="python -m greedy_distill_jax.compile", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("train", "compile the steps of a job"), ("sharding", "print the layout of a job")):
        commands.add_parser(name, help=text, description=text)
    for name, text in (
        ("kernels", "compile every workload"),
        ("sweep", "choose the tuned block sizes"),
        ("vae", "compile the streaming decoders"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        targets, usual = list(TOPOLOGIES), "default: all"
        if name == "kernels":
            targets, usual = [*targets, *CARDS], f"default: {', '.join(TOPOLOGIES)}"
        command.add_argument("--target", action="append", choices=targets, help=f"{usual}; may repeat")
        if name == "kernels":
            command.add_argument("--only", default="", help="only workloads whose name contains this")
            command.add_argument("--no-bundles", action="store_true", help="do not count bundles (faster)")
        if name == "vae":
            command.add_argument("--decoder", action="append", choices=DECODERS, help="default: both")
            command.add_argument("--height", type=cli.number(SIDE), default=480, help="of the video, in pixels")
            command.add_argument("--width", type=cli.number(SIDE), default=832, help="of the video, in pixels")
    args = parser.parse_args(argv)
    targets, failures = args.target or list(TOPOLOGIES), []
    if args.command == "sweep":
        sweep_blocks(targets, _say)
    elif args.command == "kernels":
        with cli.places(**PLACES):
            failures = compile_kernels(targets, args.only, not args.no_bundles, _say)
    else:
        failures = compile_decoders(targets, args.decoder or DECODERS, args.height, args.width, _say)
    for failure in failures:
        print(f"failed: {failure}")
    return FAILED if failures else 0


if __name__ == "__main__":
    cli.run(main)
