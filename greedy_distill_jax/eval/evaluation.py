"""An evaluation: sample a comparison, measure it with every suite, write metrics.json and the report."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from greedy_distill_jax import ranges
from greedy_distill_jax.distribution.compile_cache import use_compile_cache
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval.comparison import Comparison, Entry, Held, compare, load_runs
from greedy_distill_jax.eval.histories import real_histories, with_real_histories
from greedy_distill_jax.eval.page import Section
from greedy_distill_jax.eval.report import write_report
from greedy_distill_jax.eval.suites import (
    Column,
    Measured,
    Plot,
    Suite,
    claims_of,
    keys_of,
    measure,
    resolve,
    suite_names,
)
from greedy_distill_jax.eval.tables import MODELS, NOT_THERE
from greedy_distill_jax.measure.environment import environment
from greedy_distill_jax.ranges import Count, Natural, Seed
from greedy_distill_jax.training.metrics import read_scalars

SHOWN = 6  # captions in the report's grid
# Of the table of models, around those of the suites.
BEFORE = (
    Column(
        "name",
        "Model",
        "Which model made the videos; “data” is the reference that a perfect model would match.",
        format="text",
    ),
    Column(
        "steps",
        "Steps",
        "Denoising steps: per frame for a student, per video for the teacher.",
        format="count",
        better="lower",
    ),
)
AFTER = (
    Column(
        "train_cpu_s",
        "Training",
        "CPU seconds that training took, over all cores.",
        unit="CPU s",
        format="seconds",
        better="lower",
    ),
    Column(
        "train_seed",
        "Training seed",
        "Seed of the training behind the row. One is one sample: other seeds may give other figures.",
        format="count",
    ),
)


def evaluate(
    teacher: str | Path,
    student: str | Path,
    output: str | Path,
    *,
    more: Mapping[str, str | Path] | None = None,
    videos: int = 256,
    seed: int = 1000,
    lengths: Sequence[int] | None = None,
    suites: Sequence[str] | None = None,
    refresh_history: int | None = None,
    held: Held | None = None,
    commands: Sequence[str] = (),
    announce: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Samples, measures, writes metrics.json and report.html, and returns the metrics.

    Args:
      teacher, student: run directories.
      output: folder of the report.
      more: further students by the name of their row, such as {"stage2": ...}, each streamed with the step lists of the
        one with the fewest steps, as is the student itself in its few-step row.
      videos: held-out videos per row.
      seed: of held-out data and noise.
      lengths: video lengths of the timing; None for 32, 256, and 1024 where the teacher still has few tokens.
      suites: by name, see ``suites.resolve``; None for all that apply to the data.
      refresh_history: also stream every student on real history except for so many chunks of its own, see
        ``eval.histories``; None for no such rows.
      held: data that imported weights are compared on; without them that of the runs that were trained.
      commands: shown in the report.
      announce: told what is being done.

    Raises:
      UserError: with the name of the argument that is wrong as its field.
    """
    ranges.check(videos, Count, "videos")
    ranges.check(seed, Seed, "seed")
    ranges.check(refresh_history, Natural | None, "refresh_history")
    wanted = [resolve(name) for name in (suite_names() if suites is None else suites)]
    directories = {"teacher": teacher, "stage1": student, **(more or {})}
    runs = load_runs(teacher, student, more or {}, held)
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}); choose another folder.", "output") from error
    use_compile_cache(runs["teacher"].settings.compile_cache)
    histories = None if refresh_history is None else real_histories(runs, videos, seed, refresh_history)
    comparison = compare(runs, directories, videos=videos, seed=seed, lengths=lengths, announce=announce)
    if histories:
        announce(f"evaluate: students on real history, except for their last {refresh_history} chunks")
        comparison = with_real_histories(comparison, histories)
    measured: dict[Suite, Measured] = {}
    for suite in wanted:
        if suite.applies(comparison):
            announce(f"evaluate: {suite.name}")
            measured[suite] = measure(suite, comparison)
        elif suites is not None:
            raise UserError(f"{suite.name} does not apply to runs on {comparison.data}; leave it out.", "suites")
    metrics = metrics_of(comparison, measured, commands)
    path = write_report(
        output,
        metrics=metrics,
        sections=sections_of(comparison, measured),
        videos={name: list(entry.video_VTHWC[:SHOWN]) for name, entry in comparison.entries.items()},
        captions=comparison.captions[:SHOWN],
        fps=float(comparison.teacher.settings.log.fps),
    )
    announce(f"evaluate: {path}")
    return metrics


def metrics_of(
    comparison: Comparison, measured: Mapping[Suite, Measured], commands: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns what metrics.json holds, see ``tables.validate_metrics``."""
    models = {name: dict(of_entry(entry)) for name, entry in comparison.entries.items()}
    columns, tables, joined = {}, {}, []
    for suite, found in measured.items():
        used = [column for column in suite.columns if any(column.name in row for row in found.rows)]
        if suite.of_models:
            joined += used
            for row in found.rows:
                models[row["name"]] |= row
        else:
            columns[suite.name], tables[suite.name] = used, _filled(found.rows, used)
    columns[MODELS] = [*BEFORE, *joined, *AFTER]
    return {
        "rows": _filled(models.values(), columns[MODELS]),
        "tables": tables,
        "columns": {name: [dataclasses.asdict(column) for column in of] for name, of in columns.items()},
        "gates": [gate for suite, found in measured.items() for gate in claims_of(suite, found, comparison)],
        "training_frames": comparison.training_frames,
        **environment(),
        "config": {
            "teacher": json.loads(comparison.teacher.settings.text),
            "student": json.loads(comparison.student.settings.text),
        },
        "extra": {
            "commands": list(commands),
            "videos": len(comparison.captions),
            "evaluation_seed": comparison.seed,
            "names": {name: entry.about for name, entry in comparison.entries.items()},
            "held_out_captions": sorted(set(comparison.captions)),
            "notes": {suite.name: found.note for suite, found in measured.items() if found.note},
        },
    }


def of_entry(entry: Entry) -> dict[str, Any]:
    """Returns the values of ``BEFORE`` and ``AFTER``."""
    values = {"steps": entry.steps, "train_cpu_s": entry.train_cpu_s or None, "train_seed": entry.train_seed}
    return {"name": entry.name} | {name: NOT_THERE if value is None else value for name, value in values.items()}


def _filled(rows: Any, columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Rows with every column, in the order of the columns, and no other value."""
    return [{key: row.get(key) for column in columns for key in keys_of(column)} for row in rows]


def sections_of(comparison: Comparison, measured: Mapping[Suite, Measured]) -> list[Section]:
    """Returns the parts of the page: the table of models, a part per suite, and the losses of training."""
    videos = f"{len(comparison.captions)} held-out videos per row, drawn with evaluation seed {comparison.seed}."
    notes = " ".join([videos, *(found.note for suite, found in measured.items() if suite.of_models and found.note)])
    names = {name: entry.about for name, entry in comparison.entries.items()}
    found = [Section(MODELS, "Quality", note=notes, names=names)]
    for suite, of in measured.items():
        if of.plots or not suite.of_models:
            note = "" if suite.of_models else of.note
            found.append(Section(suite.name, suite.title, suite.text, of.plots, note, of.summary))
    return [*found, Section("training", "Training", plots=loss_plots(comparison))]


def loss_plots(comparison: Comparison) -> list[Plot]:
    """Returns a plot of the loss terms of every run's log, from its first update on."""
    plots, drawn = [], set()
    for name, entry in comparison.entries.items():
        if entry.run is None or not entry.run.trained or entry.directory in drawn:  # several rows of one run
            continue
        drawn.add(entry.directory)
        settings, stage = entry.run.settings, entry.run.settings.stage
        groups = {"": settings.losses} | {f"{own}/": getattr(keys, "losses", {}) for own, keys in settings.own.items()}
        terms = [f"{own}{term}" for own, losses in groups.items() for term in losses]
        log = read_scalars(entry.directory)
        terms = [term for term in terms if any(f"{stage}/{term}" in line for line in log)]
        lines = [line for line in log if any(f"{stage}/{term}" in line for term in terms)]
        plots.append(
            Plot(
                f"Stage {name}",
                "Each loss term against the training step. It should fall and level off; look into a jump or a gap.",
                "Training step",
                "Loss",
                {term: [line.get(f"{stage}/{term}") for line in lines] for term in terms},
                x=[line["step"] for line in lines],
                log="wide",
                smooth=True,
            )
        )
    return plots
