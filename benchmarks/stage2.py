"""Does stage 2 help? Every row, three seeds, two tasks: numbers as JSON and Markdown, and a plot.

    python benchmarks/stage2.py --workdir runs/stage2-benchmark --output benchmarks/results/stage2
    python benchmarks/stage2.py ... --explore    # also every fake score, another teacher score and settings

Tasks: "plain" is the quickstart's data. "drift" makes long streams hard: wandering shapes, whose heading and tint no
caption tells, and an SDD that does not see frame 0; there stage 2 rolls out 32 frames and scores random windows of 8
(captions of the plain task tell how a video begins, so only its first window can be scored).

Every row streams 64 frames (8 times the training length) at two network evaluations per frame, four for the first.
"stage1_control" is more of stage 1, for the CPU time that stage 2 cost. Each trained row gets the same tuning budget:
its learning rate times 1/2, 1 and 2, on each task's seed 0 and other videos than the table's; the best rate (by Frechet
distance) is taken for all seeds. "--explore" adds further rows as they are (untuned, one seed, the tuning videos):
every fake score, every teacher score, context noise and the ratio of the learning rates. Finished cells are kept in the
work directory; the same command goes on where it stopped.
"""

import dataclasses
import functools
import json
import re
import sys
import time
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from greedy_distill_jax import cli
from greedy_distill_jax.cli.config_flags import read_config
from greedy_distill_jax.distribution.compile_cache import use_compile_cache
from greedy_distill_jax.eval import gates
from greedy_distill_jax.eval.metrics import evaluate_videos, frechet_distance, random_conv_features
from greedy_distill_jax.eval.videos import held_out_videos, sampled
from greedy_distill_jax.measure.environment import environment
from greedy_distill_jax.measure.record import command_line, write_json
from greedy_distill_jax.quickstart import control_config
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.storage.checkpoint import has_checkpoint, load_meta
from greedy_distill_jax.train import train

WINDOW, FRAMES = 8, 64
ROLLOUT = {"plain": 0, "drift": 32}
TEST, TUNING = 1000, 3000  # seeds of the videos a row is judged, and tuned, on
SCALES = (0.5, 1.0, 2.0)
TEACHER_STEPS = 2000  # shorter than the quickstart's: six teachers are the largest part of the benchmark's time
TASKS = {"plain": "moving_shapes", "drift": "moving_shapes:wandering"}
SHOWN = (
    ("fd", "FD - real"),
    ("fd_last", "FD - real, last window"),
    ("valid", "Valid"),
    ("motion", "Motion spread / real"),
    ("wobble", "Wobble, px"),
    ("drift", "FD growth, 1e-3 / window"),
    ("colour", "Colour change, 1e-3 / window"),
    ("decay", "Validity lost, % / window"),
    ("train_cpu_s", "CPU s"),
)
CURVES = {"valid_by_frame": "valid, by frame", "fd_by_window": "FD less real, by window of 8 frames"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    preset: a config of ``configs/quickstart.py``, and changes to it.
    trained: it is trained beyond stage 1, so it gets tuned.
    teacher, stage1: changes to the teacher that scores it and to the stage-1 student that it starts from.
    """

    preset: str
    changes: tuple[tuple[str, object], ...] = ()
    trained: bool = True
    teacher: tuple[tuple[str, object], ...] = ()
    stage1: tuple[tuple[str, object], ...] = ()


PAPER = "greedy_distill_paper"
OWN = {"loss": "flow_matching", "weight": 0.3, "options": {"weighting": "x0"}}
OWN_TERM = (("distill.fake", "self_fm"), ("losses.own", OWN))
NOISE = (("student.context_noise", 0.3),)
ROWS = {
    "stage1": Row("student", trained=False),
    "stage1_control": Row("student"),
    "stage2": Row("stage2"),
    "stage2_fake_self": Row(PAPER),
}
MORE = {
    "self + own flow matching": Row(PAPER, OWN_TERM),
    "self, averaged": Row(PAPER, (("distill.fake", "self_ema"),)),
    "stage 1 as fake": Row(PAPER, (("distill.fake", "stage1"),)),
    "autoregressive teacher, critic": Row("stage2", (("distill.real", "autoregressive"),)),
    "autoregressive teacher, self + own": Row(PAPER, (("distill.real", "autoregressive"), *OWN_TERM)),
    "per-frame teacher, critic": Row(
        "stage2", (("distill.real", "per_frame"),), teacher=(("losses.flow_matching.options.per_frame", True),)
    ),
    "guidance 2": Row("stage2", (("distill.guidance", 2.0),)),
    "critic every 5": Row("stage2", (("distill.generator_every", 5),)),
    "critic's rate x0.5": Row("stage2", (("critic.optimizer.learning_rate", 5e-4),)),
    "critic's rate x2": Row("stage2", (("critic.optimizer.learning_rate", 2e-3),)),
    "stage 1 with context noise": Row("student", NOISE, trained=False, stage1=NOISE),
    "stage 2 after context noise": Row("stage2", stage1=NOISE),
}


class Bench:
    """Runs and judges cells in a work directory."""

    def __init__(self, workdir: Path, videos: int, speed: str):
        self.workdir, self.videos, self.speed = workdir, videos, speed
        self.cells = workdir / "cells"
        self.cells.mkdir(parents=True, exist_ok=True)

    def cell(self, name: str, make) -> dict:
        """The stored result of a cell, or that of ``make()``."""
        path = self.cells / f"{label(name.replace('/', '-'))}.json"
        if not path.exists():
            begin, cpu = time.time(), time.process_time()
            result = make()
            print(f"{name}: {time.time() - begin:.0f} s, CPU {time.process_time() - cpu:.0f} s", flush=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(result))
            part.rename(path)
        return json.loads(path.read_text())

    def config(self, preset: str, task: str, seed: int, changes=()):
        """A quickstart config on a task."""
        config = read_config(f"configs/quickstart.py:{preset},{self.speed}")
        config.lock()
        config.seed, config.data.source, config.student.anchor = seed, TASKS[task], task == "plain"
        return self.changed(config, changes)

    @staticmethod
    def changed(config, changes):
        """The configuration with (dotted key, value) set."""
        for path, value in changes:
            *parents, last = path.split(".")
            node = functools.reduce(lambda node, key: node[key], parents, config)
            with node.unlocked():  # "losses.own" is a term of its own
                node[last] = value
        return config

    def train(self, directory: Path, config) -> Path:
        """Trains a run to its end, or finds it there."""
        checkpoints, examples = directory / "checkpoints", config.steps * config.data.batch
        if not (has_checkpoint(checkpoints) and load_meta(checkpoints)["data_position"] == examples):
            train(config, directory, show_progress=sys.stderr.isatty())
        return directory

    def sources(self, task: str, seed: int, row: Row = ROWS["stage1"]) -> tuple[Path, Path]:
        """The teacher that scores a row and the stage-1 student that it starts from (always the plain teacher's)."""
        folder = self.workdir / f"{task}-{seed}"

        def teacher(changes) -> Path:
            config = self.config("teacher", task, seed, changes)
            config.steps = min(config.steps, TEACHER_STEPS)
            return self.train(folder / label("teacher", changes), config)

        config = self.config("student", task, seed, row.stage1)
        config.teacher_from = str(teacher(()))
        return teacher(row.teacher), self.train(folder / label("stage1", row.stage1), config)

    def stage2(self, task: str, seed: int, scale: float) -> Path:
        """The run whose CPU time the control may spend."""
        return self.trained(task, seed, "stage2", ROWS["stage2"], scale)

    def trained(self, task: str, seed: int, name: str, row: Row, scale: float, stage2_scale: float = 1.0) -> Path:
        """A row's run at ``scale`` times its learning rate."""
        teacher, stage1 = self.sources(task, seed, row)
        if not row.trained:
            return stage1
        config = self.config(row.preset, task, seed, row.changes)
        if (config.stage, config.distill.real, config.distill.fake) == ("dmd", "joint", "critic"):
            config.distill.frames = ROLLOUT[task]
        config.teacher_from, config.student_from = str(teacher), str(stage1)
        if name == "stage1_control":
            config = control_config(config, stage1, self.stage2(task, seed, stage2_scale))
        for rate in ("learning_rate", "muon_rate"):
            config.optimizer[rate] *= scale
        return self.train(self.workdir / f"{task}-{seed}" / f"{label(name)}-x{scale}", config)

    def judged(self, directory: Path, task: str, test: int, videos: int) -> dict:
        """Every number of one run's streams."""
        use_compile_cache("~/.cache/greedy_distill_jax/xla")
        run = Run.load(directory)
        few = self.config("stage2", task, 0).sample
        real, captions = held_out_videos(run, FRAMES, videos, test)
        reference, _ = held_out_videos(run, FRAMES, videos, test + 1)
        video = sampled(run, captions, frames=FRAMES, seed=test, steps=few.steps)
        return numbers(video, real, reference, captions) | {"train_cpu_s": run.meta["train_cpu_s"]}

    def tried(self, task: str, name: str, row: Row, scale: float, stage2_scale: float = 1.0) -> dict:
        """A row on the tuning videos, seed 0."""

        def make():
            directory = self.trained(task, 0, name, row, scale, stage2_scale)
            return self.judged(directory, task, TUNING, self.videos // 2)

        return self.cell(f"tune/{task}/{name}/x{scale}", make)

    def scale(self, task: str, name: str, row: Row, stage2_scale: float = 1.0) -> tuple[float, dict]:
        """The best learning-rate factor of a row, and what each one gave; stage 2's is known before the control's."""
        if not row.trained:
            return 1.0, {}

        tried = {scale: self.tried(task, name, row, scale, stage2_scale) for scale in SCALES}
        return min(tried, key=lambda s: tried[s]["fd"]), {str(s): t["fd"] for s, t in tried.items()}


def label(name: str, changes=()) -> str:
    """A folder's or file's name."""
    return re.sub(r"[^\w.-]+", "_", "-".join([name, *(f"{path}={value}" for path, value in changes)]))


def slope(curve, windows: int) -> float:
    """Least-squares slope per window of a curve over frames or windows."""
    means = np.asarray(curve).reshape(windows, -1).mean(1)
    return float(np.polyfit(np.arange(len(means)), means, 1)[0])


def by_window(video, reference) -> np.ndarray:
    """Frechet distance of every window of frames to the same window of the reference."""
    cuts = range(0, video.shape[1], WINDOW)
    pairs = ((random_conv_features(v[:, i : i + WINDOW]) for v in (video, reference)) for i in cuts)
    return np.asarray([frechet_distance(*pair) for pair in pairs])


def numbers(video, real, reference, captions) -> dict:
    """What the table and the plot show; Frechet distances less those of real videos."""
    m = evaluate_videos(video, captions, window=WINDOW, reference_VTHWC=reference)
    r = evaluate_videos(real, captions, window=WINDOW, reference_VTHWC=reference)
    floor, windows = by_window(real, reference), video.shape[1] // WINDOW
    distance = by_window(video, reference) - floor
    return {
        "fd": gates.corrected_fd(m, r),
        "fd_windows": float(distance.mean()),
        "fd_real": float(floor.mean()),
        "fd_first": m["fd_first"] - r["fd_first"],
        "fd_last": m["fd_last"] - r["fd_last"],
        "valid": float(np.mean(m["valid_by_frame"])),
        "motion": gates.motion_spread(m, r),
        "motion_last": m["step_std_last"] / r["step_std_last"],
        "wobble": m["wobble"],
        "flicker": m["flicker"],
        "drift": 1e3 * slope(distance, windows),
        "colour": 1e3 * slope(m["colour_change_by_frame"], windows),
        "decay": -100 * slope(m["valid_by_frame"], windows),
        "valid_by_frame": m["valid_by_frame"],
        "colour_by_frame": m["colour_change_by_frame"],
        "fd_by_window": distance.tolist(),
    }


def controls(bench: Bench, task: str) -> dict[str, dict]:
    """What must fail: frame 0 of every stream repeated, and a student that was not trained."""
    directory = bench.sources(task, 0)[1]
    run = Run.load(directory)
    real, captions = held_out_videos(run, FRAMES, bench.videos, TEST)
    reference, _ = held_out_videos(run, FRAMES, bench.videos, TEST + 1)
    frozen = np.repeat(sampled(run, captions, frames=run.model.cfg.chunk, seed=TEST)[:, :1], FRAMES, axis=1)
    run.params = jax.jit(lambda key: run.model.init(key, run.latent_shape))(jax.random.key(0))
    untrained = sampled(run, captions, frames=FRAMES, seed=TEST, steps=2)
    return {
        name: numbers(video, real, reference, captions) | {"train_cpu_s": 0.0}
        for name, video in (("frame 0 repeated", frozen), ("untrained", untrained))
    }


def mean_error(values) -> tuple[float, float]:
    """Mean and standard error over seeds; the error of one seed is nan."""
    values = np.asarray(values, float)
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(values.mean()), float(error)


def single(cell: dict) -> dict:
    """The numbers of a cell, without its curves."""
    return {key: value for key, value in cell.items() if not isinstance(value, list)}


def summary(cells: list[dict]) -> dict[str, tuple[float, float]]:
    """Mean and standard error over seeds of every number."""
    return {key: mean_error([cell[key] for cell in cells]) for key in single(cells[0])}


def verdicts(table: dict[str, dict[str, dict]]) -> list[dict]:
    """The three claims of stage 2, with their figures."""
    out = []
    if "plain" in table:
        rows = table["plain"]
        ratio, motion = rows["stage2"]["fd"][0] / rows["stage1"]["fd"][0], rows["stage2"]["motion"][0]
        low, high = gates.MOTION
        limit = gates.STAGE2_FD
        out.append(("FD of stage 2 over stage 1, less real", ratio, f"<= {limit}", ratio <= limit))
        out.append(("motion spread of stage 2 over real", motion, f"{low} to {high}", low <= motion <= high))
    # The error of a single seed is not known.
    known = "drift" in table and not np.isnan(table["drift"]["stage2"]["drift"][1])
    for other in ("stage1", "stage1_control") if known else ():
        (a, ea), (b, eb) = (table["drift"][name]["drift"] for name in ("stage2", other))
        errors = (b - a) / (ea**2 + eb**2) ** 0.5
        out.append((f"FD growth of {other} less that of stage 2, in standard errors", errors, "> 2", errors > 2))
    return [dict(zip(("name", "value", "limit", "passed"), verdict, strict=True)) for verdict in out]


def passes(numbers: dict, stage1: dict) -> bool:
    """The gate a row's numbers must pass on the plain task: close to real videos, and moving like them."""
    low, high = gates.MOTION
    return numbers["fd"] <= gates.STAGE2_FD * stage1["fd"][0] and low <= numbers["motion"] <= high


def markdown(result: dict) -> str:
    """The tables, the verdicts and what each row's tuning tried."""
    lines = [f"{result['videos']} held-out videos per cell, seeds {result['seeds']}; mean (standard error)", ""]
    tables = dict(result["table"])
    tables |= {
        f"exploration: {task}, seed 0, untuned, tuning videos": rows for task, rows in result["exploration"].items()
    }
    for task, rows in tables.items():
        lines += [f"**{task}**", "", "| row | " + " | ".join(title for _, title in SHOWN) + " |"]
        lines += ["|" + "---|" * (len(SHOWN) + 1)]
        for name, row in rows.items():
            cells = [figure_of(*row[key]) for key, _ in SHOWN]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    for v in result["verdicts"]:
        lines.append(f"- {'pass' if v['passed'] else 'FAIL'}: {v['name']} {v['value']:.2f} ({v['limit']})")
    lines += ["", "Tuning, FD at each factor of the learning rate (seed 0, other videos):", ""]
    lines += [
        f"- {task}, {name}: " + ", ".join(f"x{s} {fd:.4f}" for s, fd in tried.items())
        for task, rows in result["tuning"].items()
        for name, tried in rows.items()
        if tried
    ]
    return "\n".join(lines) + "\n"


def figure_of(mean: float, error: float) -> str:
    digits = 0 if abs(mean) >= 20 else 4 if abs(mean) < 0.2 else 2
    return f"{mean:.{digits}f}" + ("" if np.isnan(error) else f" ({error:.{digits}f})")


def plot(result: dict, path: Path) -> None:
    """Validity and Frechet distance over the stream, one line per row; the untrained control is far outside."""
    figure = Figure(figsize=(10, 3.4 * len(result["curves"])), layout="constrained")
    axes = figure.subplots(len(result["curves"]), 2, squeeze=False)
    for line, (task, rows) in zip(axes, result["curves"].items(), strict=True):
        for axis, (key, title) in zip(line, CURVES.items(), strict=True):
            for name, curves in rows.items():
                if name != "untrained":
                    axis.plot(curves[key], label=name)
            axis.set(title=task, ylabel=title, ylim=(0, None))
        line[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def leave(output: Path, result: dict, markdown, plot) -> None:
    """Writes OUTPUT.json, OUTPUT.md and OUTPUT.png, with what made them, and prints the page."""
    command = command_line(f"benchmarks/{Path(sys.argv[0]).name}", sys.argv[1:])
    result = result | environment() | {"command": command}
    write_json(output.with_suffix(".json"), result)
    output.with_suffix(".md").write_text(markdown(result))
    plot(result, output.with_suffix(".png"))
    print(markdown(result))


def main() -> None:
    """Command line."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/stage2-benchmark"))
    parser.add_argument("--output", type=Path, required=True, help="path without suffix of the .json, .md and .png")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--videos", type=int, default=512, help="held-out videos per cell")
    parser.add_argument("--explore", action="store_true", help="further rows, untuned, one seed")
    parser.add_argument("--speed", choices=("full", "smoke"), default="full", help="smoke: a few updates, for CI")
    args = parser.parse_args()
    bench = Bench(args.workdir, args.videos, args.speed)
    headline = dict(ROWS)
    scales, tuning = ({task: {} for task in args.tasks} for _ in range(2))
    for task in args.tasks:
        for name in ("stage1", "stage2", "stage1_control", "stage2_fake_self"):  # the control needs stage 2's cost
            best = scales[task].get("stage2", 1.0)
            scales[task][name], tuning[task][name] = bench.scale(task, name, headline[name], best)
    per_seed: dict[str, dict[str, list[dict]]] = {}
    for task in args.tasks:
        per_seed[task] = {}
        for seed in args.seeds:
            for name, row in headline.items():

                def make(task=task, seed=seed, name=name, row=row):
                    directory = bench.trained(task, seed, name, row, scales[task][name], scales[task]["stage2"])
                    return bench.judged(directory, task, TEST, args.videos)

                per_seed[task].setdefault(name, []).append(bench.cell(f"{task}/{seed}/{name}", make))
    for task in args.tasks:
        for name, cell in bench.cell(f"{task}/controls", lambda t=task: controls(bench, t)).items():
            per_seed[task][name] = [cell]
    table = {task: {name: summary(cells) for name, cells in rows.items()} for task, rows in per_seed.items()}
    result = {
        "videos": args.videos,
        "seeds": args.seeds,
        "table": table,
        "verdicts": verdicts(table),
        "tuning": tuning,
        "scales": scales,
        "curves": {
            task: {
                name: {key: np.mean([c[key] for c in cells], 0).tolist() for key in CURVES}
                for name, cells in rows.items()
            }
            for task, rows in per_seed.items()
        },
        "per_seed": {
            task: {name: [single(cell) for cell in cells] for name, cells in rows.items()}
            for task, rows in per_seed.items()
        },
        "exploration": {
            task: {name: summary([bench.tried(task, name, row, 1.0)]) for name, row in (headline | MORE).items()}
            for task in args.tasks
        }
        if args.explore
        else {},
    }
    if "plain" in table:
        result["controls_fail"] = {
            name: not passes(per_seed["plain"][name][0], table["plain"]["stage1"])
            for name in ("frame 0 repeated", "untrained")
        }
    leave(args.output, result, markdown, plot)


if __name__ == "__main__":
    cli.run(main)
