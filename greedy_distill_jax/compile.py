"""Compiles for devices that are not there.

    python -m greedy_distill_jax.compile train --config=configs/wan1_3b/dmd.py --topology=v5e:4x4
    python -m greedy_distill_jax.compile train --config=configs/wan1_3b/dmd.py --topology=v5p --search
    python -m greedy_distill_jax.compile sharding --config=configs/wan1_3b/dmd.py --topology=v5e:4x4
    python -m greedy_distill_jax.compile kernels --target v5p
    python -m greedy_distill_jax.compile sweep --target v5p
    python -m greedy_distill_jax.compile vae --target v6e --height 480 --width 832

``train`` compiles every step of a job, and streaming with its student, and says whether they fit; it exits with 3 when
one does not. ``--search`` keeps the global batch and gives every group of devices one video at a time, so that
``config.data.accumulate`` follows from the slice. ``sharding`` prints every leaf with its layout. ``kernels`` compiles
every named workload of the attention op and prints its memory and the useful work per bundle; it exits with 1 when one
does not compile or got worse. ``sweep`` chooses the tuned block sizes. ``vae`` compiles the streaming decoders, Wan's
and the tiny one, in bfloat16 and prints the bytes that one device needs.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from greedy_distill_jax import cli


def kernels(targets: Sequence[str], only: str, bundles: bool) -> int:
    """Compiles the workloads whose name contains ``only``; returns the exit code."""
    from greedy_distill_jax.ops.attention import aot, sweep
    from greedy_distill_jax.pods.kernels import SPECS

    failures = []
    with aot.bundle_dump() if bundles else contextlib.nullcontext() as dump:
        for target in targets:
            mesh = aot.target_mesh(target)
            print(f"{target}, libtpu {aot.libtpu_version()}")
            for name, spec in SPECS.items():
                if only not in name:
                    continue
                try:
                    done = aot.compile_spec(spec, mesh, dump=dump)
                except Exception as error:  # whatever the compiler says is the answer; the rest is still compiled
                    print(f"  {name:28s} FAILED: {str(error).splitlines()[0][:160]}", flush=True)
                    failures.append(f"{target} {name}")
                    continue
                memory = "  ".join(f"{part} {size / 2**20:.0f} MiB" for part, size in done["memory"].items())
                work = "  ".join(f"{k} {v}" for k, v in done.get("kflop_per_bundle", {}).items())
                print(f"  {name:28s} {memory}" + (f"  kFLOP per bundle: {work}" if work else ""), flush=True)
            if bundles:
                failures += sweep.regressions(target, dump, report=lambda line: print(f"  {line}"))
    for failure in failures:
        print(f"failed: {failure}")
    return 1 if failures else 0


JOB_FLAGS = {
    "topology": (str, None, "slice such as v5p:4x4x4; a generation such as v5p with --search (required)"),
    "size": (str, "480p", "frames: 480p or 720p"),
}
TRAIN_FLAGS = JOB_FLAGS | {
    "only": (str, "", "only steps whose name contains this: teacher, teacher_forcing, dmd, critic, stream"),
    "search": (bool, False, "find the smallest slice of the generation that fits"),
    "json": (str, "", "write the figures to this file, too"),
}
DOES_NOT_FIT = 3


def _read_job(argv: Sequence[str], flags):
    from greedy_distill_jax.cli.config_flags import load_config
    from greedy_distill_jax.errors import UserError
    from greedy_distill_jax.pods import jobs

    config, values = load_config(argv, flags)
    if not values["topology"]:
        such = "v5p" if values.get("search") else "v5p:4x4x4"
        raise UserError(f"--topology is missing; name it, such as --topology={such}.")
    if values["size"] not in jobs.GRID:
        raise UserError(f"--size is {values['size']!r}; choose from {', '.join(jobs.GRID)}.")
    _check_writable(values.get("json", ""))
    return jobs.imaginary_runs(config), values


def _check_writable(path: str) -> None:
    """Raises UserError now, and not after minutes of compiling, if there can be no file ``path``."""
    from greedy_distill_jax.errors import UserError

    target = Path(path)
    if path and (target.is_dir() or not os.access(target if target.exists() else target.parent, os.W_OK)):
        raise UserError(f"--json: {path} cannot be written; name a file in a folder that exists.")


def train(argv: Sequence[str]) -> int:
    """Compiles the steps of a job; returns the exit code."""
    from greedy_distill_jax.pods import report

    config, flags = _read_job(argv, TRAIN_FLAGS)
    records = []
    if flags["search"]:
        found = _search(config, flags)
    else:
        found = [report.report(config, flags["topology"], flags["size"], flags["only"], _say)]
    for record in found:
        records.append(record)
        if flags["json"]:  # what is known stays, whatever the compiler makes of the next slice
            Path(flags["json"]).write_text(json.dumps(records, indent=1) + "\n")
    return 0 if records and records[-1]["fits"] else DOES_NOT_FIT


def _say(line: str) -> None:
    print(line, flush=True)


def _search(config, flags) -> Iterator[dict]:
    """Records of the slices of a generation, the smallest first, up to the first that fits."""
    from greedy_distill_jax.errors import UserError
    from greedy_distill_jax.pods import jobs, report, topologies

    generation = flags["topology"]
    if generation not in topologies.CHIPS:
        raise UserError(
            f"--topology is {generation!r}; --search takes a generation without a size: {', '.join(topologies.CHIPS)}."
        )
    jobs.build_networks(config, flags["size"], flags["only"])  # what no slice could mend is said once
    _say(f"global batch {config.data.batch}, on every slice one video at a time per group of devices")
    for size in topologies.CHIPS[generation].slices:
        name = f"{generation}:{size}"
        try:
            record = report.report(config, name, flags["size"], flags["only"], _say, search=True)
        except jobs.Misfit as error:
            _say(f"{name}: {error}")
            continue
        yield record
        if record["fits"]:
            _say(
                f"smallest slice of {generation} that fits: {name}, with "
                f"--config.data.accumulate={record['facts']['accumulate']}"
            )
            return
    _say(f"none of these slices of {generation} fits")


def sharding(argv: Sequence[str]) -> int:
    """Prints every leaf of a job, its layout and its bytes on one device."""
    from greedy_distill_jax.distribution.sharding import leaf_paths
    from greedy_distill_jax.pods import jobs, topologies

    config, flags = _read_job(argv, JOB_FLAGS)
    job = jobs.build_job(config, topologies.devices(flags["topology"]), flags["size"])
    print(f"{flags['topology']}: {job.mesh.size} chips, mesh {dict(job.mesh.shape)}")
    for tree, (shapes, layout) in job.trees.items():
        leaves = zip(leaf_paths(shapes), leaf_paths(layout), strict=True)
        for (path, leaf), (_, placed) in leaves:
            size = jobs.device_bytes(leaf, placed)
            print(f"{tree}/{path}  {leaf.dtype}{list(leaf.shape)}  {placed.spec}  {size} bytes per device")
    for tree, (shapes, layout) in job.trees.items():
        note = " (of state, alone while streaming)" if tree == "params" else ""
        print(f"{tree}{note}: {jobs.device_bytes(shapes, layout) / 2**30:.3f} GiB per device")
    return 0


def vae(targets: Sequence[str], decoders: Sequence[str], height: int, width: int) -> int:
    """Compiles both steps of the streaming decoders at one size of video; returns the exit code."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from greedy_distill_jax.codecs.vae import VAEConfig, WanVAE
    from greedy_distill_jax.codecs.vae_codec import VAECodec
    from greedy_distill_jax.codecs.vae_tiny import TinyVAE, TinyVAEConfig
    from greedy_distill_jax.ops.attention import aot

    kinds = {"wan": WanVAE(VAEConfig(dtype="bfloat16")), "tiny": TinyVAE(TinyVAEConfig(dtype="bfloat16"))}
    failed = 0
    for target in targets:
        place = NamedSharding(aot.target_mesh(target), PartitionSpec())
        print(f"{target}, libtpu {aot.libtpu_version()}, {width}x{height}, one device")

        def placed(tree, dtype=None, place=place):
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=place), tree)

        for name in decoders:
            codec = VAECodec(kinds[name], None)
            params = placed({"decoder": jax.eval_shape(codec.vae.init, jax.random.key(0))["decoder"]}, jnp.bfloat16)
            latent = placed(jax.ShapeDtypeStruct((1, *codec.latent_shape(height, width)), jnp.float32))
            state, step = codec.open_decoder(), jax.jit(codec.decode_next, donate_argnums=1)
            for which in ("first frame", "next frames"):
                try:
                    memory = aot.interruptible(step.lower(params, state, latent).compile).memory_analysis()
                except Exception as error:  # whatever the compiler says is the answer; the rest is still compiled
                    print(f"  {name:5s} {which:12s} FAILED: {str(error).splitlines()[0][:160]}", flush=True)
                    failed = 1
                    break
                parts = {
                    "arguments": memory.argument_size_in_bytes,
                    "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,  # the cache stays in place
                    "temporaries": memory.temp_size_in_bytes,
                    "code": memory.generated_code_size_in_bytes,
                }
                listed = "  ".join(f"{part} {size / 2**20:.0f} MiB" for part, size in parts.items())
                print(f"  {name:5s} {which:12s} {sum(parts.values())} bytes: {listed}", flush=True)
                state = placed(jax.eval_shape(codec.decode_next, params, state, latent)[0])
    return failed


def main(argv: Sequence[str]) -> int:
    """Command line."""
    from greedy_distill_jax.ops.attention import aot, sweep

    jobs = {"train": train, "sharding": sharding}
    if argv and argv[0] in jobs:  # these read a configuration file and its overrides
        return jobs[argv[0]](argv[1:])
    parser = cli.Parser(prog="python -m greedy_distill_jax.compile", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("train", "compile the steps of a job"), ("sharding", "print the layout of a job")):
        commands.add_parser(name, help=text, description=text)
    for name, text in (("kernels", "compile every workload"), ("sweep", "choose the tuned block sizes"),
                       ("vae", "compile the streaming decoders")):  # fmt: skip
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--target", action="append", choices=list(aot.TOPOLOGIES), help="default: all; may repeat")
        if name == "kernels":
            command.add_argument("--only", default="", help="only workloads whose name contains this")
            command.add_argument("--no-bundles", action="store_true", help="do not count bundles (faster)")
        if name == "vae":
            command.add_argument("--decoder", action="append", choices=("wan", "tiny"), help="default: both")
            command.add_argument("--height", type=int, default=480, help="of the video, in pixels")
            command.add_argument("--width", type=int, default=832, help="of the video, in pixels")
    args = parser.parse_args(argv)
    targets = args.target or list(aot.TOPOLOGIES)
    if args.command == "kernels":
        return kernels(targets, args.only, not args.no_bundles)
    if args.command == "vae":
        return vae(targets, args.decoder or ("wan", "tiny"), args.height, args.width)
    with aot.bundle_dump() as dump:
        for target in targets:
            for tokens in sweep.CANDIDATES:
                sweep.sweep(target, tokens, dump)
    return 0


if __name__ == "__main__":
    cli.run(main)
