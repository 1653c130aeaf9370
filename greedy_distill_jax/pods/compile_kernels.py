"""The attention op's named workloads, compiled for devices that are not there.

Of TPU kernels the useful work per bundle is counted, of those for NVIDIA cards registers and spills.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ops.attention import aot, sweep
from greedy_distill_jax.pods.kernels import SPECS


def compile_kernels(targets: Sequence[str], only: str, bundles: bool, say: Callable[[str], None]) -> list[str]:
    """Compiles the workloads whose name contains ``only``, forward and backward.

    Args:
      targets: names of ``aot.TOPOLOGIES`` and ``aot.CARDS``.
      only: part of the names.
      bundles: whether the useful work per bundle is counted, and compared with the tuned table; once in a process,
        before the first use of libtpu.
      say: takes one line.

    Returns:
      What failed, or got worse than the tuned table says.

    Raises:
      UserError: libtpu, or for cards jax's CUDA plugin, is not installed.
    """
    failures = []
    bundles = bundles and not set(targets) <= set(aot.CARDS)
    if not any(only in name for name in SPECS):
        raise UserError(f"no workload has {only!r} in its name; they are {', '.join(SPECS)}", "only")
    with aot.bundle_dump() if bundles else contextlib.nullcontext() as dump:
        for target in targets:
            mesh = aot.target_mesh(target)
            say(f"{target}, {aot.compiler_version(target)}")
            made = 0
            for name, spec in SPECS.items():
                if only not in name:
                    continue
                try:
                    done = aot.compile_spec(spec, mesh, dump=None if target in aot.CARDS else dump)
                except UserError as error:  # on a card another backend runs it; on a TPU the kernels have to
                    say(f"  {name:28s} {error}")
                    if target not in aot.CARDS:
                        failures.append(f"{target} {name}")
                    continue
                except Exception as error:  # whatever the compiler says is the answer; the rest is still compiled
                    say(f"  {name:28s} FAILED: {str(error).splitlines()[0][:160]}")
                    failures.append(f"{target} {name}")
                    continue
                memory = "  ".join(f"{part} {size / 2**20:.0f} MiB" for part, size in done["memory"].items())
                work = "  ".join(f"{k} {v}" for k, v in done.get("kflop_per_bundle", {}).items())
                say(f"  {name:28s} {memory}" + (f"  kFLOP per bundle: {work}" if work else ""))
                assembled, made = done.get("assembled", {}), made + 1
                for kernel, found in assembled.items():
                    known = [f"{found['registers']} registers", f"{found['spilled']} bytes spilled"]
                    known += [str(done["estimates"][kernel])] if "estimates" in done else []
                    say(f"    {kernel:15s} {', '.join(known)}")
                failures += [f"{target} {name}: {line}" for line in spills(assembled)]
            if target in aot.CARDS and not made:
                failures.append(f"{target}: no workload has kernels there")
            if bundles and target not in aot.CARDS:
                failures += sweep.regressions(target, dump, report=lambda line: say(f"  {line}"))
    return failures


def spills(assembled: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Kernels that write registers to memory and read them back, which none has to."""
    return [
        f"{name} spills {found['spilled']} bytes of a thread's registers; change its block sizes, or what lives across "
        f"its branches, until it spills none"
        for name, found in assembled.items()
        if found["spilled"]
    ]


def sweep_blocks(targets: Sequence[str], say: Callable[[str], None]) -> None:
    """Chooses the tuned block sizes of every target and writes them into the package's tables."""
    with aot.bundle_dump() as dump:
        for target in targets:
            for tokens in sweep.CANDIDATES:
                sweep.sweep(target, tokens, dump, report=say)
