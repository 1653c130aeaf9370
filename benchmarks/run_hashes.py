"""Hashes what the smoke runs of all stages learn and log: two commits that print the same compute the same numbers.

    python benchmarks/run_hashes.py [--workdir DIR]

One line per run: its name, a hash of every scalar it logged (times apart) and one of every array of its last checkpoint
(paths apart, so that a layout that names them otherwise still compares).
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RUNS = {  # name -> (configuration, overrides with {run} for the folders of earlier ones)
    "teacher": ("teacher,smoke", []),
    "student": ("student,smoke", ["--config.teacher_from={teacher}"]),
    "stage2": ("stage2,smoke", ["--config.teacher_from={teacher}", "--config.student_from={student}"]),
    "stage2_self": (
        "greedy_distill_paper,smoke",
        ["--config.teacher_from={teacher}", "--config.student_from={student}"],
    ),
    "student_last_step": (
        "student,smoke",
        ["--config.teacher_from={teacher}", "--config.student.context=last_step_kv"],
    ),
    "stage2_last_step": (
        "stage2,smoke",
        [
            "--config.teacher_from={teacher}",
            "--config.student_from={student_last_step}",
            "--config.student.context=last_step_kv",
            "--config.distill.real=joint",
        ],
    ),
    "causal": (
        "student,smoke",
        [
            "--config.teacher_from={teacher}",
            "--config.student.kind=causal",
            "--config.student.causal.window=4",
            "--config.student.causal.sink=1",
        ],
    ),
    "causal_stage2": (
        "stage2,smoke",
        [
            "--config.teacher_from={teacher}",
            "--config.student_from={causal}",
            "--config.student.kind=causal",
            "--config.student.causal.window=4",
            "--config.student.causal.sink=1",
        ],
    ),
}


def arrays(checkpoint: Path) -> str:
    """One hash of all arrays of a checkpoint, by their bytes, whatever they are called."""
    import numpy as np
    import orbax.checkpoint as ocp

    tree = ocp.PyTreeCheckpointer().restore(checkpoint / "state")
    import jax

    digests = []
    for leaf in jax.tree.leaves(tree):
        x = np.asarray(leaf)
        if x.ndim:  # counters may be added or named anew
            digests.append(hashlib.sha256(str((x.shape, x.dtype)).encode() + x.tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]


def scalars(file: Path) -> str:
    """One hash of what a run logged, times apart."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k != "time"} for line in lines]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, help="keeps the runs; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.workdir or Path(temporary)
        folders = {name: str(root / name) for name in RUNS}
        for name, (config, overrides) in RUNS.items():
            command = [sys.executable, "-m", "greedy_distill_jax.train", f"--config=configs/quickstart.py:{config}"]
            command += [
                f"--workdir={folders[name]}",
                "--config.log.samples_every=0",
                *(o.format(**folders) for o in overrides),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}: {' '.join(command)} ended with {done.returncode}\n{done.stderr[-3000:]}")
            steps = sorted(
                (root / name / "checkpoints").iterdir(), key=lambda p: int(p.name) if p.name.isdigit() else -1
            )
            print(
                f"{name:<20} scalars {scalars(root / name / 'scalars.jsonl')}  arrays {arrays(steps[-1])}", flush=True
            )


if __name__ == "__main__":
    main()
