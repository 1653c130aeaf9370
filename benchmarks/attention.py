"""How fast is chunk attention, next to what one would use otherwise?

    python benchmarks/attention.py --output benchmarks/results/attention.json

Prints one table and writes the same figures with device, versions and commit. On CPU: process CPU time in one pinned
thread, float32, against torch's scaled_dot_product_attention on exact slices (if torch is installed) and masked dense
attention; and how the time per chunk grows with the number of chunks. These ratios are the machine's, too (torch's
kernels know more instructions of some CPUs than XLA's): with them stand the CPU's name and the rate of a matmul in both
libraries, and at the end the range over this run and the committed records (`--ranges` prints that alone).
"""

import json
from collections.abc import Iterable
from pathlib import Path

from torch_rate import matmul_rates

from greedy_distill_jax import cli
from greedy_distill_jax.measure import clock, environment, record

RECORDS = Path(__file__).parent / "results"


def torch_slices():
    """Peer: torch SDPA once per query chunk, on the slice of keys it sees."""
    import torch

    torch.set_num_threads(1)
    attention = torch.nn.functional.scaled_dot_product_attention

    def peer(spec, *qkvg):
        q, k, v, g = (torch.from_numpy(x.swapaxes(1, 2).copy()) for x in qkvg)
        table = spec.pattern

        def attend(q, k, v):
            outs = []
            for i, row in enumerate(table.table):
                keys = slice(min(row) * table.k_chunk, (max(row) + 1) * table.k_chunk)
                if len(row) != max(row) - min(row) + 1:
                    raise ValueError("this peer slices only windows")
                mine = q[:, :, i * table.q_chunk : (i + 1) * table.q_chunk]
                outs.append(attention(mine, k[:, :, keys], v[:, :, keys]))
            return torch.cat(outs, 2)

        def forward():
            with torch.no_grad():
                attend(q, k, v)

        def both():
            leaves = [x.detach().requires_grad_(True) for x in (q, k, v)]
            attend(*leaves).backward(g)

        return lambda backward: both if backward else forward

    return peer


def committed() -> list[dict]:
    """The records of CPUs in ``benchmarks/results``."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDS.glob("*cpu-attention*.json"))]


def print_ranges(records: Iterable[dict]) -> None:
    """Every machine with its rates and ratios, then the least and the largest of every ratio."""
    records = list(records)
    for one in records:
        rates = one.get("matmul_flops_per_s", {})
        cells = [f"{name} matmul {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()]
        cells = cells or ["matmul rates not recorded"]
        print(f"{one.get('cpu', 'CPU not recorded')}: {', '.join(cells)}")
    for name in dict.fromkeys(name for one in records for name in one["ratios"]):
        values = [one["ratios"][name] for one in records if name in one["ratios"]]
        print(f"{name}: {min(values):.2f} to {max(values):.2f} in {len(values)} records")


def _print(spec, row) -> None:
    for peer, times in row.items():
        cells = (f"{label} {ms:8.1f} ms" for label, ms in times.items()) if "error" not in times else [times["error"]]
        print(f"{spec.name:28s} {peer:20s} {'  '.join(cells)}", flush=True)


def _cpu(bench, base, growth) -> dict:
    peers = {"ours": bench.ours, "torch SDPA on slices": torch_slices, "masked dense": bench.masked_dense}
    rows = {base.name: bench.measure(base, peers, clock.median_ms)}
    _print(base, rows[base.name])
    for spec in growth:
        # More runs: a ratio of two times of the same program has to tell 15%.
        rows[spec.name] = bench.measure(spec, {"ours": bench.ours}, clock.median_ms, repeats=3 * bench.REPEATS)
        _print(spec, rows[spec.name])
    per_chunk = {s.name: rows[s.name]["ours"]["forward_backward"] / s.pattern.num_q_chunks for s in growth}
    times, ratios = rows[base.name], {}
    for peer in [name for name in peers if name != "ours" and "error" not in times[name]]:
        ratios |= {f"{peer} / ours, {label}": ms / times["ours"][label] for label, ms in times[peer].items()}
    ratios["time per chunk, longest / shortest"] = per_chunk[growth[-1].name] / per_chunk[growth[0].name]
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    return {
        "matmul_flops_per_s": matmul_rates("float32"),
        "milliseconds": rows,
        "milliseconds_per_chunk_forward_backward": per_chunk,
        "ratios": ratios,
    }


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    parser.add_argument("--ranges", action="store_true", help="only print the range over the committed records")
    args = parser.parse_args(argv)
    if args.ranges:
        print_ranges(committed())
        return
    clock.one_thread()
    import jax

    from greedy_distill_jax.ops.attention import bench
    from greedy_distill_jax.pods import kernels

    if jax.default_backend() == "cpu":
        others = committed()  # before this run may become one of them
        result = _cpu(bench, kernels.CPU_PEERS, kernels.CPU_GROWTH)
        print("\nthis run and the committed ones:")
        print_ranges([{**environment.environment(), **result}, *others])
    else:
        result = {"milliseconds": {}}
        for spec in kernels.SPECS.values():
            result["milliseconds"][spec.name] = bench.measure(spec, bench.default_peers(), clock.median_ms)
            _print(spec, result["milliseconds"][spec.name])
    record.write_json(args.output, {**environment.environment(), **result})


if __name__ == "__main__":
    cli.run(main)
