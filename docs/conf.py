"""Sphinx configuration: `python -m sphinx -W -b html docs build/docs` builds the pages, warnings are errors."""

import os
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_ext")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the pages import the package, and need no device

import greedy_distill_jax  # noqa: E402

project = "greedy_distill_jax"
author = "greedy_distill_jax developers"
copyright = f"2026, {author}"
release = version = greedy_distill_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "config_keys",
]

# Headings get the anchors that a reader of the source would expect, so that links work there and on the pages.
myst_heading_anchors = 3
myst_enable_extensions = ["amsmath", "attrs_inline", "dollarmath"]

# Signatures as they stand in the source: array shapes are long strings once they are evaluated.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
napoleon_use_rtype = False  # what stands before a colon under "Returns:" is no type

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_copy_source = False


def plain_docstring(app, what, name, obj, options, lines):
    """Docstrings are plain text with ``code``: what would be markup of Sphinx is not meant as such."""
    out, section = [], ""
    for line in lines:
        section = line[:-1] if line in ("Args:", "Attributes:", "Returns:", "Raises:", "References:") else section
        in_formula = not section and line.startswith(" ")
        if section == "References" and line.startswith("  ") and not line.startswith("   "):
            line = f"  - {line.strip()}"  # one entry a line
        if in_formula and out and not out[-1].startswith(" "):
            out += ["", "::", ""]  # formulas stand indented below the sentence that they belong to
        elif not section and not in_formula and out and out[-1].startswith(" "):
            out.append("")
        out.append(line if in_formula else re.sub(r"(``.+?``)|([|*])", lambda m: m[1] or "\\" + m[2], line))
    lines[:] = out


def setup(app):
    """Connects ``plain_docstring``, before napoleon reads the sections."""
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)
