"""Which jobs fit on which TPU slices, and how they scale: compiled for devices that are not there, not run.

    python benchmarks/pods.py --output benchmarks/results/pods.json
    python benchmarks/pods.py --only=v6e --output=/tmp/pods.json

Every row is one `python -m greedy_distill_jax.compile train` in a process of its own, whose host memory and exit code
are recorded. Writes JSON, and a table in Markdown beside it. Rows that are in the file already are kept unless
--again is given: a row takes minutes on a small machine.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

GIB = 2**30
# name -> (config, slice, overrides, exit code it must have)
JOBS = {
    "1.3B stage 1, v5e:4x4": ("configs/wan1_3b/teacher_forcing.py", "v5e:4x4", [], 0),
    "1.3B stage 2, v5e:4x4": ("configs/wan1_3b/dmd.py", "v5e:4x4", [], 0),
    "1.3B stage 1, v6e:4x4": ("configs/wan1_3b/teacher_forcing.py", "v6e:4x4", [], 0),
    "1.3B stage 2, v6e:4x4": ("configs/wan1_3b/dmd.py", "v6e:4x4", [], 0),
    "1.3B stage 1, v5p:2x2x4": ("configs/wan1_3b/teacher_forcing.py", "v5p:2x2x4", [], 0),
    "1.3B stage 2, 14B teacher, v5p:2x2x4": ("configs/wan1_3b/dmd.py:teacher_14b", "v5p:2x2x4", [], 0),
    "1.3B teacher, v5e:4x4": ("configs/wan1_3b/teacher.py", "v5e:4x4", [], 0),
    "1.3B streaming, v5e:2x2": ("configs/wan1_3b/sample.py", "v5e:2x2", ["--only=stream"], 0),
    "14B teacher, v5p:4x4x8": ("configs/wan14b/teacher.py", "v5p:4x4x8", [], 0),
    "14B stage 1, v5p:4x4x8": ("configs/wan14b/teacher_forcing.py", "v5p:4x4x8", [], 0),
    "14B stage 2, v5p:4x4x8": ("configs/wan14b/dmd.py", "v5p:4x4x8", [], 0),
    "14B stage 2, v5e:2x2": ("configs/wan14b/dmd.py", "v5e:2x2", [], 3),
}
# Stage 1 and 2 at 1.3B, 16 to 256 chips: groups of `context` chips, one video at a time.
SCALING = {
    f"scaling {stage}, {name}": (
        f"configs/wan1_3b/{stage}.py", name,
        [f"--config.data.accumulate={max(1, 64 * 4 // chips)}", f"--only={step}"], 0,
    )
    for stage, step in (("teacher_forcing", "teacher_forcing"), ("dmd", "dmd"))
    for name, chips in (("v6e:4x4", 16), ("v6e:8x8", 64), ("v6e:16x16", 256))
}  # fmt: skip


def compiled(config: str, topology: str, overrides: list[str], expected: int) -> dict:
    """One row; raises RuntimeError when the command's exit code is another than expected."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [
            sys.executable, "-m", "greedy_distill_jax.compile", "train", f"--config={config}", f"--topology={topology}",
            f"--json={file.name}", *overrides,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout, flush=True)
        if done.returncode != expected:
            said = done.stderr[-2000:]
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}, not {expected}\n{said}")
        record = json.loads(Path(file.name).read_text())[-1]
    shown = ["python", *command[1 : -1 - len(overrides)], *overrides]
    return {"command": " ".join(shown), "exit_code": done.returncode, **record}


def table(rows: dict[str, dict]) -> str:
    """Markdown."""
    lines = [
        "# Jobs compiled for TPU slices",
        "",
        "Compiled for devices that are not there, **not run**: memory is the compiler's, FLOPs are closed-form model",
        "FLOPs of one update, collectives are read from the compiled program (bytes that one device sends in ring",
        "algorithms). FLOPs per byte sent stand beside the chip's published ratio of peak bfloat16 FLOPs to link",
        "bandwidth: below it a step would be bound by its links even if nothing else took time.",
        "",
        "| job | step | GiB per device (peak / HBM) | FLOPs per update | per device | GiB sent | FLOPs per byte | "
        "chip | compile s | host GiB | exit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        for step in row["steps"]:
            ratio = f"{step['flops_per_sent_byte']:,.0f}" if step["flops_per_sent_byte"] else "-"
            cells = [
                name, step["step"], f"{step['memory']['peak'] / GIB:.2f} / {step['hbm'] / GIB:.2f}",
                f"{step['model_flops']:.2e}", f"{step['model_flops_per_device']:.2e}",
                f"{step['sent_bytes_per_device'] / GIB:.1f}", ratio, f"{step['chip_flops_per_link_byte']:,.0f}",
                f"{step['seconds']:.0f}", f"{row['host_bytes'] / GIB:.1f}", str(row["exit_code"]),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON; a table goes beside it")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--again", action="store_true", help="compile rows that are in the file already")
    args = parser.parse_args()
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else {}
    for name, job in (JOBS | SCALING).items():
        if args.only not in name or (name in rows and not args.again):
            continue
        print(f"## {name}", flush=True)
        rows[name] = compiled(*job)
        versions = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "libtpu")}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        rows[name] |= {"versions": versions, "commit": commit}
        args.output.write_text(json.dumps({"compiled_not_run": True, "rows": rows}, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
