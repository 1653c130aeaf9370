"""Diagonal Distillation at small size: what do its parts give, and what does a frame cost? JSON, Markdown, and a plot.

    python benchmarks/diagonal.py --workdir runs/diagonal-benchmark --output benchmarks/results/diagonal

Tasks as in ``stage2.py`` ("plain", and "drift", where long streams are hard), students ETM + SDD and causal, both
frame by frame. Every row is stage 2 from the same stage-1 student: another step plan, context, motion loss or history
gradient, the rest as in ``configs/quickstart.py:stage2``, one learning rate for all. Every row has the CPU time that
"uniform 4" has for the configuration's updates: the cost of an update of every row is measured first, compilation left
out, on seed 0. Every row streams 64 frames, 8 times the training length, and is timed beside the others of its student,
one video at a time: its first second (8 frames), its first 21 frames and frames behind those.

Finished cells are kept in the work directory; the same command goes on where it stopped. Parts of it, chosen by
--tasks, --students, --seeds and --rows, may run one after the other; the table is of the cells that were asked for.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure
from stage2 import FRAMES, ROLLOUT, TEST, Bench, figure_of, label, leave, mean_error, numbers, single, summary

from greedy_distill_jax import cli
from greedy_distill_jax.distribution.compile_cache import use_compile_cache
from greedy_distill_jax.eval.videos import held_out_videos, sampled
from greedy_distill_jax.measure import clock
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.storage.checkpoint import load_meta
from greedy_distill_jax.streaming.session import programs

SECOND, SHORT = 8, 21  # frames of the first second (config.log.fps), and of the gate
LIMITS = {"quality": 0.95, "validity": 0.95, "time": 0.65}  # of uniform 4's, the first two at least, the last at most
PILOT = (6, 36)  # updates of a short run between which an update's CPU time is measured, behind all compilation
SHOWN = (
    ("fd", "FD - real"),
    ("fd_first", "first window"),
    ("fd_last", "last window"),
    ("valid", "Valid"),
    ("motion", "Motion spread / real"),
    ("drift", "FD growth, 1e-3 / window"),
    ("colour", "Colour change, 1e-3 / window"),
    ("updates", "Updates"),
    ("train_cpu_s", "CPU s"),
)
PAIRED = ("fd_first", "fd", "motion", "drift", "colour")
TIMES = (("second", "ms, first second"), ("short", f"ms, first {SHORT} frames"), ("steady", "ms, later"))

UNIFORM = {n: (("sample.steps", n), ("distill.exit", "random")) for n in (4, 2)}
DIAGONAL = (("sample.steps", "diagonal-4322222"), ("distill.exit", "random_but_first"))
LAST_STEP = (("student.context", "last_step_kv"),)
LEVEL = 0.357  # t_ctx = 100 of 1000 after the shift of 5, as published
RENOISE = (("sample.context_sigma", LEVEL),)
EVEN = (("sample.steps", (4, 3, 2)), ("distill.exit", "random_but_first"))  # spread evenly before the shift
MOTION = (("losses.motion", {"loss": "motion", "weight": 1.0, "options": {}}),)
HEAD = (("losses.motion", {"loss": "motion_head", "weight": 1.0, "options": {}}),)
PARAMS = (("distill.context_grad_sdd", "params"),)
ROWS = {
    "uniform 4": UNIFORM[4],
    "uniform 2": UNIFORM[2],
    "diagonal": DIAGONAL,
    "diagonal, renoise": (*DIAGONAL, *RENOISE),
    "diagonal, last step": (*DIAGONAL, *LAST_STEP),
    "diagonal, motion": (*DIAGONAL, *MOTION),
    "diagonal, history gradient": (*DIAGONAL, *PARAMS),
    "diagonal, motion head": (*DIAGONAL, *HEAD),
    "diagonal, even levels": EVEN,
    "diagonal, last step, motion": (*DIAGONAL, *LAST_STEP, *MOTION),
}
STUDENTS = ("etm_sdd", "causal")


@dataclasses.dataclass(frozen=True)
class Cell:
    """Where a row stands."""

    task: str
    student: str
    seed: int

    @property
    def name(self) -> str:
        """Of its cells and folders."""
        return f"{self.task}/{self.student}/{self.seed}"


class Rows(Bench):
    """Trains, judges and times rows in a work directory."""

    def of(self, cell: Cell, preset: str, changes=()):
        """A quickstart config of a cell's student."""
        config = self.config(preset, cell.task, cell.seed)
        if cell.student == "causal":
            sink = int(cell.task == "plain")
            config.student.update(kind="causal", anchor=True)
            config.student.causal.update(window=4 + sink, sink=sink, rope_mode="relative")
        return self.changed(config, changes)

    def start(self, cell: Cell) -> tuple[Path, Path]:
        """The teacher, which both students share, and the stage-1 student."""
        if cell.student == "etm_sdd":
            return self.sources(cell.task, cell.seed)
        teacher = self.sources(cell.task, cell.seed)[0]
        config = self.of(cell, "student")
        config.teacher_from = str(teacher)
        return teacher, self.train(self.workdir / f"{cell.task}-{cell.seed}" / "stage1-causal", config)

    def stage2_config(self, cell: Cell, row: str):
        """The configuration of a row."""
        config = self.of(cell, "stage2", ROWS[row])
        config.distill.frames = ROLLOUT[cell.task]
        config.teacher_from, config.student_from = map(str, self.start(cell))
        return config

    def folder(self, cell: Cell, name: str) -> Path:
        """Of a row's run."""
        return self.workdir / f"{cell.task}-{cell.seed}" / label(f"{cell.student}-{name}")

    def cost(self, cell: Cell, row: str) -> float:
        """CPU seconds of an update (generator's and critic's as they alternate), of seed 0, without compilation."""
        cell = dataclasses.replace(cell, seed=0)

        def make():
            config = self.stage2_config(cell, row)
            config.steps, config.checkpoint.every, config.checkpoint.keep = PILOT[1], PILOT[0], PILOT[1]
            config.distill.critic_warmup = 0
            folder = self.train(self.folder(cell, f"pilot {row}"), config) / "checkpoints"
            first, last = (load_meta(folder, step=step)["train_cpu_s"] for step in PILOT)
            return {"cpu_s": (last - first) / (PILOT[1] - PILOT[0])}

        return self.cell(f"cost/{cell.task}/{cell.student}/{row}", make)["cpu_s"]

    def run(self, cell: Cell, row: str) -> Path:
        """A row's run, trained for the CPU time of "uniform 4"."""
        config = self.stage2_config(cell, row)
        if row != "uniform 4":
            config.steps = max(2, round(config.steps * self.cost(cell, "uniform 4") / self.cost(cell, row)))
            config.distill.critic_warmup = min(config.distill.critic_warmup, config.steps - 1)
        return self.train(self.folder(cell, row), config)

    def result(self, cell: Cell, row: str) -> dict:
        """Every number of a row's streams."""

        def make():
            use_compile_cache("~/.cache/greedy_distill_jax/xla")
            run = Run.load(self.run(cell, row))
            real, captions = held_out_videos(run, FRAMES, self.videos, TEST)
            reference, _ = held_out_videos(run, FRAMES, self.videos, TEST + 1)
            video = sampled(run, captions, frames=FRAMES, seed=TEST)
            return numbers(video, real, reference, captions) | {
                "train_cpu_s": run.meta["train_cpu_s"],
                "updates": run.meta["steps"],
            }

        return self.cell(f"{cell.name}/{row}", make)

    def times(self, task: str, student: str, seed: int, rows, repeats: int = 15) -> dict[str, dict[str, float]]:
        """CPU ms per frame of the rows of a student, one video at a time, all in turns; medians over turns."""
        cell = Cell(task, student, seed)

        def make():
            runs = {row: Run.load(self.run(cell, row)) for row in rows}
            laps, lengths = clock.Laps(), 2 * SHORT
            calls = {}
            for row, run in runs.items():
                calls[row] = programs(run.streamer()), run.text(["a red square moving left"])
            for turn in range(repeats + 1):
                for row, run in runs.items():
                    own, text = calls[row]
                    state = own.init(run.params, text, jax.random.key(0), run.latent_shape[1:])
                    for frame in range(lengths):
                        state, _ = laps.time((row, frame), own.step(frame), run.params, state, per=1, counts=turn > 0)
            frames = {row: np.asarray([laps.median_ms((row, n)) for n in range(lengths)]) for row in rows}
            return {
                row: {
                    "second": float(ms[:SECOND].mean()),
                    "short": float(ms[:SHORT].mean()),
                    "steady": float(ms[SHORT:].mean()),
                }
                for row, ms in frames.items()
            }

        return self.cell(f"times/{cell.name}/{'-'.join(rows)}", make)


def gates_of(cells: dict[str, list[dict]], times: dict[str, dict[str, float]]) -> list[dict]:
    """What every diagonal row keeps of "uniform 4", paired by seed, with standard errors, and at what time.

    Quality, 1 - the gap in FD over the FD of "uniform 2", is asked of the first window, videos as long as in training
    (the paper's are, too); that of the whole stream stands beside it.

    Args:
      cells: the results of every row, by seed.
      times: of every row.
    """
    out = []
    uniform, two = cells["uniform 4"], cells["uniform 2"]
    for row in (row for row in cells if row.startswith("diagonal")):
        pairs = list(zip(cells[row], uniform, two, strict=True))
        quality, stream = (mean_error([1 - (a[k] - b[k]) / c[k] for a, b, c in pairs]) for k in ("fd_first", "fd"))
        validity = mean_error([a["valid"] / max(b["valid"], 1e-6) for a, b, _ in pairs])
        time = times[row]["short"] / times["uniform 4"]["short"]
        kept = all(mean - 2 * error >= LIMITS[k] for k, (mean, error) in _named(quality, validity))
        passed = None if len(pairs) == 1 else bool(kept and time <= LIMITS["time"])  # one seed has no error
        out.append(
            {"row": row, "quality": quality, "quality_of_stream": stream, "validity": validity, "time": time}
            | {"passed": passed}
        )
    return out


def differences(cells: dict[str, list[dict]]) -> dict[str, dict[str, tuple[float, float]]]:
    """What every row has more of than "diagonal", paired by seed, with standard errors."""
    rows = {row: of_row for row, of_row in cells.items() if row.startswith("diagonal, ")}
    return {
        row: {
            key: mean_error([a[key] - b[key] for a, b in zip(of_row, cells["diagonal"], strict=True)]) for key in PAIRED
        }
        for row, of_row in rows.items()
    }


def _named(quality, validity):
    return (("quality", quality), ("validity", validity))


def markdown(result: dict) -> str:
    """The tables and the gates."""
    lines = [f"{result['videos']} held-out videos per cell, seeds {result['seeds']}; mean (standard error)", ""]
    for name, part in result["parts"].items():
        columns = [title for _, title in (*SHOWN, *TIMES)]
        lines += [f"**{name}**", "", "| row | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
        for row, values in part["table"].items():
            cells = [figure_of(*values[key]) for key, _ in SHOWN] + [
                f"{part['times'][row][key]:.3f}" for key, _ in TIMES
            ]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        titles = dict(SHOWN)
        lines += ["", "Less the row diagonal, paired by seed:", ""]
        lines += ["| row | " + " | ".join(titles[key] for key in PAIRED) + " |", "|" + "---|" * (len(PAIRED) + 1)]
        for row, values in part["differences"].items():
            lines.append(f"| {row} | " + " | ".join(figure_of(*values[key]) for key in PAIRED) + " |")
        lines += ["", f"Of uniform 4's: quality of the first window >= {LIMITS['quality']} and validity >= "]
        lines[-1] += f"{LIMITS['validity']}, both by two standard errors, at <= {LIMITS['time']} of its time over the "
        lines[-1] += f"first {SHORT} frames:"
        lines += [""]
        for g in part["gates"]:
            kept = ", ".join(f"{k} {m:.3f} ({e:.3f})" for k, (m, e) in _named(g["quality"], g["validity"]))
            kept += ", quality of the whole stream {:.3f} ({:.3f})".format(*g["quality_of_stream"])
            verdict = {True: "pass", False: "FAIL", None: "one seed, not judged"}[g["passed"]]
            lines.append(f"- {verdict}: {g['row']}: {kept}, time {g['time']:.3f}")
        lines.append("")
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """Quality against time, a line of panels for every task and student: the frontier of the plans."""
    figure = Figure(figsize=(10, 4 * len(result["parts"])), layout="constrained")
    panels = figure.subplots(len(result["parts"]), 2, squeeze=False)
    for line, (name, part) in zip(panels, result["parts"].items(), strict=True):
        for axis, (key, what) in zip(line, (("fd_first", "first 8 frames"), ("fd", "first and last 8")), strict=True):
            for number, (row, values) in enumerate(part["table"].items()):
                mean, error = values[key]
                marker = "s" if row.startswith("uniform") else "o^vDPX*<>"[number % 9]
                error = None if np.isnan(error) else error
                axis.errorbar(part["times"][row]["short"], mean, error, fmt=marker, capsize=3, label=row)
            axis.set(title=name, xlabel=f"CPU ms per frame, first {SHORT} frames", ylabel=f"FD less real, {what}")
        line[1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = cli.Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/diagonal-benchmark"))
    parser.add_argument("--output", type=Path, required=True, help="path without suffix of the .json, .md and .png")
    parser.add_argument("--tasks", nargs="+", choices=list(ROLLOUT), default=["plain"])
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="besides the uniform ones")
    parser.add_argument("--videos", type=int, default=512, help="held-out videos per cell")
    parser.add_argument("--speed", choices=("full", "smoke"), default="full", help="smoke: a few updates, for CI")
    args = parser.parse_args()
    bench = Rows(args.workdir, args.videos, args.speed)
    rows = [row for row in ROWS if row.startswith("uniform") or row in args.rows]
    parts = {}
    for task in args.tasks:
        for student in args.students:
            cells = {row: [bench.result(Cell(task, student, seed), row) for seed in args.seeds] for row in rows}
            times = bench.times(task, student, args.seeds[0], rows)
            parts[f"{task}, {student}"] = {
                "table": {row: summary(of_row) for row, of_row in cells.items()},
                "times": times,
                "differences": differences(cells) if "diagonal" in cells else {},
                "gates": gates_of(cells, times),
                "cost": {row: bench.cost(Cell(task, student, 0), row) for row in rows},
                "per_seed": {row: [single(cell) for cell in of_row] for row, of_row in cells.items()},
            }
    leave(args.output, {"videos": args.videos, "seeds": args.seeds, "parts": parts}, markdown, plot)


if __name__ == "__main__":
    cli.run(main)
