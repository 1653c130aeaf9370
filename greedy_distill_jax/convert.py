"""Weights in and out. The format of a source is recognised, not asked for.

    python -m greedy_distill_jax.convert import SRC DST [--lora FILE:0.8]
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
from greedy_distill_jax.cli import convert_options as options
from greedy_distill_jax.distribution.mesh import AXES, make_mesh
from greedy_distill_jax.distribution.sharding import shardings
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.runs.conversion import export_weights, import_weights
from greedy_distill_jax.weights.adapter import ADAPTERS
from greedy_distill_jax.weights.architecture import describe, wan_of
from greedy_distill_jax.weights.files import PARTS
from greedy_distill_jax.weights.inspect import besides, kind_of, report, title
from greedy_distill_jax.weights.kind import KINDS, Asked
from greedy_distill_jax.weights.load import DTYPES
from greedy_distill_jax.weights.lora import Adapter, MergedSource, open_adapter, parse_lora
from greedy_distill_jax.weights.open import open_source
from greedy_distill_jax.weights.source import Source
from greedy_distill_jax.weights.verify import verdict
from greedy_distill_jax.weights.write import SHARD_BYTES, WRITABLE


def _places(**more: str):
    return cli.places(**options.PLACES | more)


def _open(args: argparse.Namespace, path: str, place: str = "SRC") -> Source:
    with _places(path=place):
        given = {name: getattr(args, name, None) for name in ("kind", "chunk", "window", "sink")}
        asked = Asked(**given | {"kind": given["kind"] or ""})
        more = dict(step=getattr(args, "step", None), heads=args.heads, text_len=args.text_len)
        return open_source(path, part=args.part, asked=asked, **more)


def _import(args: argparse.Namespace) -> None:
    source = _open(args, args.src)
    with _places(path="--lora", part="--lora FILE#PART"):
        adapters = [(Adapter(file, part), scale) for file, part, scale in map(parse_lora, args.lora)]
        source = MergedSource(source, adapters) if adapters else source
    with _places():
        mesh = make_mesh(options.parse_mesh(args.mesh, AXES)) if args.mesh else None
        sharding = functools.partial(shardings, mesh=mesh) if mesh else None
        more = dict(allow_nonfinite=args.allow_nonfinite, overwrite=args.overwrite)
        import_weights(source, args.dst, dtype=args.dtype, sharding=sharding, **more)
    for merged in source.merged if adapters else ():
        print(merged)
    if more := besides(source):
        print(f"note: {args.src} also holds {more}, which are no part of the model.", file=sys.stderr)
    if precision := source.meta.get("precision"):
        print(f"precision: {precision}")
    if told := source.meta.get("told"):
        print(f"kind: {kind_of(source)} ({told}; --kind chooses)")
    print(f"{args.dst}: {describe(source.cfg)} from {title(source)}")


def _export(args: argparse.Namespace) -> None:
    adapter = args.format in ADAPTERS
    if adapter and args.part == "ema":
        raise UserError(f"--part: an adapter is not averaged, so {args.format} has no part ema; leave it out.")
    source = _open(args, args.src)
    with _places():
        size = {} if adapter else {"shard_bytes": int(args.shard_gb * 10**9)}
        export_weights(source, args.dst, args.format, dtype=args.dtype, overwrite=args.overwrite, **size)
    if adapter:
        print("note: the adapter is of the last update, as --part params is; it is not averaged.", file=sys.stderr)
    elif args.format != "torch-student" and wan_of(source.cfg).prediction != "velocity":
        print(
            f"note: {args.src} predicts x0; programs that expect Wan's velocity need (x - output) / sigma.",
            file=sys.stderr,
        )
    print(f"{args.dst}: {describe(source.cfg)} as {args.format}")


def _inspect(args: argparse.Namespace) -> None:
    with _places(lora="SRC"):
        adapter = open_adapter(args.src, args.part)
    for line in adapter.report() if adapter else report(_open(args, args.src), tensors=args.tensors):
        print(line)


def _verify(args: argparse.Namespace) -> int:
    a, b = _open(args, args.a, "A"), _open(args, args.b, "B")
    same, lines = verdict(a, b, args.atol)
    print("\n".join(lines))
    return 0 if same else 1


COMMANDS = {"import": _import, "export": _export, "inspect": _inspect, "verify": _verify}


def _parser() -> cli.Parser:
    choices = dict(parts=PARTS, kinds=KINDS, dtypes=DTYPES, formats=(*WRITABLE, *ADAPTERS), shard_gb=SHARD_BYTES / 1e9)
    return options.parser(__doc__.split("\n\n")[0], COMMANDS, **choices)


def main(argv: list[str]) -> int | None:
    """Command line."""
    args = _parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    cli.run(main)
