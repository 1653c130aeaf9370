"""How fast is chunk attention, next to what one would use otherwise?

    python benchmarks/attention.py --output benchmarks/results/attention.json

Prints one table and writes the same figures with device, versions and commit. On CPU: process CPU time in one pinned
thread, float32, against torch's scaled_dot_product_attention on exact slices (if torch is installed) and masked dense
attention; and how the time per chunk grows with the number of chunks.
"""

import importlib.metadata
import subprocess
from pathlib import Path

from greedy_distill_jax import cli
from greedy_distill_jax.measure import clock, record


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


def versions() -> dict[str, str]:
    """Installed versions of what is compared."""
    found = {}
    for name in ("jax", "jaxlib", "torch", "libtpu", "tokamax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that is checked out, "+" for uncommitted changes; "" outside a repository."""
    done = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
        cwd=Path(__file__).parent, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip()


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
    return {"milliseconds": rows, "milliseconds_per_chunk_forward_backward": per_chunk, "ratios": ratios}


def main() -> None:
    """Command line."""
    clock.one_thread()
    import jax

    from greedy_distill_jax.ops.attention import bench
    from greedy_distill_jax.pods import kernels

    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    if jax.default_backend() == "cpu":
        result = _cpu(bench, kernels.CPU_PEERS, kernels.CPU_GROWTH)
    else:
        result = {"milliseconds": {}}
        for spec in kernels.SPECS.values():
            result["milliseconds"][spec.name] = bench.measure(spec, bench.default_peers(), clock.median_ms)
            _print(spec, result["milliseconds"][spec.name])
    result |= {"device": jax.devices()[0].device_kind, "versions": versions(), "commit": commit()}
    record.write_json(args.output, result)


if __name__ == "__main__":
    cli.run(main)
