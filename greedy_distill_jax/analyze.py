"""Looks into trained students: `python -m greedy_distill_jax.analyze COMMAND --help`.

    python -m greedy_distill_jax.analyze gradients --checkpoint runs/student --checkpoint runs/causal \
        --output runs/gradients
"""

import argparse
from collections.abc import Sequence
from typing import Annotated

from greedy_distill_jax import cli
from greedy_distill_jax.ranges import Count, Seed, at_least

PLACES = {"directory": "--checkpoint", "output": "--output", "videos": "--videos", "batches": "--batches"}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; UserError for bad input, which `cli.run` makes one line and exit code 2."""
    parser = cli.Parser(prog="python -m greedy_distill_jax.analyze", description=__doc__.split(":")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    told = "the gradient through what a student denoises, and through the context it writes: norms and cosines"
    gradients = commands.add_parser("gradients", help=told, description=told)
    gradients.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        metavar="RUN",
        help="run directory of a student (etm_sdd or causal, any stage); may be repeated to compare several",
    )
    gradients.add_argument(
        "--output", required=True, metavar="DIR", help="folder of gradients.json, gradients.md and gradients.png"
    )
    gradients.add_argument(
        "--videos", type=cli.number(Count), default=64, help="held-out videos, over all batches (default: %(default)s)"
    )
    gradients.add_argument(
        "--batches",
        type=cli.number(Annotated[int, at_least(2)]),  # one has no standard error
        default=8,
        help="gradients that are averaged, each of other videos; errors are over them (default: %(default)s)",
    )
    gradients.add_argument("--seed", type=cli.number(Seed), default=1000, help="of videos and noise")
    gradients.set_defaults(run=_gradients)
    args = parser.parse_args(argv)
    args.run(args)


def _gradients(args: argparse.Namespace) -> None:
    from greedy_distill_jax.eval.gradient_pages import text  # seconds to import: --help is answered at once
    from greedy_distill_jax.eval.gradients import analyze_gradients

    with cli.places(**PLACES):
        options = dict(videos=args.videos, batches=args.batches, seed=args.seed)
        print(text(analyze_gradients(args.checkpoint, args.output, **options)))


if __name__ == "__main__":
    cli.run(main)
