"""Which jobs fit on which TPU slices and NVIDIA cards, and how they scale: compiled for absent devices, not run.

    python benchmarks/pods.py --output benchmarks/results/pods.json
    python benchmarks/pods.py --only=v6e --output=/tmp/pods.json
    python benchmarks/pods.py --cards --output=/tmp/cards.json

Every step of every job is one `python -m greedy_distill_jax.compile train` in a process of its own, whose host memory
and exit code are recorded; what was compiled is compared with the published sizes: a job that was shrunk to make it fit
is an error. Writes JSON, and a table in Markdown beside it. Steps that are in the file already are kept unless --again
is given: one takes minutes on a small machine.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import published_sizes

from greedy_distill_jax.pods.topologies import CARD_SHARE, CHIPS

GIB = 2**30


class Row(NamedTuple):
    """One job.

    ``stage``, ``size``, ``teacher``, ``student``, ``critic``, ``batch``: what it must be, see
    ``published_sizes.differences``.
    ``only``: steps whose name contains this. ``overrides`` of the config. ``code``: the exit code that the command
    must have.
    """

    config: str
    topology: str
    stage: str
    size: str = "wan1_3b"
    teacher: str = "wan1_3b"
    student: str = "etm_sdd"
    critic: bool = True
    batch: int = 64
    only: str = ""
    overrides: tuple[str, ...] = ()
    code: int = 0

    def options(self) -> list[str]:
        """Of the command."""
        return [f"--config.{override}" for override in self.overrides]


STAGE1, STAGE2, STAGE3 = "teacher_forcing", "dmd", "rl"
WHOLE = ("mesh.context=1", "data.accumulate=4")  # 16 chips with room for a whole video on every one
JOBS = {
    "1.3B teacher, v5e:4x4": Row("configs/wan1_3b/teacher.py", "v5e:4x4", "teacher"),
    "1.3B stage 1, v5e:4x4": Row("configs/wan1_3b/teacher_forcing.py", "v5e:4x4", STAGE1),
    "1.3B stage 2, v5e:4x4": Row("configs/wan1_3b/dmd.py", "v5e:4x4", STAGE2),
    "1.3B stage 1, v6e:4x4": Row("configs/wan1_3b/teacher_forcing.py", "v6e:4x4", STAGE1, overrides=WHOLE),
    "1.3B stage 2, v6e:4x4": Row("configs/wan1_3b/dmd.py", "v6e:4x4", STAGE2, overrides=WHOLE),
    "1.3B stage 2, self as fake score, v6e:4x4": Row(
        "configs/wan1_3b/dmd.py:greedy_distill_paper", "v6e:4x4", STAGE2, critic=False, overrides=WHOLE
    ),
    "1.3B stage 2, diagonal, v6e:4x4": Row("configs/wan1_3b/dmd.py:diagonal", "v6e:4x4", STAGE2, overrides=WHOLE),
    "1.3B stage 2, diagonal_paper, causal, v6e:4x4": Row(
        "configs/wan1_3b/dmd.py:diagonal_paper", "v6e:4x4", STAGE2, student="causal", overrides=WHOLE
    ),
    "1.3B causal, v6e:4x4": Row("configs/wan1_3b/causal.py", "v6e:4x4", STAGE1, student="causal", overrides=WHOLE),
    "1.3B stage 2, 14B teacher, v5p:2x2x4": Row(
        "configs/wan1_3b/dmd.py:teacher_14b", "v5p:2x2x4", STAGE2, teacher="wan14b", overrides=WHOLE
    ),
    "1.3B stage 3, v5p:2x2x4": Row("configs/wan1_3b/rl.py", "v5p:2x2x4", STAGE3, critic=False, batch=16),
    **{
        f"1.3B streaming, {name}": Row("configs/wan1_3b/sample.py", name, STAGE2, only="stream")
        for name in ("v5e:2x2", "v6e:2x2", "v5p:2x2x1")
    },
    "14B teacher, v5p:4x4x8": Row("configs/wan14b/teacher.py", "v5p:4x4x8", "teacher", "wan14b"),
    "14B stage 1, v5p:4x4x8": Row("configs/wan14b/teacher_forcing.py", "v5p:4x4x8", STAGE1, "wan14b"),
    "14B stage 2, v5p:4x4x8": Row("configs/wan14b/dmd.py", "v5p:4x4x8", STAGE2, "wan14b", "wan14b"),
    "14B stage 3, v5p:4x4x8": Row("configs/wan14b/rl.py", "v5p:4x4x8", STAGE3, "wan14b", critic=False, batch=32),
    "14B stage 2, v5e:2x2": Row("configs/wan14b/dmd.py", "v5e:2x2", STAGE2, "wan14b", "wan14b", code=3),
}
# Stages 1 and 2 at 1.3B from 16 (above) to 256 chips, the same batch of 64: beyond 64 chips several share a video.
SCALING = {
    f"1.3B stage {number}, {name}": Row(
        f"configs/wan1_3b/{stage}.py", name, stage, only=stage, overrides=("mesh.context=1", "data.accumulate=1", *more)
    )
    for number, stage in ((1, STAGE1), (2, STAGE2))
    for name, more in (("v6e:8x8", ()), ("v6e:16x16", ("mesh.tensor=4",)))
}
# One card of 80 or 141 GB and the eight of a host, the same batch of 64.
CARDS = {
    f"1.3B {name}, {cards}": Row(f"configs/wan1_3b/nvidia.py:{file}@{cards}", cards, stage, student=student, only=only)
    for cards in ("h100:1", "h200:1", "h100:8")
    for name, file, stage, student, only in (
        ("teacher", "teacher", "teacher", "etm_sdd", ""),
        ("stage 1", STAGE1, STAGE1, "etm_sdd", STAGE1),
        ("causal", "causal", STAGE1, "causal", STAGE1),
        ("stage 2", STAGE2, STAGE2, "etm_sdd", ""),
    )
} | {
    # What `device.py` has run on a card: what the compiler says of it can be held against what it took.
    "1.3B stage 1, one video, h100:1": Row(
        f"configs/wan1_3b/nvidia.py:{STAGE1}@h100:1",
        "h100:1",
        STAGE1,
        only=STAGE1,
        batch=1,
        overrides=("data.batch=1", "data.accumulate=1"),
    )
}


def compiled(row: Row, only: str) -> dict:
    """What the command says of the steps whose name contains ``only``.

    Raises:
      RuntimeError: its exit code is another than expected, or the job is not the published one.
    """
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        shown = [
            "python",
            "-m",
            "greedy_distill_jax.compile",
            "train",
            f"--config={row.config}",
            f"--topology={row.topology}",
            *([f"--only={only}"] if only else []),
            *row.options(),
        ]
        command = [sys.executable, *shown[1:], f"--json={file.name}"]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout, flush=True)
        if done.returncode != row.code:
            said = done.stderr[-2000:]
            raise RuntimeError(f"{' '.join(shown)}: exit code {done.returncode}, not {row.code}\n{said}")
        record = json.loads(Path(file.name).read_text())[-1]
    wanted = {name: getattr(row, name) for name in ("stage", "size", "teacher", "student", "critic", "batch")}
    wanted |= {"only": only}
    if differences := published_sizes.differences(record, **wanted):
        raise RuntimeError(f"{' '.join(shown)}: not the published job: {'; '.join(differences)}")
    compiler = "jax-cuda13-plugin" if CHIPS[row.topology.partition(":")[0]].cards else "libtpu"
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", compiler)}
    made = {"command": " ".join(shown), "exit_code": done.returncode, "host_bytes": record.pop("host_bytes")}
    made |= {"versions": versions, "commit": commit}
    return record | {"steps": [step | made for step in record["steps"]]}


def steps_of(row: Row) -> list[str]:
    """What to compile in processes of their own: every step; a job that must be refused, in one."""
    steps = published_sizes.steps(row.stage, row.critic)
    return [step for step in steps if row.only in step] if not row.code else [row.only]


STAND_INS = (
    "",
    "cuDNN compiles on a card only. Every call of its attention was compiled as a call that computes nothing, with",
    f"operands, results and workspace of the same shapes. HBM is {CARD_SHARE:.0%} of a card, as with",
    f"`XLA_PYTHON_CLIENT_MEM_FRACTION={CARD_SHARE}`; without it jax takes 75%.",
)


def table(rows: dict[str, dict]) -> str:
    """Markdown."""
    steps = [step for row in rows.values() for step in row["steps"]]
    stand_ins = any(call["stand_in"] for step in steps for call in step.get("attention_calls", ()))
    lines = [
        f"# Jobs compiled for {'NVIDIA cards' if stand_ins else 'TPU slices'}",
        "",
        "Compiled for devices that are not there, **not run**. Memory is the compiler's account of one device, plus",
        "what the job keeps there that the step does not use; HBM is what the compiler lets a program have. FLOPs are",
        "closed-form model FLOPs of one update. Collectives are read from the compiled program: bytes that one device",
        "sends in ring algorithms. FLOPs per byte sent stand beside the chip's published ratio of peak bfloat16 FLOPs",
        "to link bandwidth: below it a step would be bound by its links even if nothing else took time. Compile time",
        "is by the clock, with CPU time beside it (the machine may have been shared); host memory is the peak of the",
        "compiling process.",
        *(STAND_INS if stand_ins else ()),
        "",
        "| job | chips | mesh | batch | step | GiB per device (peak / HBM) | FLOPs per update | per device | GiB sent |"
        " FLOPs per byte | chip | compile s (CPU) | host GiB | exit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        facts = row["facts"]
        mesh = ", ".join(f"{axis} {size}" for axis, size in facts["mesh"].items() if size > 1)
        groups = facts["mesh"]["data"] * facts["mesh"]["fsdp"]
        batch = f"{facts['batch']} = {facts['accumulate']} x {facts['microbatch_per_group']} x {groups}"
        for step in row["steps"]:
            sent, fits = step["sent_bytes_per_device"], "" if step["fits"] else " does not fit"
            videos = f"{facts['streams']['streams']} streams" if step["step"] == "stream" else batch
            cells = [
                name,
                facts["devices"],
                mesh,
                videos,
                step["step"],
                f"{step['memory']['peak'] / GIB:.2f} / {step['hbm'] / GIB:.2f}{fits}",
                f"{step['model_flops']:.2e}",
                f"{step['model_flops_per_device']:.2e}",
                "-" if sent is None else f"{sent / GIB:.1f}",
                f"{step['flops_per_sent_byte']:,.0f}" if step["flops_per_sent_byte"] else "-",
                f"{step['chip_flops_per_link_byte']:,.0f}",
                "-" if step["seconds"] is None else f"{step['seconds']:.0f} ({step['cpu_seconds']:.0f})",
                f"{step['host_bytes'] / GIB:.1f}",
                step["exit_code"],
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def read(path: Path) -> dict[str, dict]:
    """The rows of a file of results, which need not exist."""
    return json.loads(path.read_text())["rows"] if path.exists() else {}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON; a table goes beside it")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--step", default="", help="only steps whose name contains this")
    parser.add_argument("--cards", action="store_true", help="NVIDIA cards, by jax's CUDA plugin, in place of TPUs")
    parser.add_argument("--again", action="store_true", help="compile what is in the file already")
    args = parser.parse_args()
    if not args.output.parent.is_dir():
        parser.error(f"--output: the folder {args.output.parent} does not exist")
    all_rows = CARDS if args.cards else JOBS | SCALING
    if not any(args.only in name and args.step in step for name, row in all_rows.items() for step in steps_of(row)):
        parser.error(f"no row contains {args.only!r} with a step {args.step!r}; rows: {'; '.join(all_rows)}")
    for name, row in all_rows.items():
        for only in steps_of(row):
            kept = read(args.output).get(name, {}).get("steps", [])
            there = any(only in step["step"] for step in kept) and not args.again
            if args.only not in name or args.step not in only or there:
                continue
            print(f"## {name}, {only or 'all steps'}", flush=True)
            new = compiled(row, only)
            rows = read(args.output)  # another process may have added to it meanwhile
            kept = rows.get(name, {}).get("steps", [])
            names = [step["step"] for step in new["steps"]]
            new["steps"] = [step for step in kept if step["step"] not in names] + new["steps"]
            new["steps"].sort(key=lambda step: published_sizes.STEPS[row.stage].index(step["step"]))
            new["fits"] = all(step["fits"] for step in new["steps"])
            new["facts"]["steps"] = [step["step"] for step in new["steps"]]
            rows[name] = new
            ordered = {name: rows[name] for name in all_rows | rows if name in rows}  # other rows stay
            args.output.write_text(json.dumps({"compiled_not_run": True, "rows": ordered}, indent=1) + "\n")
            args.output.with_suffix(".md").write_text(table(ordered))


if __name__ == "__main__":
    main()
