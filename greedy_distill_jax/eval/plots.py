"""Draws lines as inline SVG that suits light and dark pages."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from greedy_distill_jax.eval.suites import Number, Plot

# Plots are drawn in stand-in colours, which become CSS variables, so that one SVG suits light and dark.
_INK, _GRID = "#010203", "#010204"
_SERIES = tuple(f"#0102{index:02x}" for index in range(16, 26))
_CSS_COLORS = {_INK: "var(--ink-soft)", _GRID: "var(--line)"} | {c: f"var(--s{i})" for i, c in enumerate(_SERIES)}
_DASHES = ("", "6 3", "2 2", "8 2 2 2", "1 3")
_WIDE = 20.0  # largest over smallest value from which a logarithmic axis shows more


def draw(plot: Plot, name: str, labels: Sequence[str] | None = None) -> dict[str, Any]:
    """Draws a plot.

    Args:
      plot: what to draw; lines without a finite value are left out.
      name: of the drawing, other than that of any other on the page.
      labels: of all lines that share their style over several plots; None for the plot's own.

    Returns:
      {"title", "text", "legend", "svg"}; ``svg`` is None where nothing was measured.
    """
    lines = {label: _floats(values) for label, values in plot.lines.items()}
    lines = {label: values for label, values in lines.items() if np.isfinite(values).any()}
    order = list(labels or plot.lines)
    figure = _figure(plot, lines, order) if lines else None
    described = f"Line plot: {plot.title}. Lines: {', '.join(lines)}."
    return {
        "title": plot.title,
        "text": plot.text,
        "legend": [(label, _css_color(order.index(label)), _dash(order.index(label))) for label in lines],
        "svg": figure and _svg(figure, name, described),
    }


def _figure(plot: Plot, lines: dict[str, np.ndarray], order: list[str]) -> Figure:
    figure, axes = _new_axes(plot.x_label, plot.y_label)
    longest = 0.0
    for label, values in lines.items():
        x = np.arange(len(values), dtype=np.float64) if plot.x is None else _floats(plot.x)
        style, longest = _style(order.index(label)), max(longest, float(len(values)))
        if plot.smooth and len(values) > 100:
            axes.plot(x, values, color=style["color"], linewidth=0.6, alpha=0.3)
            values = _smooth(values, len(values) // 40 | 1)
        axes.plot(x, values, marker="o" if plot.points else None, markersize=4, **style)
        alone = _alone(values)
        axes.plot(x[alone], values[alone], marker="o", markersize=3, linestyle="none", color=style["color"])
    every = np.concatenate(list(lines.values()))
    low, high = np.nanmin(every), np.nanmax(every)
    if plot.y_limits and plot.y_limits[0] <= low and high <= plot.y_limits[1]:
        margin = 0.02 * (plot.y_limits[1] - plot.y_limits[0])
        axes.set_ylim(plot.y_limits[0] - margin, plot.y_limits[1] + margin)
    if plot.x_end is not None:
        axes.set_xlim(0, max(plot.x_end, longest))
    if plot.log == "xy":
        axes.set_xscale("log")
        axes.set_xticks(list(plot.x or ()), [f"{x:,}" for x in plot.x or ()])
        axes.xaxis.set_minor_locator(NullLocator())
    if plot.log in ("y", "xy") or (plot.log == "wide" and low > 0 and high > _WIDE * low):
        _log_scale(axes)
    if plot.marker:
        _mark(axes, *plot.marker)
    return figure


def _mark(axes: Any, position: Number, words: str) -> None:
    axes.axvline(position, color=_INK, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.annotate(
        words,
        (position, 0.03),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        color=_INK,
    )


def _floats(values: Sequence) -> np.ndarray:
    return np.asarray([np.nan if value is None else float(value) for value in values], np.float64)


def _alone(values: np.ndarray) -> np.ndarray:
    """Indices of values without a neighbour, which no line would show."""
    finite = np.pad(np.isfinite(values), 1)
    return np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:])


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


# Neighbours differ in both colour and dash; no line of 50 looks like another.
def _css_color(index: int) -> str:
    return f"var(--s{index % len(_SERIES)})"


def _dash(index: int) -> str:
    return _DASHES[(index + index // len(_SERIES)) % len(_DASHES)]


def _style(index: int) -> dict:
    dash = [float(part) / 1.6 for part in _dash(index).split()]
    return {"color": _SERIES[index % len(_SERIES)], "linewidth": 1.6, "linestyle": (0, dash) if dash else "-"}
