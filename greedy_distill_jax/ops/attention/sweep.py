"""Chooses the blocks of the TPU kernels by useful work per bundle and records the whole sweep.

The result, ``tuned/<target>.json``, holds {"libtpu": version, "blocks": {workload: {kernel: [query, key]}},
"kflop_per_bundle": {workload: {kernel: number}}, "sweep": {workload: {"<query> x <key>": {kernel: number}}}}.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from greedy_distill_jax.ops.attention import aot, tuning
from greedy_distill_jax.ops.attention.arg_specs import Spec
from greedy_distill_jax.ops.attention.pattern import Pattern
from greedy_distill_jax.ops.attention.tuning import Blocks, Pair

# A regression of the compiled kernels: this much less work per bundle under the same libtpu.
TOLERANCE = 0.05
# Divisors of a 1560-token frame, and the usual square for comparison.
CANDIDATES: Mapping[int, tuple[Pair, ...]] = {
    1560: ((520, 1560), (520, 520), (312, 1560), (512, 512)),
}


def workload(tokens: int) -> Spec:
    """A small workload with frames of ``tokens``: heads and frames only change the length of the grid."""
    return Spec(f"{tokens}-token frames", Pattern.sliding_window(4, tokens, 2), heads=1)


def sweep(target: str, tokens: int, dump: Path, report=print) -> dict:
    """Compiles every candidate and writes the best of each kernel to the tuned table of ``target``; returns it."""
    mesh, spec = aot.target_mesh(target), workload(tokens)
    name = tuning.key(tokens, tokens, spec.dim, spec.dtype)
    tried = {}
    for pair in CANDIDATES[tokens]:
        try:
            tried[pair] = aot.compile_spec(spec, mesh, blocks=Blocks(pair, pair, pair), dump=dump)["kflop_per_bundle"]
        except Exception as error:  # a block pair that the compiler refuses is a result of the sweep
            report(f"{target} {pair[0]} x {pair[1]}: {str(error).splitlines()[0][:120]}")
            continue
        report(f"{target} {pair[0]} x {pair[1]}: {tried[pair]}")
    best = {kernel: max(tried, key=lambda p: tried[p][f"{kernel}_kernel"]) for kernel in ("forward", "dq", "dkv")}
    path = tuning.path(target)
    record = json.loads(path.read_text()) if path.exists() else {}
    record["libtpu"] = aot.libtpu_version()
    record.setdefault("blocks", {})[name] = {kernel: list(pair) for kernel, pair in best.items()}
    record.setdefault("kflop_per_bundle", {})[name] = {
        f"{kernel}_kernel": tried[pair][f"{kernel}_kernel"] for kernel, pair in best.items()
    }
    record.setdefault("sweep", {})[name] = {f"{p[0]} x {p[1]}": figures for p, figures in tried.items()}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    tuning.record.cache_clear()
    return record


def regressions(target: str, dump: Path, report=print) -> list[str]:
    """What got worse than the tuned table says, under the libtpu it was made with; another version only reports."""
    record, mesh, worse = tuning.record(target), aot.target_mesh(target), []
    same = record.get("libtpu") == aot.libtpu_version()
    for tokens in CANDIDATES:
        spec = workload(tokens)
        now = aot.compile_spec(spec, mesh, dump=dump)["kflop_per_bundle"]
        kept = record.get("kflop_per_bundle", {}).get(tuning.key(tokens, tokens, spec.dim, spec.dtype), {})
        for kernel, before in kept.items():
            line = f"{target} {spec.name} {kernel}: {now[kernel]} kFLOP per bundle, {before} in the table"
            report(line)
            if same and now[kernel] < (1 - TOLERANCE) * before:
                worse.append(line)
    return worse
