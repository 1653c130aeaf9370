"""The attention op's named workloads, compiled for devices that are not there: memory, useful work per bundle."""

import contextlib
from collections.abc import Callable, Sequence

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ops.attention import aot, sweep
from greedy_distill_jax.pods.kernels import SPECS


def compile_kernels(targets: Sequence[str], only: str, bundles: bool, say: Callable[[str], None]) -> list[str]:
    """Compiles the workloads whose name contains ``only``, forward and backward.

    Args:
      targets: names of ``aot.TOPOLOGIES``.
      only: part of the names.
      bundles: whether the useful work per bundle is counted, and compared with the tuned table; once in a process,
        before the first use of libtpu.
      say: takes one line.

    Returns:
      What failed, or got worse than the tuned table says.

    Raises:
      UserError: libtpu is not installed.
    """
    failures = []
    if not any(only in name for name in SPECS):
        raise UserError(f"no workload has {only!r} in its name; they are {', '.join(SPECS)}", "only")
    with aot.bundle_dump() if bundles else contextlib.nullcontext() as dump:
        for target in targets:
            mesh = aot.target_mesh(target)
            say(f"{target}, libtpu {aot.libtpu_version()}")
            for name, spec in SPECS.items():
                if only not in name:
                    continue
                try:
                    done = aot.compile_spec(spec, mesh, dump=dump)
                except Exception as error:  # whatever the compiler says is the answer; the rest is still compiled
                    say(f"  {name:28s} FAILED: {str(error).splitlines()[0][:160]}")
                    failures.append(f"{target} {name}")
                    continue
                memory = "  ".join(f"{part} {size / 2**20:.0f} MiB" for part, size in done["memory"].items())
                work = "  ".join(f"{k} {v}" for k, v in done.get("kflop_per_bundle", {}).items())
                say(f"  {name:28s} {memory}" + (f"  kFLOP per bundle: {work}" if work else ""))
            if bundles:
                failures += sweep.regressions(target, dump, report=lambda line: say(f"  {line}"))
    return failures


def sweep_blocks(targets: Sequence[str], say: Callable[[str], None]) -> None:
    """Chooses the tuned block sizes of every target and writes them into the package's tables."""
    with aot.bundle_dump() as dump:
        for target in targets:
            for tokens in sweep.CANDIDATES:
                sweep.sweep(target, tokens, dump, report=say)
