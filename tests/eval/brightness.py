"""A suite from outside the package: how bright the videos are, and whether they stay so."""

import numpy as np

from greedy_distill_jax.eval import gates
from greedy_distill_jax.eval.suites import Column, Measured, Plot, Suite


def measure(comparison):
    """Means over the pixels of every entry, and frame by frame."""
    means = {name: entry.video_VTHWC.mean((0, 2, 3, 4)) for name, entry in comparison.entries.items()}
    rows = [{"name": name, "brightness": float(line.mean())} for name, line in means.items()]
    lines = {name: line.tolist() for name, line in means.items()}
    plot = Plot("Brightness by frame", "Flat is good.", "Frame", "Mean of uint8", lines)
    return Measured(rows, (plot,), note="Means over all pixels.")


def claims(measured, comparison):
    """A student is not black."""
    found = {row["name"]: row["brightness"] for row in measured.rows}["stage1"]
    return [gates.gate("the student is not black", round(found, 2), "> 1", np.bool_(found > 1))]


SUITE = Suite(
    name="brightness",
    title="Brightness",
    text="Does the light stay on?",
    columns=(Column("brightness", "Brightness", "Mean of all pixels.", unit="of 255", better="data"),),
    measure=measure,
    gates=claims,
    of_models=True,
)
NO_SUITE = "brightness"
