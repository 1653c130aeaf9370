"""Options of the command convert, and which argument of the library each one gives."""

import argparse
from collections.abc import Callable, Mapping, Sequence

from greedy_distill_jax.cli import Parser, number
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ranges import Count, Natural, NotNegative, Positive

# Argument of the library -> option, for `cli.places`.
PLACES = {"path": "SRC", "target": "DST", "form": "--format", "shard_bytes": "--shard-gb"}
PLACES |= {
    name: f"--{name.replace('_', '-')}"
    for name in (
        *("part", "step", "heads", "text_len", "kind", "chunk", "window", "sink"),
        *("dtype", "mesh", "overwrite", "lora", "allow_nonfinite"),
    )
}


def parse_mesh(value: str, axes: Sequence[str]) -> dict[str, int]:
    """Reads "fsdp=4,tensor=2"; UserError (field "mesh") for another form, an unknown axis, or one given twice."""
    try:
        parts = [(axis, int(size)) for axis, size in (part.split("=") for part in value.split(","))]
    except ValueError as error:
        raise UserError(f"{value!r} is not of the form AXIS=SIZE,..., such as fsdp=8.", "mesh") from error
    named = [axis for axis, _ in parts]
    for axis in named:
        if axis not in axes:
            raise UserError(f"{axis!r} in {value!r} is not an axis; choose from {', '.join(axes)}.", "mesh")
        if named.count(axis) > 1:
            raise UserError(f"{value!r} gives {axis} twice; give it once.", "mesh")
    return dict(parts)


def parser(
    description: str,
    run: Mapping[str, Callable],
    *,
    parts: Sequence[str],
    kinds: Sequence[str],
    dtypes: Sequence[str],
    formats: Sequence[str],
    shard_gb: float,
) -> Parser:
    """Returns the parser of the command.

    Args:
      description: of the command.
      run: name of each of its commands -> the function of its arguments, which stands in the result as ``run``.
      parts: of a `.pt`, in the order in which one is chosen.
      kinds, dtypes, formats: to choose from.
      shard_gb: default of the option.
    """
    out = Parser(prog="python -m greedy_distill_jax.convert", description=description)
    commands = out.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, help_: str, *positional: tuple[str, str]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_)
        for argument, text in positional:
            command.add_argument(argument, help=text)
        some = f"of a .pt: any dictionary in it (default: the first of {', '.join(parts)}, or the only one)"
        command.add_argument("--part", default="", help=f"{some}; of a run: ema, params")
        command.add_argument("--heads", type=number(Count), help="attention heads, where no config.json says it")
        command.add_argument(
            "--text-len", type=number(Count), help="text rows, where no config.json says it (default: 512)"
        )
        command.set_defaults(run=run[name])
        return command

    source = ("src", "file or folder: safetensors, .pt, diffusers, an exported student, a run")
    looking = ("src", f"{source[1]}, LoRA weights")
    importing = add("import", "make a folder of ours", source, ("dst", "folder to write"))
    importing.add_argument("--mesh", default="", help="where the weights lie meanwhile, such as fsdp=8")
    merging = "LoRA weights to merge, scale times, of a .pt those in a dictionary; may be given several times"
    importing.add_argument("--lora", action="append", default=[], metavar="FILE[#PART][:SCALE]", help=merging)
    importing.add_argument("--allow-nonfinite", action="store_true", help="take NaN and infinite weights as they are")
    exporting = add("export", "write another format", source, ("dst", "folder (causal-pt: file) to write"))
    exporting.add_argument("--format", required=True, choices=tuple(formats))
    exporting.add_argument(
        "--shard-gb", type=number(Positive), default=shard_gb, help="largest file (default: %(default)g)"
    )
    for command in (importing, exporting):
        command.add_argument("--dtype", default="keep", choices=dtypes, help="default: as stored")
        command.add_argument("--overwrite", action="store_true", help="replace what is there")
    inspecting = add("inspect", "say what it is", looking)
    inspecting.add_argument("--tensors", action="store_true", help="list every leaf")
    for command in (exporting, inspecting):
        command.add_argument("--step", type=number(Natural), help="of a training run (default: the newest)")
    for command in (importing, exporting, inspecting):
        told = "of a Wan DiT, where the file cannot tell (default: what is printed)"
        command.add_argument("--kind", default="", choices=kinds, help=told)
        some = "latent frames of a causal student"
        command.add_argument("--chunk", type=number(Count), help=f"{some} made together (config.json's, or 3)")
        command.add_argument(
            "--window", type=number(Natural), help=f"{some} that a chunk sees, 0 = all of 21 (config.json's, or 0)"
        )
        command.add_argument("--sink", type=number(Natural), help=f"first {some} always seen (config.json's, or 0)")
    verifying = add("verify", "compare tensor by tensor", ("a", "any source"), ("b", "any source"))
    verifying.add_argument(
        "--atol", type=number(NotNegative), help="allow this difference (default: identical bits and dtypes)"
    )
    return out
