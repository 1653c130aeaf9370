"""Compiles for devices that are not there.

    python -m greedy_distill_jax.compile kernels --target v5p
    python -m greedy_distill_jax.compile sweep --target v5p

``kernels`` compiles every named workload of the attention op and prints its memory and the useful work per bundle; it
exits with 1 when one does not compile or got worse. ``sweep`` chooses the tuned block sizes.
"""

import contextlib
from collections.abc import Sequence

from greedy_distill_jax import cli


def kernels(targets: Sequence[str], only: str, bundles: bool) -> int:
    """Compiles the workloads whose name contains ``only``; returns the exit code."""
    from greedy_distill_jax.ops.sliding_window import aot, arg_specs, sweep

    failures = []
    with aot.bundle_dump() if bundles else contextlib.nullcontext() as dump:
        for target in targets:
            mesh = aot.target_mesh(target)
            print(f"{target}, libtpu {aot.libtpu_version()}")
            for name, spec in arg_specs.SPECS.items():
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


def main(argv: Sequence[str]) -> int:
    """Command line."""
    from greedy_distill_jax.ops.sliding_window import aot, sweep

    parser = cli.Parser(prog="python -m greedy_distill_jax.compile", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("kernels", "compile every workload"), ("sweep", "choose the tuned block sizes")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--target", action="append", choices=list(aot.TOPOLOGIES), help="default: all; may repeat")
        if name == "kernels":
            command.add_argument("--only", default="", help="only workloads whose name contains this")
            command.add_argument("--no-bundles", action="store_true", help="do not count bundles (faster)")
    args = parser.parse_args(argv)
    targets = args.target or list(aot.TOPOLOGIES)
    if args.command == "kernels":
        return kernels(targets, args.only, not args.no_bundles)
    with aot.bundle_dump() as dump:
        for target in targets:
            for tokens in sweep.CANDIDATES:
                sweep.sweep(target, tokens, dump)
    return 0


if __name__ == "__main__":
    cli.run(main)
