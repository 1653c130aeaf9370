"""Does RL reduce error accumulation? Every loss of stage "rl", three seeds: numbers as JSON and Markdown, and a plot.

    python benchmarks/rl.py --workdir runs/rl-benchmark --output benchmarks/results/rl

The drift task of ``stage2.py``: wandering shapes, whose heading and tint no caption tells, and an SDD that does not see
frame 0. Stage 2 holds such streams well but for one thing: the colour of a shape wanders. Every row goes on from the
same stage-2 run, all for the same CPU time: "stage 2, longer" with stage 2's own loss, the others with a loss of stage
"rl" and the reward "colour_kept", which measures pixels. What judges them is the oracle's reading (colour, validity,
motion) and the Frechet distance, which no row optimises. "still" rewards a video that does not change, alone and beside
stage 2's loss: rewards can be hacked.

The CPU time of an update is measured first, compilation left out, on seed 0. Each row is tuned alike: its learning rate
times 1/3, 1 and 3, on seed 0 and other videos than the table's; the best, by the change of colour among those whose
Frechet distance is at most one and a half times stage 2's, is taken for all seeds. Streams are 64 and 128
frames long, 8 and 16 times a video of training. Finished cells are kept in the work directory; the same command goes on
where it stopped, and --rows chooses some.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from stage2 import TEST, TUNING, Bench, figure_of, label, leave, mean_error, numbers, single, summary

from greedy_distill_jax import cli
from greedy_distill_jax.distribution.compile_cache import use_compile_cache
from greedy_distill_jax.eval.videos import held_out_videos, sampled
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.storage.checkpoint import load_meta

TASK = "drift"
LENGTHS = (64, 128)  # frames of a judged stream
PILOT = (6, 26)  # updates of a short run between which an update's CPU time is measured
SCALES = (1 / 3, 1.0, 3.0)
WORSE = 1.5  # Frechet distance over stage 2's, up to which a rate may be taken
SHOWN = (
    ("colour", "Colour change, 1e-3 / window"),
    ("drift", "FD growth, 1e-3 / window"),
    ("fd", "FD - real"),
    ("fd_last", "FD - real, last window"),
    ("valid", "Valid"),
    ("motion", "Motion spread / real"),
    ("flicker", "Flicker"),
    ("updates", "Updates"),
    ("extra_cpu_s", "CPU s more"),
)
CURVES = {"colour_by_frame": "colour change, by frame", "fd_by_window": "FD less real, by window of 8 frames"}
LIMITS = {"colour": 0.5, "fd": 1.1, "motion": (0.75, 1.25)}


KEPT = (("colour_kept", 1.0),)
STILL = (("flicker", 1.0),)
LAST = (("rl.step", "last"),)
BEFORE = (("rl.rewards.colour_kept.options", {"since": "previous"}), ("rl.window", 12))


@dataclasses.dataclass(frozen=True)
class Row:
    """A loss of stage "rl" on streams of up to 64 frames, whose last 8 it judges and learns from.

    weight, options: of the loss. regularised: with stage 2's loss beside it. rewards: (name, weight) of each. kl:
    weight of the loss "kl". changes: of other keys.
    """

    loss: str
    weight: float = 1.0
    regularised: bool = False
    options: tuple[tuple[str, object], ...] = ()
    changes: tuple[tuple[str, object], ...] = ()
    rewards: tuple[tuple[str, float], ...] = KEPT
    kl: float = 0.0

    @property
    def scored(self) -> bool:
        """Whether it needs a teacher and a critic."""
        return self.regularised or self.loss == "re_dmd"


ROWS = {
    "direct": Row("direct", 10.0, kl=100.0, changes=LAST),
    "direct, motion": Row("direct", 10.0, kl=100.0, changes=LAST, rewards=(*KEPT, ("motion_band", 0.3))),
    "direct, frame before": Row("direct", 10.0, kl=100.0, changes=(*LAST, *BEFORE)),
    "direct, stage 2's loss": Row("direct", regularised=True, changes=LAST),
    "re_dmd": Row("re_dmd", options=(("beta", 10.0), ("baseline", "batch"))),
    "cm_grpo": Row("cm_grpo", 100.0, options=(("step_weight", "snr"),), changes=(("rl.step", "stochastic"),), kl=1.0),
    "nft": Row("nft", kl=0.1),
    "dpo_chunk": Row("dpo_chunk"),
    "neighbor": Row("neighbor", changes=(("rl.spread", 0.3),), kl=1.0),
    "self_teacher": Row("self_teacher", changes=(("rl.given", 1), ("rl.group", 1), ("data.batch", 16)), rewards=()),
    "still": Row("direct", 10.0, changes=LAST, rewards=STILL),
    "still, stage 2's loss": Row("direct", 10.0, regularised=True, changes=LAST, rewards=STILL),
}
BASE, CONTROL = "stage 2", "stage 2, longer"


class Rows(Bench):
    """Trains and judges rows in a work directory."""

    def __init__(self, workdir: Path, videos: int, speed: str, budget: float):
        super().__init__(workdir, videos, speed)
        self.budget = budget

    def start(self, seed: int) -> tuple[Path, Path]:
        """The teacher, and the stage-2 run that every row goes on from."""
        return self.sources(TASK, seed)[0], self.stage2(TASK, seed, 1.0)

    def row_config(self, name: str, seed: int, scale: float):
        """The configuration of a row, but for its length."""
        teacher, student = self.start(seed)
        if name == CONTROL:
            config = self.config("stage2", TASK, seed)
            config.distill.frames = 32
            config.student_from, config.teacher_from = str(student), str(teacher)
        else:
            config = self.reinforced(ROWS[name], seed)
            config.student_from = str(student)
            if ROWS[name].scored:
                config.teacher_from = str(teacher)
        config.optimizer.learning_rate *= scale
        return config

    def reinforced(self, row: Row, seed: int):
        """The configuration of a loss of stage "rl"."""
        config = self.config("stage3", TASK, seed)
        with config.unlocked():
            config.losses = {"rl": {"loss": row.loss, "weight": row.weight, "options": dict(row.options)}}
            config.rl.rewards = {name: {"reward": name, "weight": weight} for name, weight in row.rewards}
            if row.kl:
                config.losses.kl = {"loss": "kl", "weight": row.kl, "options": {}}
            if row.scored:
                stage2 = self.config("stage2", TASK, seed)
                config.distill, config.critic = stage2.distill, stage2.critic
            if row.regularised:
                config.losses.dmd = stage2.losses.dmd
            config.rl.step = "random"
        return self.changed(config, row.changes)

    def cost(self, name: str) -> float:
        """CPU seconds of an update, the critic's share included, without compilation; of seed 0."""

        def make():
            config = self.row_config(name, 0, 1.0)
            config.steps, config.checkpoint.every, config.checkpoint.keep = PILOT[1], PILOT[0], PILOT[1]
            config.distill.critic_warmup = 0
            folder = self.train(self.folder(0, f"pilot {name}", 1.0), config) / "checkpoints"
            first, last = (load_meta(folder, step=step)["train_cpu_s"] for step in PILOT)
            return {"cpu_s": (last - first) / (PILOT[1] - PILOT[0])}

        return self.cell(f"cost/rl/{name}", make)["cpu_s"]

    def folder(self, seed: int, name: str, scale: float) -> Path:
        """Of a row's run."""
        return self.workdir / f"{TASK}-{seed}" / f"{label(f'rl-{name}')}-x{scale:.2g}-{self.budget:g}s"

    def run(self, name: str, seed: int, scale: float) -> Path:
        """A row's run, trained for the budget."""
        if name == BASE:
            return self.start(seed)[1]
        config = self.row_config(name, seed, scale)
        config.steps = max(2, round(self.budget / self.cost(name)))
        config.distill.critic_warmup = min(config.distill.critic_warmup, config.steps // 4)
        config.checkpoint.every, config.ema.start = config.steps, min(config.ema.start, config.steps // 2)
        return self.train(self.folder(seed, name, scale), config)

    def judged_at(self, name: str, seed: int, scale: float, test: int, videos: int, lengths=LENGTHS) -> dict:
        """Every number of a row's streams, by length."""

        def make():
            use_compile_cache("~/.cache/greedy_distill_jax/xla")
            run, longest = Run.load(self.run(name, seed, scale)), max(lengths)
            real, captions = held_out_videos(run, longest, videos, test)
            reference, _ = held_out_videos(run, longest, videos, test + 1)
            video, out = sampled(run, captions, frames=longest, seed=test), {}
            for frames in lengths:
                parts = (x[:, :frames] for x in (video, real, reference))
                out[str(frames)] = numbers(*parts, captions) | {
                    "extra_cpu_s": 0.0 if name == BASE else run.meta["train_cpu_s"],
                    "updates": 0 if name == BASE else run.meta["steps"],
                }
            return out

        return self.cell(f"rl/{seed}/{name}/x{scale:.2g}/{self.budget:g}s/{test}", make)

    def scale(self, name: str) -> tuple[float, dict[str, list[float]]]:
        """(the best factor of a row's learning rate, what each gave: colour change and Frechet distance)."""
        if name == BASE:
            return 1.0, {}
        short, videos = LENGTHS[:1], self.videos // 2
        before = self.judged_at(BASE, 0, 1.0, TUNING, videos, short)[str(short[0])]
        tried = {s: self.judged_at(name, 0, s, TUNING, videos, short)[str(short[0])] for s in SCALES}
        kept = {s: t for s, t in tried.items() if t["fd"] <= WORSE * before["fd"]} or tried
        best = min(kept, key=lambda s: abs(kept[s]["colour"]) if kept is not tried else kept[s]["fd"])
        return best, {f"{s:.2g}": [t["colour"], t["fd"]] for s, t in tried.items()}


def verdicts(cells: dict[str, list[dict]]) -> list[dict]:
    """Of every row its colour, distance, motion and growth against stage 2's, paired by seed, and whether it passes."""
    out, base = [], cells[BASE]
    for name, of_row in cells.items():
        if name in (BASE, CONTROL):
            continue
        colour = mean_error([a["colour"] / b["colour"] for a, b in zip(of_row, base, strict=True)])
        fd = mean_error([a["fd"] / b["fd"] for a, b in zip(of_row, base, strict=True)])
        slower = {
            other: mean_error([b["drift"] - a["drift"] for a, b in zip(of_row, cells[other], strict=True)])
            for other in (BASE, CONTROL)
            if other in cells
        }
        motion = mean_error([a["motion"] for a in of_row])
        low, high = LIMITS["motion"]
        passed = (
            colour[0] + 2 * colour[1] <= LIMITS["colour"]
            and fd[0] <= LIMITS["fd"]
            and low <= motion[0] <= high
            and all(mean > 2 * error for mean, error in slower.values())
        )
        out.append(
            {"row": name, "colour": colour, "fd": fd, "motion": motion, "slower": slower, "passed": bool(passed)}
        )
    return out


def markdown(result: dict) -> str:
    """The tables, the verdicts and what each row's tuning tried."""
    lines = [
        f"{result['videos']} held-out videos per cell, seeds {result['seeds']}, {result['budget']:g} CPU seconds "
        f"beyond stage 2 for every row; mean (standard error)",
        "",
    ]
    for frames, rows in result["table"].items():
        lines += [f"**streams of {frames} frames**", "", "| row | " + " | ".join(title for _, title in SHOWN) + " |"]
        lines += ["|" + "---|" * (len(SHOWN) + 1)]
        for name, row in rows.items():
            lines.append(f"| {name} | " + " | ".join(figure_of(*row[key]) for key, _ in SHOWN) + " |")
        lines.append("")
    lines += [
        f"Streams of {LENGTHS[0]} frames, paired by seed; a row passes with a colour change of at most "
        f"{LIMITS['colour']:g} of stage 2's, an FD of at most {LIMITS['fd']:g} of it, a motion spread within "
        f"{LIMITS['motion'][0]:g} to {LIMITS['motion'][1]:g} of real videos', and an FD that grows more slowly than in "
        f"stage 2 and its control, beyond two standard errors.",
        "",
        "| row | colour change / stage 2's | FD / stage 2's | growth less than stage 2's | than its control's | |",
        "|---|---|---|---|---|---|",
    ]
    for v in result["verdicts"]:
        slower = [figure_of(*v["slower"][other]) if other in v["slower"] else "" for other in (BASE, CONTROL)]
        lines.append(
            f"| {v['row']} | {figure_of(*v['colour'])} | {figure_of(*v['fd'])} | {slower[0]} | {slower[1]} | "
            f"{'pass' if v['passed'] else 'no'} |"
        )
    lines += ["", "Tuning on seed 0, other videos: colour change and FD at each factor of the learning rate:", ""]
    lines += [
        f"- {name}: " + ", ".join(f"x{s} {colour:.2f} {fd:.3f}" for s, (colour, fd) in tried.items())
        for name, tried in result["tuning"].items()
        if tried
    ]
    return "\n".join(lines) + "\n"


def plot(result: dict, path: Path) -> None:
    """Colour change and Frechet distance along the longest stream, one line per row."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    curves = result["curves"]
    for axis, (key, title) in zip(figure.subplots(1, 2), CURVES.items(), strict=True):
        for name, of_row in curves.items():
            bold = name in (BASE, CONTROL)
            axis.plot(of_row[key], label=name, linewidth=2.5 if bold else 1.2, linestyle="--" if bold else "-")
        axis.set(ylabel=title, ylim=(0, None))
    axis.set_yscale("symlog", linthresh=0.1)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = cli.Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/rl-benchmark"))
    parser.add_argument("--output", type=Path, required=True, help="path without suffix of the .json, .md and .png")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--videos", type=int, default=512, help="held-out videos per cell")
    parser.add_argument("--budget", type=float, default=45.0, help="CPU seconds of every row")
    parser.add_argument("--speed", choices=("full", "smoke"), default="full", help="smoke: a few updates, for CI")
    args = parser.parse_args()
    bench = Rows(args.workdir, args.videos, args.speed, args.budget)
    rows = [BASE, CONTROL, *args.rows]
    for name in rows[1:]:
        bench.cost(name)
    scales, tuning = {}, {}
    for name in rows:
        scales[name], tuning[name] = bench.scale(name)
    cells = {
        name: [bench.judged_at(name, seed, scales[name], TEST, args.videos) for seed in args.seeds] for name in rows
    }
    by_length = {
        str(frames): {name: [cell[str(frames)] for cell in of_row] for name, of_row in cells.items()}
        for frames in LENGTHS
    }
    last = by_length[str(LENGTHS[-1])]
    result = {
        "videos": args.videos,
        "seeds": args.seeds,
        "budget": args.budget,
        "table": {
            frames: {name: summary(of_row) for name, of_row in rows.items()} for frames, rows in by_length.items()
        },
        "verdicts": verdicts(by_length[str(LENGTHS[0])]),
        "scales": scales,
        "tuning": tuning,
        "curves": {
            name: {
                key: np.mean([cell[key] for cell in of_row], 0).tolist() for key in ("colour_by_frame", "fd_by_window")
            }
            for name, of_row in last.items()
        },
        "per_seed": {
            frames: {name: [single(cell) for cell in of_row] for name, of_row in rows.items()}
            for frames, rows in by_length.items()
        },
    }
    leave(args.output, result, markdown, plot)


if __name__ == "__main__":
    cli.run(main)
