"""Weights in and out. The format of a source is recognised, not asked for.

    python -m greedy_distill_jax.convert import SRC DST
    python -m greedy_distill_jax.convert export SRC DST --format original|diffusers|causal-pt|torch-student
    python -m greedy_distill_jax.convert export SRC DST --format peft|diffusers-lora
    python -m greedy_distill_jax.convert inspect SRC
    python -m greedy_distill_jax.convert verify A B

`import` makes a folder that `train --config.teacher_from=DST` starts a student from and `export` reads; `export` reads
such a folder, a training run (its averaged weights) or any other format, and as an adapter (peft, diffusers-lora) a run
that was trained with LoRA.
"""

import argparse
import functools
import sys

from greedy_distill_jax import cli
from greedy_distill_jax.distribution.mesh import AXES, make_mesh
from greedy_distill_jax.distribution.sharding import shardings
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ranges import Count, Natural, NotNegative, Positive
from greedy_distill_jax.runs.conversion import export_weights, import_weights
from greedy_distill_jax.weights.adapter import ADAPTERS
from greedy_distill_jax.weights.architecture import describe, wan_of
from greedy_distill_jax.weights.inspect import report, title
from greedy_distill_jax.weights.load import DTYPES
from greedy_distill_jax.weights.open import open_source
from greedy_distill_jax.weights.source import Source
from greedy_distill_jax.weights.torch_files import PARTS
from greedy_distill_jax.weights.verify import verdict
from greedy_distill_jax.weights.write import SHARD_BYTES, WRITABLE

_PLACES = {"path": "SRC", "target": "DST", "form": "--format", "shard_bytes": "--shard-gb"}
_OPTIONS = ("part", "step", "heads", "text_len", "dtype", "mesh", "overwrite")


def _places(**more: str):
    return cli.places(**_PLACES | {name: f"--{name.replace('_', '-')}" for name in _OPTIONS} | more)


def _open(args: argparse.Namespace, path: str, place: str = "SRC") -> Source:
    with _places(path=place):
        return open_source(
            path, part=args.part, step=getattr(args, "step", None), heads=args.heads, text_len=args.text_len
        )


def _parse_mesh(value: str) -> dict[str, int]:
    try:
        parts = [(axis, int(size)) for axis, size in (part.split("=") for part in value.split(","))]
    except ValueError as error:
        raise UserError(f"{value!r} is not of the form AXIS=SIZE,..., such as fsdp=8.", "mesh") from error
    named = [axis for axis, _ in parts]
    for axis in named:
        if axis not in AXES:
            raise UserError(f"{axis!r} in {value!r} is not an axis; choose from {', '.join(AXES)}.", "mesh")
        if named.count(axis) > 1:
            raise UserError(f"{value!r} gives {axis} twice; give it once.", "mesh")
    return dict(parts)


def _import(args: argparse.Namespace) -> None:
    source = _open(args, args.src)
    with _places():
        sharding = functools.partial(shardings, mesh=make_mesh(_parse_mesh(args.mesh))) if args.mesh else None
        import_weights(source, args.dst, dtype=args.dtype, sharding=sharding, overwrite=args.overwrite)
    print(f"{args.dst}: {describe(source.cfg)} from {title(source)}")


def _export(args: argparse.Namespace) -> None:
    adapter = args.format in ADAPTERS
    if adapter and args.part == "ema":
        raise UserError(f"--part: an adapter is not averaged, so {args.format} has no part ema; leave it out.")
    source = _open(args, args.src)
    with _places():
        options = {} if adapter else {"shard_bytes": int(args.shard_gb * 10**9)}
        export_weights(source, args.dst, args.format, dtype=args.dtype, overwrite=args.overwrite, **options)
    if adapter:
        print("note: the adapter is of the last update, as --part params is; it is not averaged.", file=sys.stderr)
    elif args.format != "torch-student" and wan_of(source.cfg).prediction != "velocity":
        print(
            f"note: {args.src} predicts x0; programs that expect Wan's velocity need (x - output) / sigma.",
            file=sys.stderr,
        )
    print(f"{args.dst}: {describe(source.cfg)} as {args.format}")


def _inspect(args: argparse.Namespace) -> None:
    for line in report(_open(args, args.src), tensors=args.tensors):
        print(line)


def _verify(args: argparse.Namespace) -> int:
    a, b = _open(args, args.a, "A"), _open(args, args.b, "B")
    same, lines = verdict(a, b, args.atol)
    print("\n".join(lines))
    return 0 if same else 1


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m greedy_distill_jax.convert", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=cli.Parser)

    def add(name, run, help_, *positional):
        command = commands.add_parser(name, help=help_)
        for argument, text in positional:
            command.add_argument(argument, help=text)
        command.add_argument("--part", default="", help=f"of a .pt: {', '.join(PARTS)}; of a run: ema, params")
        command.add_argument("--heads", type=cli.number(Count), help="attention heads, where no config.json says it")
        command.add_argument(
            "--text-len", type=cli.number(Count), help="text rows, where no config.json says it (default: 512)"
        )
        command.set_defaults(run=run)
        return command

    source = ("src", "file or folder: safetensors, .pt, diffusers, an exported student, a run")
    importing = add("import", _import, "make a folder of ours", source, ("dst", "folder to write"))
    importing.add_argument("--mesh", default="", help="where the weights lie meanwhile, such as fsdp=8")
    exporting = add("export", _export, "write another format", source, ("dst", "folder (causal-pt: file) to write"))
    exporting.add_argument("--format", required=True, choices=(*WRITABLE, *ADAPTERS))
    exporting.add_argument(
        "--shard-gb", type=cli.number(Positive), default=SHARD_BYTES / 1e9, help="largest file (default: %(default)g)"
    )
    for command in (importing, exporting):
        command.add_argument("--dtype", default="keep", choices=DTYPES, help="default: as stored")
        command.add_argument("--overwrite", action="store_true", help="replace what is there")
    inspecting = add("inspect", _inspect, "say what it is", source)
    inspecting.add_argument("--tensors", action="store_true", help="list every leaf")
    for command in (exporting, inspecting):
        command.add_argument("--step", type=cli.number(Natural), help="of a training run (default: the newest)")
    verifying = add("verify", _verify, "compare tensor by tensor", ("a", "any source"), ("b", "any source"))
    verifying.add_argument(
        "--atol", type=cli.number(NotNegative), help="allow this difference (default: identical bits and dtypes)"
    )
    return parser


def main(argv: list[str]) -> int | None:
    """Command line."""
    args = _parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    cli.run(main)
