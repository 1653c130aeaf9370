"""Weights in and out. The format of a source is recognised, not asked for.

    python -m greedy_distill_jax.convert import SRC DST
    python -m greedy_distill_jax.convert export SRC DST --format original|diffusers|causal-pt|torch-student
    python -m greedy_distill_jax.convert inspect SRC
    python -m greedy_distill_jax.convert verify A B

`import` makes a folder that `train --config.teacher_from=DST` starts a student from and `export` reads; `export` reads
such a folder, a training run (its averaged weights) or any other format.
"""

import argparse
import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from greedy_distill_jax import cli
from greedy_distill_jax.config import base, read_settings
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.distribution.sharding import shardings
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students.config import StudentConfig
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.runs.run import architecture
from greedy_distill_jax.storage.checkpoint import Checkpointer
from greedy_distill_jax.weights.architecture import describe, wan_of
from greedy_distill_jax.weights.inspect import report, title
from greedy_distill_jax.weights.load import DTYPES, load
from greedy_distill_jax.weights.open import open_source
from greedy_distill_jax.weights.pipeline import saved_codec
from greedy_distill_jax.weights.replacing import replacing
from greedy_distill_jax.weights.source import Source
from greedy_distill_jax.weights.torch_files import PARTS
from greedy_distill_jax.weights.verify import verdict
from greedy_distill_jax.weights.write import SHARD_BYTES, WRITABLE, write

WAN_LATENT = (21, 60, 104)  # frames, rows and columns of 81 frames of 480 x 832 pixels


def import_weights(
    source: Source, target: str | Path, *, dtype: str = "keep", sharding: Any = None, overwrite: bool = False
) -> None:
    """Writes a source as a folder of ours: `checkpoints/0` with one network, and the JSON a run would have.

    Args:
      source: from `export.source.open_source`.
      target: the folder.
      dtype: "keep" or a name of `export.load.DTYPES`.
      sharding: as for `export.load.load`; decides where the weights lie while they are written.
      overwrite: replace the target.

    Raises:
      UserError: a source that is ours already, a tensor that cannot be read, a place that cannot be written.
    """
    if source.format == "ours":
        raise UserError(f"{source.path} is in our format already; use it as it is.")
    with replacing(target, overwrite=overwrite) as partial:
        params = load(source, sharding=sharding, dtype=dtype)
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
        limit = largest + 2**20  # writing one leaf at a time keeps the promise of streaming
        with Checkpointer(partial / "checkpoints", async_save=False, write_bytes=limit) as checkpointer:
            meta = _meta(source)
            checkpointer.save(0, {"nets": {meta["network"]: {"ema": params}}}, meta)
        if codec := saved_codec(source.path):
            shutil.copyfile(codec, partial / codec.name)


def _meta(source: Source) -> dict[str, Any]:
    """What a run writes beside its weights, for weights that no run of ours made."""
    cfg, wan, config = source.cfg, wan_of(source.cfg), base()
    sizes = {k: v for k, v in dataclasses.asdict(wan).items() if k in ("dim", "ffn_dim", "num_heads", "num_layers")}
    config.model.size = next((n for n, size in WAN_SIZES.items() if size.items() >= sizes.items()), "wan1_3b")
    for field in dataclasses.fields(WanConfig):
        config.model[field.name] = getattr(wan, field.name)
    latent_shape = source.meta.get("latent_shape") or (*WAN_LATENT, wan.channels)
    config.data.frames = latent_shape[0]
    if isinstance(cfg, StudentConfig):
        config.stage = "teacher_forcing"
        config.student.split = "/".join(",".join(map(str, layers)) for layers in (cfg.etm_layers, cfg.sdd_layers))
        for name in config.student:
            if hasattr(cfg, name):
                config.student[name] = getattr(cfg, name)
        if plan := source.meta.get("plan"):
            config.sample.update(_sample_keys({"shift": config.sample.shift, **plan}))
    model = Student(cfg) if isinstance(cfg, StudentConfig) else Teacher(cfg)
    return dict(
        stage=config.stage, network="student" if isinstance(cfg, StudentConfig) else "teacher", data_position=0,
        config=config.to_json_best_effort(), architecture=architecture(model),
        latent_shape=list(latent_shape), steps=0,
        source=dict(format=source.format, name=source.path.name, part=source.meta.get("part", "")),
    )  # fmt: skip


def export_weights(source: Source, target: str | Path, form: str, **options: Any) -> None:
    """`export.write.write`, with the step plan and the codec of the run a student comes from.

    Raises:
      UserError: as there.
    """
    extra = {}
    if form == "torch-student" and source.format == "ours":
        extra = dict(student=_plan(source), codec=saved_codec(source.path))
    write(source, target, form, **extra, **options)


def _plan(source: Source) -> dict[str, Any]:
    """What config.json of an exported student says besides the architecture: its step plan and its latents' shape."""
    stored = json.loads(source.meta["config"])
    config = base()
    config.stage = "teacher_forcing"  # a student's samplers
    config.sample.update(stored["sample"])
    plan = dataclasses.asdict(read_settings(config).plan) | {"shift": config.sample.shift}
    return {"plan": plan, "latent_shape": list(source.meta["latent_shape"])}


def _sample_keys(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Values of ``config.sample`` that say the plan of an exported student; ``shift`` spaces other numbers of steps."""
    shift, context = plan["shift"], plan["context_sigmas"]
    steps = StepPlan.parse(plan["sigmas"], shift=shift, sampler=plan["sampler"], context_sigma=context)
    return {"shift": shift, **steps.values(shift)}


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
        return {axis: int(size) for axis, size in (part.split("=") for part in value.split(","))}
    except ValueError as error:
        raise UserError(f"{value!r} is not of the form AXIS=SIZE,..., such as fsdp=8.", "mesh") from error


def _import(args: argparse.Namespace) -> None:
    source = _open(args, args.src)
    with _places():
        sharding = functools.partial(shardings, mesh=make_mesh(_parse_mesh(args.mesh))) if args.mesh else None
        import_weights(source, args.dst, dtype=args.dtype, sharding=sharding, overwrite=args.overwrite)
    print(f"{args.dst}: {describe(source.cfg)} from {title(source)}")


def _export(args: argparse.Namespace) -> None:
    source = _open(args, args.src)
    with _places():
        options = dict(dtype=args.dtype, shard_bytes=int(args.shard_gb * 10**9), overwrite=args.overwrite)
        export_weights(source, args.dst, args.format, **options)
    if args.format != "torch-student" and wan_of(source.cfg).prediction != "velocity":
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
        command.add_argument("--heads", type=int, help="attention heads, where no config.json says it")
        command.add_argument("--text-len", type=int, help="text rows, where no config.json says it (default: 512)")
        command.set_defaults(run=run)
        return command

    source = ("src", "file or folder: safetensors, .pt, diffusers, an exported student, a run")
    importing = add("import", _import, "make a folder of ours", source, ("dst", "folder to write"))
    importing.add_argument("--mesh", default="", help="where the weights lie meanwhile, such as fsdp=8")
    exporting = add("export", _export, "write another format", source, ("dst", "folder (causal-pt: file) to write"))
    exporting.add_argument("--format", required=True, choices=WRITABLE)
    exporting.add_argument(
        "--shard-gb", type=float, default=SHARD_BYTES / 1e9, help="largest file (default: %(default)g)"
    )
    for command in (importing, exporting):
        command.add_argument("--dtype", default="keep", choices=DTYPES, help="default: as stored")
        command.add_argument("--overwrite", action="store_true", help="replace what is there")
    inspecting = add("inspect", _inspect, "say what it is", source)
    inspecting.add_argument("--tensors", action="store_true", help="list every leaf")
    for command in (exporting, inspecting):
        command.add_argument("--step", type=int, help="of a training run (default: the newest)")
    verifying = add("verify", _verify, "compare tensor by tensor", ("a", "any source"), ("b", "any source"))
    verifying.add_argument("--atol", type=float, help="allow this difference (default: identical bits and dtypes)")
    return parser


def main(argv: list[str]) -> int | None:
    """Command line."""
    args = _parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    cli.run(main)
