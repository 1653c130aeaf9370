"""The page of a report: one HTML text that loads nothing; styles, plots (SVG) and videos (GIF) are inside it."""

import base64
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import UInt8
from markupsafe import Markup
from PIL import Image

from greedy_distill_jax.data.video_io import encode_gif
from greedy_distill_jax.eval import plots, tables
from greedy_distill_jax.eval.suites import Plot

VIDEO_PIXELS = 128  # width that a small video is scaled up to, so that each of its pixels can be seen
WAYS = {
    "": "",
    "higher": "Higher is better.",
    "lower": "Lower is better.",
    "data": "Close to the data row is best.",
}
# A column's pixels per video: None where a row has no video.
Videos = Mapping[str, Sequence[UInt8[np.ndarray, "_T _H _W 3"] | None]]


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page: its plots, and the table of metrics.json that is named for it.

    Attributes:
      name: of the table, and of the link to the section.
      title, text: above them.
      plots: drawn in this order; lines of one label look alike in all of them.
      note: caption of the table.
      summary: a last line of the table: text by column.
      names: what the rows are, by name.
    """

    name: str
    title: str
    text: str = ""
    plots: Sequence[Plot] = ()
    note: str = ""
    summary: Mapping[str, str] | None = None
    names: Mapping[str, str] | None = None


def render(
    metrics: dict[str, Any], sections: Sequence[Section], videos: Videos, captions: Sequence[str], fps: float
) -> str:
    """Returns the page.

    Args:
      metrics: in plain JSON types, see ``tables.validate_metrics``.
      sections: in their order; the tables of metrics.json without one are not shown.
      videos: by column of the grid, one per caption.
      captions: one per row of the grid.
      fps: frame rate of the videos.
    """
    state, headline = tables.verdict(metrics["gates"])
    extra = dict(metrics.get("extra", {}))
    commands = extra.pop("commands", None) or []
    named = {tables.MODELS: metrics["rows"], **metrics["tables"]}
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            metrics=metrics,
            state=state,
            headline=headline,
            video_columns=list(videos),
            grid=_video_grid(videos, captions, fps),
            sections=[_drawn(section, named, metrics["columns"]) for section in sections],
            commands=[commands] if isinstance(commands, str) else list(commands),
            config_json=_pretty(metrics["config"]),
            extra_json=_pretty(extra),
            not_measured=tables.NOT_MEASURED,
        )
    )


def _drawn(section: Section, named: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    labels = list(dict.fromkeys(label for plot in section.plots for label in plot.lines))
    figures = [plots.draw(plot, f"{section.name}-{i}", labels) for i, plot in enumerate(section.plots)]
    found = {
        "columns": [column | {"way": WAYS[column["better"]]} for column in columns.get(section.name, ())],
        "rows": named.get(section.name, ()),
        "has_table": section.name in named,
    }
    return (
        {field.name: getattr(section, field.name) for field in dataclasses.fields(section)} | found | {"plots": figures}
    )


def _pretty(value: Any) -> str | None:
    return json.dumps(value, indent=2, ensure_ascii=False) if value else None


def _cell(value: Any, kind: str = "number") -> str | Markup:
    """One cell; what was not measured says so."""
    text = tables.shown(value, kind)
    return Markup('<span class="missing">{}</span>').format(text) if tables.is_missing(value) else text


def _cell_in(row: Mapping[str, Any], column: Mapping[str, Any]) -> str | Markup:
    """The cell of a row under a column."""
    return _cell(None) if tables.is_missing(row[column["name"]]) else tables.shown_in(row, column)


def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["show"] = _cell
    environment.filters["show_in"] = _cell_in
    return environment


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


def _video_grid(videos: Videos, captions: Sequence[str], fps: float) -> list[dict]:
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
