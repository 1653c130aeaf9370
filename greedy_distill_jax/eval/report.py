"""The evaluation report: `metrics.json` for programs and one self-contained `report.html` for people.

`write_report` takes numbers and arrays that were measured elsewhere and draws them. The page loads nothing: styles,
plots (SVG) and videos (GIF) are inside it, so it can be mailed, archived or opened without a network.
"""

import base64
import io
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from PIL import Image

from greedy_distill_jax.data.video_io import encode_gif
from greedy_distill_jax.errors import UserError

VIDEO_PIXELS = 128  # width that a small video is scaled up to, so that each of its pixels can be seen
NOT_MEASURED = "not yet measured"

TOP_KEYS = (
    "rows",
    "time_per_frame_ms",
    "cache_bytes",
    "versions",
    "device",
    "commit",
    "gates",
    "config",
    "training_frames",
)
GATE_KEYS = ("name", "value", "threshold", "passed")

# key, heading, how its values are shown; report.html.j2 says what each one is and which way is good
ROW_COLUMNS = (
    ("name", "Model", "text"),
    ("steps", "Steps", "count"),
    ("direction", "Direction", "share"),
    ("valid_first", "Valid, first window", "share"),
    ("valid_last", "Valid, last window", "share"),
    ("caption", "Caption", "share"),
    ("fd_first", "FD, first window", "distance"),
    ("fd_last", "FD, last window", "distance"),
    ("step_std", "Step spread, first window", "distance"),
    ("step_std_last", "Step spread, last window", "distance"),
    ("flicker", "Flicker", "distance"),
    ("wobble", "Wobble", "distance"),
    ("train_cpu_s", "Training, CPU s", "seconds"),
    ("seeds", "Seeds", "text"),
)
TIME_COLUMNS = (
    ("etm_sdd", "ETM + SDD (ours)"),
    ("causal", "Causal student"),
    ("full_causal", "Full-causal cache"),
    ("teacher", "Bidirectional teacher"),
)
ROW_KEYS = tuple(column[0] for column in ROW_COLUMNS)
TIME_KEYS = ("frames", "full_causal", "teacher")
STUDENT_TIME_KEYS = ("etm_sdd", "causal")
BY_FRAME_TEXT = {
    "validity": (
        "Validity over the frame index",
        "Share of videos whose frame shows a well-formed object of the captioned kind. Higher is better; a line that "
        "stays flat past the training length means that errors do not build up.",
    ),
    "quality": (
        "Quality over the frame index",
        "Agreement of each frame with the best matching template of the captioned object. Higher is better, 1 is "
        "perfect; a falling line is drift.",
    ),
}

# Plots are drawn in stand-in colours, which become CSS variables, so that one SVG suits light and dark.
_INK, _GRID = "#010203", "#010204"
_SERIES = tuple(f"#0102{index:02x}" for index in range(16, 22))
_CSS_COLORS = {_INK: "var(--ink-soft)", _GRID: "var(--line)"} | {c: f"var(--s{i})" for i, c in enumerate(_SERIES)}
_DASHES = ("", "6 3", "2 2", "8 2 2 2", "", "6 3")


# -------------------------------------------------------------------------------------------------------------- metrics


def _check_keys(where: str, mapping: Any, required: Sequence[str], optional: Sequence[str] = ()) -> None:
    if not isinstance(mapping, dict):
        raise UserError(f"{where} must be a mapping with keys {', '.join(required)}, not {type(mapping).__name__}")
    for key in required:
        if key not in mapping:
            raise UserError(f"{where}: missing key {key!r}; add it (None where it was not measured)")
    for key in mapping:
        if key not in required and key not in optional:
            hint = ", put further values under 'extra'" if "extra" in optional else ""
            raise UserError(f"{where}: unknown key {key!r}; known keys are {', '.join((*required, *optional))}{hint}")


def validate_metrics(metrics: dict) -> None:
    """Checks that `metrics` has exactly the keys of `metrics.json`; values that were not measured are None.

    Keys: `rows` (list, see `ROW_KEYS`), `time_per_frame_ms` (list, see `TIME_KEYS`, and `STUDENT_TIME_KEYS` of which
    a row has those that were timed), `cache_bytes` (name to bytes), `versions`, `device`, `commit`, `gates` (list, see
    `GATE_KEYS`; `passed` is True, False or None), `config`, `training_frames`, and optionally `extra` (anything;
    `extra["commands"]`, a list of strings, is shown with the environment).

    Raises:
      UserError: naming the key that is missing, unknown or of the wrong type.
    """
    _check_keys("metrics", metrics, TOP_KEYS, ("extra",))
    lists = {"rows": (ROW_KEYS,), "time_per_frame_ms": (TIME_KEYS, STUDENT_TIME_KEYS), "gates": (GATE_KEYS,)}
    for key, keys in lists.items():
        if not isinstance(metrics[key], list | tuple):
            raise UserError(f"metrics[{key!r}] must be a list, not {type(metrics[key]).__name__}")
        for index, row in enumerate(metrics[key]):
            _check_keys(f"metrics[{key!r}][{index}]", row, *keys)
    for key in ("cache_bytes", "versions", "config", "extra"):
        if key in metrics and not isinstance(metrics[key], dict):
            raise UserError(f"metrics[{key!r}] must be a mapping, not {type(metrics[key]).__name__}")
    frames = metrics["training_frames"]
    if isinstance(frames, bool) or not isinstance(frames, int | np.integer) or frames < 1:
        raise UserError(f"metrics['training_frames'] must be a positive whole number, not {frames!r}")
    for gate in metrics["gates"]:
        if gate["passed"] is not None and not isinstance(gate["passed"], bool | np.bool_):
            raise UserError(f"metrics['gates']: 'passed' must be True, False or None in {gate!r}")


def _plain(value: Any) -> Any:
    """Plain JSON types; numbers that JSON cannot hold (NaN, infinity) become None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # NumPy and JAX arrays
        return _plain(value.tolist())
    return value if value is None or isinstance(value, str) else str(value)


# --------------------------------------------------------------------------------------------------------------- values


def _show(value: Any, kind: str = "number") -> str | Markup:
    """One table cell; None (or NaN) reads "not yet measured"."""
    if value is None or value in ("", []) or (isinstance(value, float) and not math.isfinite(value)):
        return Markup('<span class="missing">{}</span>').format(NOT_MEASURED)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(item) if kind == "text" else str(_show(item)) for item in value)
    if not isinstance(value, int | float):
        return str(value)
    if kind == "share":
        return f"{100 * value:.1f}%"
    if kind == "distance":
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
    if kind == "seconds":
        return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"
    if kind == "bytes":
        power = 0 if abs(value) < 1024 else min(4, int(math.log2(abs(value)) // 10))
        return f"{value / 1024**power:,.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4g}"


def _verdict(gates: Sequence[dict]) -> tuple[str, str]:
    """(state, headline): state is pass, fail or open."""
    failed = sum(gate["passed"] is False for gate in gates)
    unknown = sum(gate["passed"] is None for gate in gates)
    if failed:
        return "fail", f"{failed} of {len(gates)} gates failed" + (f", {unknown} not yet measured" if unknown else "")
    if unknown or not gates:
        return "open", f"{unknown} of {len(gates)} gates not yet measured" if gates else "No gate measured yet"
    return "pass", f"All {len(gates)} gates passed" if len(gates) > 1 else "The gate passed"


def time_columns(times: Sequence[dict]) -> list[tuple[str, str]]:
    """The columns of `TIME_COLUMNS` that every row has."""
    return [(key, label) for key, label in TIME_COLUMNS if all(key in row for row in times)]


def _growth(times: Sequence[dict]) -> dict | None:
    """Time per frame at the longest video over that at the shortest; 32 and 256 frames where both were measured."""
    by_length = {row["frames"]: row for row in times if row["frames"] is not None}
    if len(by_length) < 2:
        return None
    short, long = (32, 256) if {32, 256} <= set(by_length) else (min(by_length), max(by_length))
    ratio = {}
    for key, _ in time_columns(times):
        a, b = by_length[short][key], by_length[long][key]
        ratio[key] = b / a if a and b is not None else None
    return {"short": short, "long": long, "ratio": ratio}


# --------------------------------------------------------------------------------------------------------------- videos


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _video_cell(column: str, caption: str, video: np.ndarray | None, frames: int, fps: float) -> dict:
    """One video of the grid, padded to `frames` with its last frame dimmed, so that a row's videos loop in step."""
    if video is None:
        return {"column": column, "gif": None}
    scale = max(1, VIDEO_PIXELS // max(video.shape[1:3]))
    padding = np.repeat((video[-1:] * 0.3).astype(np.uint8), frames - len(video), axis=0)
    large = np.concatenate([video, padding]).repeat(scale, axis=1).repeat(scale, axis=2)
    still = io.BytesIO()
    Image.fromarray(large[0]).save(still, "PNG")
    return {
        "column": column,
        "gif": _data_uri("gif", encode_gif(large, fps=fps)),
        "still": _data_uri("png", still.getvalue()),
        "height": large.shape[1],
        "width": large.shape[2],
        "frames": len(video),
        "alt": f"Video of {len(video)} frames: {caption!r}, {column}",
    }


def _video_grid(videos: dict[str, list[np.ndarray]], captions: Sequence[str], fps: float) -> list[dict]:
    """Rows (one per caption) of cells (one per model)."""
    for name, column in videos.items():
        if len(column) != len(captions):
            raise ValueError(f"videos[{name!r}] holds {len(column)} videos for {len(captions)} captions")
        for video in column:
            if video is None:
                continue
            if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or not len(video):
                raise ValueError(f"videos[{name!r}] must be uint8 [T,H,W,3], not {video.dtype} {list(video.shape)}")
    grid = []
    for index, caption in enumerate(captions):
        row = {name: column[index] for name, column in videos.items()}
        frames = max((len(video) for video in row.values() if video is not None), default=0)
        grid.append({"caption": caption, "cells": [_video_cell(n, caption, v, frames, fps) for n, v in row.items()]})
    return grid


# ---------------------------------------------------------------------------------------------------------------- plots


def _floats(values: Sequence) -> np.ndarray:
    return np.asarray([np.nan if value is None else float(value) for value in values], np.float64)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average that leaves out what is not finite."""
    finite = np.isfinite(values)
    kernel = np.ones(window)
    total = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    count = np.convolve(finite.astype(np.float64), kernel, "same")
    return np.where(finite, total / np.maximum(count, 1.0), np.nan)


def _new_axes(xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.4, 3.0), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    axes.grid(True, color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, color=_INK, fontsize=9)
    axes.set_ylabel(ylabel, color=_INK, fontsize=9)
    return figure, axes


def _log_scale(axes: Any) -> None:
    """Logarithmic y axis with ticks at 1, 2 and 5, written as plain numbers; wide enough for two of them."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    widen = max(1.0, (6 * low / high) ** 0.5)
    axes.set_ylim(low / widen, high * widen)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """Inline SVG without fonts, links, document-wide styles or ids that a second plot could repeat."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font: [^;\"]*?([\d.]+px) [^;\"]*", r"font-size: \1", text)
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None
    opening = f'<svg role="img" aria-label="{escape(label)}" {view_box.group()}>'
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
    for stand_in, css in _CSS_COLORS.items():
        text = text.replace(stand_in, css)
    return Markup(text)  # drawn here; every label in it was escaped


def _style(index: int) -> dict:
    dash = [float(part) / 1.6 for part in _DASHES[index % len(_DASHES)].split()]
    return {"color": _SERIES[index % len(_SERIES)], "linewidth": 1.6, "linestyle": (0, dash) if dash else "-"}


def _figure(name: str, title: str, text: str, figure: Figure | None, series: Sequence[str]) -> dict:
    legend = [(label, f"var(--s{i % len(_SERIES)})", _DASHES[i % len(_DASHES)]) for i, label in enumerate(series)]
    label = f"Line plot: {title}. Lines: {', '.join(series)}."
    return {"title": title, "text": text, "legend": legend, "svg": figure and _svg(figure, name, label)}


def _loss_figure(stage: str, curves: dict[str, list], name: str) -> dict:
    series = {label: _floats(values) for label, values in curves.items() if label != "step"}
    series = {label: values for label, values in series.items() if np.isfinite(values).any()}
    figure = None
    if series:
        figure, axes = _new_axes("Training step", "Loss")
        for index, (label, values) in enumerate(series.items()):
            steps = _floats(curves["step"]) if "step" in curves else np.arange(len(values), dtype=np.float64)
            if len(steps) != len(values):
                raise ValueError(f"curves[{stage!r}][{label!r}] has {len(values)} values for {len(steps)} steps")
            if len(values) > 100:
                axes.plot(steps, values, color=_SERIES[index % len(_SERIES)], linewidth=0.6, alpha=0.3)
                values = _smooth(values, len(values) // 40 | 1)
            axes.plot(steps, values, **_style(index))
        every = np.concatenate(list(series.values()))
        every = every[np.isfinite(every)]
        if every.min() > 0 and every.max() > 20 * every.min():
            _log_scale(axes)
    text = "Each loss term against the training step. It should fall and level off; look into a jump or a gap."
    return _figure(name, f"Stage {stage}", text, figure, list(series))


def _by_frame_figure(
    metric: str, lines: dict[str, list[float | None]], labels: list[str], training_frames: int
) -> dict:
    title, text = BY_FRAME_TEXT.get(metric, (f"{metric} over the frame index", f"{metric}, frame by frame."))
    text += f" The marker at frame {training_frames} is the training length: nothing to its right was ever trained on."
    values = {label: _floats(line) for label, line in lines.items()}
    figure = None
    if any(np.isfinite(line).any() for line in values.values()):
        figure, axes = _new_axes("Frame index", metric.capitalize() if metric in BY_FRAME_TEXT else "Value")
        for label, line in values.items():
            marker = "o" if len(line) == 1 else None
            axes.plot(np.arange(len(line)), line, marker=marker, markersize=4, **_style(labels.index(label)))
        every = np.concatenate(list(values.values()))
        if np.nanmin(every) >= 0 and np.nanmax(every) <= 1:
            axes.set_ylim(-0.02, 1.02)
        axes.set_xlim(0, max(8 * training_frames, max(map(len, values.values()))))
        axes.axvline(training_frames, color=_INK, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.annotate(
            "training length",
            (training_frames, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
            color=_INK,
        )
    shown = _figure(f"by-frame-{metric}", title, text, figure, labels)
    shown["legend"] = [entry for entry in shown["legend"] if entry[0] in values]
    return shown


def _time_figure(times: Sequence[dict]) -> dict:
    rows = sorted((row for row in times if row["frames"]), key=lambda row: row["frames"])
    lengths = [row["frames"] for row in rows]
    columns = time_columns(times)
    values = {key: _floats([row[key] for row in rows]) for key, _ in columns}
    figure = None
    if any(np.isfinite(line).any() for line in values.values()):
        figure, axes = _new_axes("Length of the video (frames)", "Time per frame (ms)")
        for index, line in enumerate(values.values()):
            axes.plot(lengths, line, marker="o", markersize=4, **_style(index))
        axes.set_xscale("log")
        _log_scale(axes)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
    text = (
        "Milliseconds of computing per frame against the length of the video; both axes are logarithmic. A flat line "
        "means that the cost of a frame does not depend on how long the video already is; lower is better."
    )
    return _figure("time", "Time per frame against video length", text, figure, [label for _, label in columns])


# -------------------------------------------------------------------------------------------------------------- writing


def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["show"] = _show
    return environment


def _write_all(directory: Path, contents: dict[str, str]) -> None:
    """Writes every file beside its target first and renames them when all are complete; leaves nothing half-written."""
    pending = {directory / name: directory / f".{name}.{os.getpid()}.tmp" for name in contents}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for target, temporary in pending.items():
            temporary.write_text(contents[target.name], encoding="utf-8")
        for target, temporary in pending.items():
            os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write the report to {directory}: {reason}; choose a writable directory") from error
    finally:
        for temporary in pending.values():
            if temporary.parent.is_dir():
                temporary.unlink(missing_ok=True)


def write_report(
    directory: str | os.PathLike,
    *,
    metrics: dict,
    videos: dict[str, list[np.ndarray]],
    captions: list[str],
    curves: dict[str, dict[str, list]],
    by_frame: dict[str, dict[str, list[float | None]]],
    fps: float = 8.0,
) -> Path:
    """Writes `metrics.json` and the self-contained `report.html`; each file is replaced whole or not at all.

    Args:
      directory: where to write; created if it is not there.
      metrics: what `metrics.json` holds, see `validate_metrics`.
      videos: column name (data, teacher, student at n steps, ...) to one uint8 [T,H,W,3] video per caption, in columns'
        order; None for a video that was not made. Within a row shorter videos are padded with their last frame, dimmed.
      captions: one per row of videos.
      curves: training stage to {loss term: values}; the key "step" holds their training steps (default: 0, 1, ...).
      by_frame: metric ("validity", "quality", ...) to {model: one value per frame}.
      fps: frame rate of the videos in the page.

    Returns:
      The path of `report.html`.

    Raises:
      UserError: for metrics that do not fit the schema, and a directory that cannot be written.
    """
    validate_metrics(metrics)
    metrics = _plain(metrics)
    state, headline = _verdict(metrics["gates"])
    models = list(dict.fromkeys(label for lines in by_frame.values() for label in lines))
    by_frame = {metric: by_frame.get(metric, {}) for metric in (*BY_FRAME_TEXT, *by_frame)}
    extra = dict(metrics.get("extra", {}))
    commands = extra.pop("commands", None) or []
    commands = [commands] if isinstance(commands, str) else list(commands)
    frames = metrics["training_frames"]
    html = _environment().get_template("report.html.j2").render(
        metrics=metrics,
        state=state,
        headline=headline,
        columns=list(videos),
        grid=_video_grid(videos, captions, fps),
        by_frame=[_by_frame_figure(metric, lines, models, frames) for metric, lines in by_frame.items()],
        losses=[_loss_figure(stage, terms, f"loss-{index}") for index, (stage, terms) in enumerate(curves.items())],
        time=_time_figure(metrics["time_per_frame_ms"]),
        growth=_growth(metrics["time_per_frame_ms"]),
        row_columns=ROW_COLUMNS,
        time_columns=time_columns(metrics["time_per_frame_ms"]),
        commands=commands,
        config_json=json.dumps(metrics["config"], indent=2, ensure_ascii=False) if metrics["config"] else None,
        extra_json=json.dumps(extra, indent=2, ensure_ascii=False) if extra else None,
        not_measured=NOT_MEASURED,
    )  # fmt: skip
    text = json.dumps(metrics, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    directory = Path(directory)
    _write_all(directory, {"metrics.json": text, "report.html": html})
    return directory / "report.html"
