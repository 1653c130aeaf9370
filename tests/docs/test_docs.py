"""The pages build without a warning, what they name exists, and README.md is short."""

import os
import re
import subprocess
import sys

import pytest

from tests.docs.documents import PAGES, ROOT

pytest.importorskip("sphinx", reason="needs the extra docs")

NAMED = re.compile(r"`((?:[\w*.-]+/)*[\w*.-]+\.(?:py|sh|ipynb)|[\w*.-]+/[\w*./-]+\.(?:json|md|png))`")
# What the package's modules are called for short, and files that a command leaves elsewhere.
ELSEWHERE = {"torch_student.py", "my_file.py"}


def relative(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.subprocesses
def test_the_pages_build(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", tmp_path / "html"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, "-d", tmp_path / "doctrees"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {page.relative_to(tmp_path / "html").with_suffix("").as_posix() for page in tmp_path.rglob("*.html")}
    assert {page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in PAGES[2:]} <= pages
    figure = next(tmp_path.rglob("_images/architecture.svg"))
    assert "prefers-color-scheme: dark" in figure.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_files_named_in_prose_are_there(page):
    places = (ROOT, ROOT / "greedy_distill_jax")
    named = set(NAMED.findall(page.read_text(encoding="utf-8"))) - ELSEWHERE
    assert not {name for name in named if not any(list(place.glob(name)) for place in places)}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_prose_has_at_most_120_columns(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [
        line for line in lines if len(line) > 120 and not line.startswith("|")
    ]  # rows of tables cannot be wrapped


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
