"""What ``eval.gradients`` found, as a table on a terminal, as Markdown and as a picture."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from greedy_distill_jax.eval.tables import NOT_THERE

HEADINGS = ("", "denoise", "context", "cosine", "self_attn", "cross_attn", "ffn", "modulation")


def rows(run: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns a run's table: norms and cosine of every layer, then the cosine of each of its modules."""

    def row(name: str, figures: Mapping[str, Any], modules: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        norms = (shown(figures, part, "{:.3g}") for part in ("denoise", "context"))
        return (name, *norms, *(shown(of, "cosine", "{:+.3f}") for of in (figures, *modules)))

    modules = HEADINGS[4:]
    layers = [
        row(f"layer {i} (block {layer['block']})", layer["all"], [layer[name] for name in modules])
        for i, layer in enumerate(run["layers"])
    ]
    whole = row("all layers, embeddings", run["whole"], [run["modules"][name] for name in modules])
    return [*layers, row("embeddings", run["modules"]["embeddings"], []) + ("",) * len(modules), whole]


def shown(figures: Mapping[str, float | None], name: str, form: str) -> str:
    """Returns a mean and its standard error, ``NOT_THERE`` where there is none."""
    if figures[name] is None:
        return NOT_THERE
    return f"{form.format(figures[name])} ± {figures[f'{name}_error']:.2g}"


def about(name: str, run: Mapping[str, Any]) -> str:
    """Returns a line about a run."""
    etm = "" if run["etm"] is None else f"; norm of ETM's gradient {shown(run['etm'], 'norm', '{:.3g}')}"
    return (
        f"{name}: {run['kind']}, stage {run['stage']}, weights of the context pass {run['context_weights']}; "
        f"{run['videos']} held-out videos of {run['data']} in {run['batches']} batches, seed {run['seed']}; loss "
        f"{shown(run['loss'], 'value', '{:.4g}')}{etm}"
    )


def text(result: Mapping[str, Any]) -> str:
    """Returns the tables of all runs as lines of a terminal."""
    out = []
    for name, run in result["runs"].items():
        table = [HEADINGS, *rows(run)]
        widths = [max(len(row[i]) for row in table) for i in range(len(HEADINGS))]
        out.append(about(name, run))
        out += ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    return "\n".join(out)


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the page gradients.md."""
    lines = [
        "# Gradients through the denoising and the context pass",
        "",
        f"Loss: {result['loss']}. Columns `denoise` and `context`: norms of the two parts. `cosine`: between them, of "
        "the layer and of each of its modules; negative where one pass undoes what the other needs. Means over batches "
        f"± standard errors; {NOT_THERE} where a part is zero, as behind the last layer's keys.",
    ]
    for name, run in result["runs"].items():
        lines += ["", f"## {name}", "", about(name, run), ""]
        lines += ["| " + " | ".join(row) + " |" for row in (HEADINGS, ("---",) * len(HEADINGS), *rows(run))]
    return "\n".join([*lines, "", "![Cosine by layer](gradients.png)", ""])


def draw_cosines(runs: Mapping[str, Any]) -> bytes:
    """Returns the picture, a PNG: the cosine of every layer with its standard error, a line for each run."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(0.0, color="0.6", linewidth=0.8)
    for name, run in runs.items():
        found = [(layer["block"], layer["all"]) for layer in run["layers"] if layer["all"]["cosine"] is not None]
        blocks, values, errors = (
            [x[i] for x in ((b, f["cosine"], f["cosine_error"]) for b, f in found)] for i in range(3)
        )
        axes.errorbar(blocks, values, yerr=errors, marker="o", markersize=4, capsize=2, label=f"{name} ({run['kind']})")
    axes.set_xlabel("block of the teacher that the layer started from")
    axes.set_ylabel("cosine of denoising and context gradient")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
