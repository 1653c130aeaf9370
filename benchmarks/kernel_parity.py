"""Are the kernels for Hopper cards right? Emulated on a CPU, against attention written out in float64.

    python benchmarks/kernel_parity.py --output benchmarks/results/kernel-parity

A row is a call that a teacher or a student makes (``compile kernels`` has the same at full size), at frames of a few
tokens, which the blocks do not divide, with head dims 64 and 128: the relative error of the output and of the gradients
of q, k and v, on other random numbers in every run (--seed repeats one). The calls of a stream are made once with all
slots filled, and once with half of them, a number that is known at run time alone. The emulator follows every read and
write of shared memory and says whether two of them race. At the default size windows do not slide yet and most calls
have too few visits to be cut into parts: ``tests/ops/test_mosaic_gpu.py`` does both. Needs jax 0.11.2 or newer. Exits
with 1 if an error is above --limit or anything races.
"""

import argparse
import contextlib
import dataclasses
import io
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from greedy_distill_jax import cli
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.measure import environment, record
from greedy_distill_jax.models.students.config import CausalConfig
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.ops.attention import Pattern, chunk_attention
from greedy_distill_jax.ops.attention.tuning import Blocks
from greedy_distill_jax.pods.kernels import attention_calls
from greedy_distill_jax.ranges import Count, Natural, Positive
from greedy_distill_jax.testing.attention import OUTPUTS, errors

BLOCKS = Blocks((128, 64), (128, 64), (64, 128))
RACE = "RACE DETECTED"


def parity(pattern: Pattern, filled: int | None, dim: int, rng: np.random.Generator) -> dict[str, float | bool]:
    """Relative errors of one call, and whether anything raced; ``filled``: slots in use, known at run time alone."""
    tokens = pattern.q_tokens, pattern.k_tokens, pattern.k_tokens, pattern.q_tokens
    q, k, v, g = (jnp.asarray(rng.standard_normal((1, n, 1, dim)), jnp.bfloat16) for n in tokens)
    lengths, seen = None, pattern
    if filled is not None:
        lengths = jnp.full(pattern.num_q_chunks, filled, jnp.int32)
        seen = dataclasses.replace(pattern, table=tuple(row[:filled] for row in pattern.table))
    emulator = plgpu.InterpretGPUParams(detect_races=True)
    options = dict(implementation="mosaic_gpu", blocks=BLOCKS, lengths_Q=lengths, interpret=emulator)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            found = errors(lambda *qkv: chunk_attention(*qkv, pattern, **options), (q, k, v, g), seen.dense_mask())
    except Exception as error:  # jax 0.12 raises what earlier versions print
        if RACE not in str(error):
            raise
        return {**dict.fromkeys(OUTPUTS, math.nan), "races": True}
    return {**found, "races": RACE in said.getvalue()}


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.1e}" if isinstance(value, float) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=cli.number(Count), default=40, help="of a frame (default: 40)")
    parser.add_argument("--frames", type=cli.number(Count), default=6, help="of a video (default: 6)")
    parser.add_argument(
        "--dim", type=cli.number(Count), nargs="+", default=[64, 128], help="of heads (default: 64 128)"
    )
    parser.add_argument("--only", default="", help="only calls whose name contains this")
    parser.add_argument("--seed", type=cli.number(Natural), help="of the numbers (default: another in every run)")
    parser.add_argument("--limit", type=cli.number(Positive), default=8e-3, help="of an error (default: .008)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    args = parser.parse_args(argv)
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise UserError(f"this is jax {jax.__version__}, which cannot emulate GPU kernels; jax 0.11.2 can.")
    if args.frames < CausalConfig().chunk:
        raise UserError(f"--frames is {args.frames}; a chunk of the causal student has {CausalConfig().chunk}.")
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    rng, rows = np.random.default_rng(seed), []
    chosen = {
        name: x for name, x in attention_calls(WanConfig(), args.tokens, args.frames).items() if args.only in name
    }
    if not chosen:
        raise UserError(f"--only is {args.only!r}, which no call has in its name.")
    for dim in args.dim:
        for name, pattern in chosen.items():
            slots = [None, len(pattern.table[0]) // 2] if name.endswith("step") else [None]
            for filled in slots:
                start = time.monotonic()
                row = {"call": name if filled is None else f"{name}, {filled} of {len(pattern.table[0])} slots"}
                row |= {"dim": dim, "queries": pattern.q_tokens, "keys": pattern.k_tokens}
                rows.append(row | parity(pattern, filled, dim, rng))
                took = f"{time.monotonic() - start:.0f} s"
                print(*(f"{k} {v:.2e}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), took)
    table = record.table(list(rows[0]), [[_cell(x) for x in row.values()] for row in rows])
    bad = [row for row in rows if row["races"] or not all(row[name] <= args.limit for name in OUTPUTS)]
    print(table)
    if args.output:
        command = record.command_line("benchmarks/kernel_parity.py", sys.argv[1:] if argv is None else argv)
        here = environment.environment()
        made = {"command": command, "seed": seed, "limit": args.limit, "blocks": dataclasses.asdict(BLOCKS)}
        record.write_json(args.output.with_suffix(".json"), {**made, "rows": rows, **here})
        told = f"Relative errors, emulated; seed {seed}, jax {here['versions']['jax']}, commit {here['commit']}."
        args.output.with_suffix(".md").write_text(f"{told}\n\n{table}\n", encoding="utf-8")
    return int(bool(bad))


if __name__ == "__main__":
    cli.run(main)
