"""A teacher, the students distilled from it and real videos, sampled for the same captions: what suites measure."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from greedy_distill_jax.data.sources.moving_shapes import is_shapes
from greedy_distill_jax.errors import UserError, about
from greedy_distill_jax.eval.videos import held_out_shape, held_out_videos, sampled
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.runs.run import Run, is_trained
from greedy_distill_jax.storage.checkpoint import load_meta
from greedy_distill_jax.weights.source import ENCODER, HASHED

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
        return self.run.settings.seed if self.run and self.run.trained else None

    @property
    def train_cpu_s(self) -> float:
        """CPU seconds of the run's training."""
        return self.run.meta["train_cpu_s"] if self.run and self.run.trained else 0.0


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
        """What the runs are compared on."""
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


class Held(NamedTuple):
    """Held-out data to judge imported weights on, where no trained run tells; see ``Run.load`` for text and codec.

    data: as ``config.data.source``. text: encodes its captions. codec: decodes latents.
    """

    data: str | None = None
    text: str | None = None
    codec: str | Path | None = None


def load_runs(
    teacher: str | Path, student: str | Path, more: Mapping[str, str | Path], held: Held | None = None
) -> dict[str, Run]:
    """Loads the runs of a comparison by row: "teacher", "stage1" and the names of ``more``.

    Imported weights are judged on the data of the first run that was trained, with its codec and text encoder, or on
    ``held``.

    Raises:
      UserError: with field "teacher", "student" or "more": no run, one of the other kind, or runs that do not belong
        together; with field "data", "text" or "codec": ``held`` is missing, or not asked for.
    """
    rows = {"teacher": ("teacher", teacher, ""), "stage1": ("student", student, "")}
    for name, directory in more.items():
        if name in TAKEN:
            raise UserError(f"{name!r} cannot be the row of {directory}, which others have; call it OTHER.", "more")
        rows[name] = ("more", directory, f"{name}: ")
    held, runs, judged = held or Held(), {}, None
    imported = {name: _imported(*row) for name, row in rows.items()}
    for name in sorted(rows, key=imported.get):  # what was trained comes first
        runs[name] = run = _load(*rows[name], imported[name], held, judged)
        if judged is None and run.trained:
            _check_unused(held, run, rows[name][1])
        judged = judged or run
    runs = {name: runs[name] for name in rows}
    frames, compared = runs["teacher"].latent_shape[0], _data_of(runs["teacher"])
    for name, run in list(runs.items())[1:]:
        field, directory = ("student", student) if name == "stage1" else ("more", f"{name}={more[name]}")
        if _data_of(run) != compared:  # was trained: imported weights are given the data of the others
            raise UserError(
                f"{directory} was trained on {_data_of(run)}, the teacher {teacher} is compared on {compared}; "
                "give runs that belong together.",
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


def _check_unused(held: Held, judged: Run, directory: str | Path) -> None:
    for name, value in held._asdict().items():
        if value is not None:
            raise UserError(
                f"the runs are compared on {judged.settings.data.source}, with the text encoder and the codec of "
                f"{directory}, which was trained on it; leave {value} out.",
                name,
            )


@contextlib.contextmanager
def _of_row(field: str, row: str) -> Iterator[None]:
    """Errors are those of the argument that names the row, but for those of ``Held``."""
    try:
        yield
    except UserError as error:
        if error.field in Held._fields:
            raise
        raise UserError(f"{row}{error}", field) from error


def _imported(field: str, directory: str | Path, row: str) -> bool:
    """Whether a row's directory holds imported weights; no run at all is for ``Run.load`` to refuse."""
    checkpoints = Path(directory).expanduser() / "checkpoints"
    with _of_row(field, row):
        return checkpoints.is_dir() and not is_trained(load_meta(checkpoints))


def _load(field: str, directory: str | Path, row: str, imported: bool, held: Held, judged: Run | None) -> Run:
    """A run of the wanted kind."""
    with _of_row(field, row):
        if not imported:
            run = Run.load(directory)
        elif judged is None:
            run = _on_held(directory, held)
        else:
            run = _beside(directory, judged)
        if run.is_student != (field != "teacher"):
            found, wanted = ("student", "teacher") if run.is_student else ("teacher", "student")
            raise UserError(f"{Path(directory)} holds a {found}; give the run directory of a {wanted}.")
    return run


def _on_held(directory: str | Path, held: Held) -> Run:
    """Imported weights with the data, codec and text encoder of ``held``."""
    if held.data is None:
        raise UserError(
            f"none of these was trained here ({directory} was imported); name the data whose held-out videos they "
            f"are compared on, such as latents:DIR of `prepare latents`.",
            "data",
        )
    run = Run.load(directory, text=held.text, codec=held.codec)
    with about("data"):
        shape = held_out_shape(run, held.data)
        _check_latents(directory, run.settings.wan, shape)
    data = dataclasses.replace(
        run.settings.data, source=held.data, frames=shape[0], text=held.text or run.settings.data.text
    )
    return dataclasses.replace(run, settings=dataclasses.replace(run.settings, data=data), latent_shape=shape)


def _beside(directory: str | Path, judged: Run) -> Run:
    """Imported weights with the data, codec and text encoder of ``judged``."""
    run = Run.load(directory, needs_codec=False)
    wan, of_data = run.settings.wan, judged.settings.wan
    for name in ("text_len", "text_dim"):
        if getattr(wan, name) != getattr(of_data, name):
            raise UserError(
                f"{directory} takes {name}={getattr(wan, name)}, and the data have {getattr(of_data, name)}; give runs "
                f"that belong together."
            )
    words, encoder = {HASHED: "hashed words", ENCODER: "a text encoder"}, judged.settings.data.text
    trained, used = run.meta.get("source", {}).get("text"), ENCODER if encoder else HASHED
    if trained in words and trained != used:  # rows of the same size that mean nothing to these weights
        raise UserError(
            f"{directory} was trained with {words[trained]}, and the captions of the data are embedded by "
            f"{encoder or words[used]}; give runs that belong together."
        )
    _check_latents(directory, wan, judged.latent_shape)
    settings = dataclasses.replace(run.settings, data=judged.settings.data, log=judged.settings.log)
    return dataclasses.replace(
        run, settings=settings, codec=judged.codec, encoder=judged.encoder, latent_shape=judged.latent_shape
    )


def _check_latents(directory: str | Path, wan: WanConfig, latent_shape: Sequence[int]) -> None:
    height, width, channels = latent_shape[1:]
    if channels != wan.channels or height % wan.patch or width % wan.patch:
        raise UserError(
            f"{directory} takes latents of {wan.channels} channels and of sides that {wan.patch} divides, and those of "
            f"the data are {height}x{width} of {channels} channels; give weights and data that belong together."
        )


def _data_of(run: Run) -> str:
    """What a run is compared on, in words: source and latent shape."""
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
