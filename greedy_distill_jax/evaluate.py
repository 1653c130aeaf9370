"""Numbers, pictures and a report of a teacher and the student distilled from it.

python -m greedy_distill_jax.evaluate --teacher runs/teacher --student runs/student --output runs/report
"""

import shlex
import sys
from typing import Any

from greedy_distill_jax import cli
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval.comparison import Held
from greedy_distill_jax.eval.evaluation import evaluate
from greedy_distill_jax.eval.suites import suite_names
from greedy_distill_jax.eval.tables import MODELS, NOT_THERE, is_missing, shown, shown_in
from greedy_distill_jax.ranges import Count, Natural, Seed

PLACES = {
    "teacher": "--teacher",
    "student": "--student",
    "more": "--more",
    "output": "--output",
    "videos": "--videos",
    "suites": "--suite",
    "refresh_history": "--refresh-history",
    "data": "--data",
    "text": "--text",
    "codec": "--codec",
}
RESULTS = {True: "pass", False: "FAIL", None: "not measured"}


def print_table(metrics: dict[str, Any]) -> None:
    """Prints every table and the gates as text."""
    for name, rows in {MODELS: metrics["rows"], **metrics["tables"]}.items():
        first, *others = metrics["columns"][name]
        print(f"  {name}")
        for row in rows:
            cells = [
                f"{column['name']} {shown_in(row, column)} {_unit(row, column)}".rstrip()
                for column in others
                if not is_missing(row[column["name"]])
            ]
            print(f"    {shown(row[first['name']], first['format']):<18} {'  '.join(cells)}")
        if name in metrics["extra"]["notes"]:
            print(f"    ({metrics['extra']['notes'][name]})")
    for gate in metrics["gates"]:
        print(f"  {RESULTS[gate['passed']]}  {gate['name']}: {gate['value']} ({gate['threshold']})")


def _unit(row: dict[str, Any], column: dict[str, Any]) -> str:
    return "" if row[column["name"]] == NOT_THERE else column["unit"]


def further_students(pairs: list[str]) -> dict[str, str]:
    """Returns directories by row of options NAME=DIR; UserError for one that is not, or a row that is named twice."""
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"{pair!r}: give NAME=DIR, such as stage2=runs/stage2.", "more")
    more = dict(pair.split("=", 1) for pair in pairs)
    if len(more) < len(pairs):
        raise UserError(f"a row is named twice: {', '.join(pairs)}.", "more")
    return more


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = cli.Parser(prog="python -m greedy_distill_jax.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="run directory of the teacher, or imported weights")
    parser.add_argument("--student", required=True, help="run directory of the student, or imported weights")
    parser.add_argument(
        "--more",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a further student and the name of its row, such as stage2=runs/stage2; may be repeated",
    )
    parser.add_argument("--output", required=True, help="folder of metrics.json and report.html")
    parser.add_argument("--videos", type=cli.number(Count), default=256, help="held-out videos per model")
    parser.add_argument("--seed", type=cli.number(Seed), default=1000)
    parser.add_argument(
        "--suite",
        action="append",
        help=f"what is measured: {', '.join(suite_names())}, or file.py:NAME; may be repeated (all that apply)",
    )
    parser.add_argument(
        "--refresh-history",
        type=cli.number(Natural),
        nargs="?",
        const=1,
        metavar="KEEP",
        help="also stream every student on real history except for its own last KEEP chunks (1): does a stream drift "
        "because of its cache or of its denoiser?",
    )
    imported = parser.add_argument_group("imported weights (beside a run that was trained they get its data)")
    imported.add_argument("--data", metavar="SOURCE", help="compares on its held-out videos, such as latents:DIR")
    imported.add_argument("--text", metavar="DIR", help="text store or model folder that encodes its captions")
    imported.add_argument("--codec", metavar="PATH", help="decodes: codec.npz, model folder or weights of a VAE")
    args = parser.parse_args(argv)
    with cli.places(**PLACES):
        metrics = evaluate(
            args.teacher,
            args.student,
            args.output,
            more=further_students(args.more),
            videos=args.videos,
            seed=args.seed,
            suites=args.suite,
            refresh_history=args.refresh_history,
            held=Held(args.data, args.text, args.codec),
            commands=[shlex.join(["python", "-m", "greedy_distill_jax.evaluate", *sys.argv[1:]])],
        )
    print_table(metrics)


if __name__ == "__main__":
    cli.run(main)
