"""A teacher, the students distilled from it and real videos, sampled for the same captions: what suites measure."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from greedy_distill_jax.data.sources.moving_shapes import is_shapes
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval.videos import held_out_videos, sampled
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.storage.checkpoint import load_meta

HORIZON = 8  # rollouts are this many times longer than training videos
TAKEN = ("", "data", "teacher", "stage1", "stage1_few_steps")  # rows of every report


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of a comparison: real videos, or the videos of a run with some number of steps.

    Attributes:
      name: of the row.
      video_VTHWC: one video per caption.
      run: that made them; None for real videos.
      directory: of the run.
      steps: denoising steps, per frame for a student and per video for a teacher; None for real videos.
      about: what it is, in a sentence.
      own_history: row of the same stream on its own history, of one on real history; "" for all others.
    """

    name: str
    video_VTHWC: UInt8[np.ndarray, "V T H W 3"]
    run: Run | None = None
    directory: Path | None = None
    steps: int | str | None = None
    about: str = ""
    own_history: str = ""

    @property
    def train_seed(self) -> int | None:
        """Seed of the run's training."""
        return self.run.settings.seed if self.run else None

    @property
    def train_cpu_s(self) -> float:
        """CPU seconds of the run's training."""
        return self.run.meta["train_cpu_s"] if self.run else 0.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything that a suite may look at.

    Attributes:
      entries: by name, in the order of the rows: "data", "teacher", "stage1", "stage1_few_steps", the further
        students, and those that ``histories.with_real_histories`` adds.
      captions: of the videos, V of them.
      teacher, student: the runs that are compared in every report.
      few_steps: steps of the few-step rows, see ``StepPlan.parse``.
      seed: of held-out data and noise.
      lengths: lengths of video at which time is measured; None lets the suite choose.
    """

    entries: Mapping[str, Entry]
    captions: Sequence[str]
    teacher: Run
    student: Run
    few_steps: Any
    seed: int
    lengths: Sequence[int] | None = None

    @property
    def training_frames(self) -> int:
        """Latent frames of a training video."""
        return self.teacher.latent_shape[0]

    @property
    def data(self) -> str:
        """What the runs were trained on."""
        return self.teacher.settings.data.source

    @property
    def of_shapes(self) -> bool:
        """Whether the data are the embedded moving shapes, which an oracle reads."""
        return is_shapes(self.data)

    @functools.cached_property
    def reference_VTHWC(self) -> UInt8[np.ndarray, "V T H W 3"]:
        """Other real videos than the data row's, as long as a rollout, so that the data row is the floor."""
        frames = HORIZON * self.training_frames
        return held_out_videos(self.teacher, frames, len(self.captions), self.seed + 1)[0]


def few_step_setting(run: Run) -> Any:
    """Returns the few-step setting that is shown beside the many-step one of a student, see ``StepPlan.parse``."""
    if run.model.cfg.context == "last_step_kv":
        return run.settings.sample.steps
    return min(2, int(run.settings.plan.lengths[-1]))


def shown_steps(run: Run, steps: Any) -> int | str:
    """Returns numbers of steps as a row shows them: 16, or "4,2" where chunks differ."""
    lengths = run.settings.plan_with(steps).lengths.tolist() if run.is_student else [steps]
    return lengths[0] if len(lengths) == 1 else ",".join(map(str, lengths))


def load_runs(teacher: str | Path, student: str | Path, more: Mapping[str, str | Path]) -> dict[str, Run]:
    """Loads the runs of a comparison by row: "teacher", "stage1" and the names of ``more``.

    Raises:
      UserError: with field "teacher", "student" or "more": no run, one of the other kind, or runs that do not belong
        together.
    """
    runs = {"teacher": _load("teacher", teacher, False), "stage1": _load("student", student, True)}
    for name, directory in more.items():
        if name in TAKEN:
            raise UserError(f"{name!r} cannot be the row of {directory}, which others have; call it OTHER.", "more")
        runs[name] = _load("more", directory, True, f"{name}: ")
    frames, trained = runs["teacher"].latent_shape[0], _data_of(runs["teacher"])
    for name, run in list(runs.items())[1:]:
        field, directory = ("student", student) if name == "stage1" else ("more", f"{name}={more[name]}")
        if _data_of(run) != trained:
            raise UserError(
                f"{directory} was trained on {_data_of(run)}, the teacher {teacher} on {trained}; give runs that "
                "belong together.",
                field,
            )
        if HORIZON * frames % run.model.cfg.chunk:
            raise UserError(
                f"{directory} makes chunks of {run.model.cfg.chunk} frames, which do not divide the {HORIZON} x "
                f"{frames} frames that are streamed; train with another chunk or frame count.",
                field,
            )
    return runs


def _about(name: str, run: Run, directory: Path, steps: int | str) -> str:
    """What a row of a run is, in a sentence."""
    if not run.is_student:
        return f"The bidirectional teacher, {steps} steps for a whole video; run {directory.name}."
    told = {
        "stage1": "The student that the report is about, with its own steps",
        "stage1_few_steps": "The same student with few steps, as the further students are sampled",
    }.get(name, "A further student")
    return f"{told}: {steps} per frame; stage {run.settings.stage}, run {directory.name}."


def _load(field: str, directory: str | Path, is_student: bool, row: str = "") -> Run:
    """A run of the wanted kind; errors are the argument's."""
    try:
        checkpoints = Path(directory).expanduser() / "checkpoints"
        if checkpoints.is_dir() and "train_cpu_s" not in load_meta(checkpoints):
            raise UserError(
                f"{directory} holds weights that were imported; a report compares runs on the data that they were "
                f"trained on here. Look at its videos with `python -m greedy_distill_jax.sample`, or train a run from "
                f"them (config.teacher_from, config.student_from) and evaluate that."
            )
        run = Run.load(directory)
    except UserError as error:
        raise UserError(f"{row}{error}", field) from error
    if run.is_student != is_student:
        held, wanted = ("teacher", "student") if is_student else ("student", "teacher")
        raise UserError(f"{row}{Path(directory)} holds a {held}; give the run directory of a {wanted}.", field)
    return run


def _data_of(run: Run) -> str:
    """What a run was trained on, in words: source and latent shape."""
    return f"{run.settings.data.source} ({'x'.join(map(str, run.latent_shape))})"


def compare(
    runs: Mapping[str, Run],
    directories: Mapping[str, str | Path],
    *,
    videos: int,
    seed: int,
    lengths: Sequence[int] | None = None,
    announce: Callable[[str], None] = print,
) -> Comparison:
    """Samples every row of a comparison.

    Args:
      runs: by row, of ``load_runs``. Every further student is streamed with the step lists of the one of them with the
        fewest steps, as is the student itself in its few-step row.
      directories: of the runs, by row.
      videos: held-out captions at most.
      seed: of held-out data and noise.
      lengths: of the timing, see ``Comparison``.
      announce: is told what is being done.

    Raises:
      UserError: the data have no held-out videos.
    """
    teacher, student, *others = runs.values()
    frames = teacher.latent_shape[0]
    long = HORIZON * frames
    real, captions = held_out_videos(teacher, long if is_shapes(teacher.settings.data.source) else frames, videos, seed)
    few = few_step_setting(student)
    if others:
        few = min(others, key=lambda run: int(run.settings.plan.lengths[-1])).settings.sample.steps
    announce(f"evaluate: {len(captions)} held-out videos per model, students to {long} frames")
    todo = {
        "teacher": ("teacher", frames, teacher.settings.sample.steps),
        "stage1": ("stage1", long, student.settings.sample.steps),
        "stage1_few_steps": ("stage1", long, few),
        **{name: (name, long, few) for name in list(runs)[2:]},
    }
    entries = {"data": Entry("data", real, about="Real videos that no run was trained on.")}
    for name, (row, length, steps) in tqdm(todo.items(), desc="sampling", disable=not sys.stderr.isatty()):
        run = runs[row]
        video = sampled(run, captions, frames=length, seed=seed, steps=steps)
        shown, where = shown_steps(run, steps), Path(directories[row])
        entries[name] = Entry(name, video, run, where, shown, _about(name, run, where, shown))
    return Comparison(entries, captions, teacher, student, few, seed, lengths)
