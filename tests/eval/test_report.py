"""The report: complete, self-contained, safe with any caption, and never half-written."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval.page import Section
from greedy_distill_jax.eval.plots import draw
from greedy_distill_jax.eval.report import write_report
from greedy_distill_jax.eval.suites import Plot
from greedy_distill_jax.eval.tables import validate_metrics

COLUMNS = ("data", "teacher", "student (16 steps)", "student (2 steps)")
TABLES = {
    "rows": {
        "name": "text",
        "steps": "count",
        "share_first": "share",
        "distance": "distance",
        "cost": "seconds",
        "train_seed": "count",
    },
    "time": {"frames": "count", "ours": "number", "theirs": "number"},
    "cache": {"cache": "text", "bytes": "bytes"},
}


def columns_of(table) -> list[dict]:
    """Column descriptions as metrics.json has them; the first is not explained."""
    return [
        {
            "name": name,
            "label": f"The {name}",
            "text": f"About {name}." if i else "",
            "unit": "px" if i == 3 else "",
            "format": kind,
            "better": "higher" if kind == "share" else "",
            "error": "share_error" if kind == "share" else "",
        }
        for i, (name, kind) in enumerate(TABLES[table].items())
    ]


class Page(HTMLParser):
    """Every tag with its attributes, and the text between tags."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def named(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


def make_inputs(captions=("a red square moving left", "a blue circle moving up"), frames=16) -> dict:
    """Small invented results that have every part of a report."""
    random = np.random.default_rng(0)

    def video(number):
        pixels = np.full((frames, 16, 16, 3), 20, np.uint8)
        for frame in range(frames):
            left = (frame + 3 * number) % 12
            pixels[frame, 5:9, left : left + 4] = (220, 60 + 25 * number, 50)
        return pixels

    def line(level, drop):
        return (level - drop * np.linspace(0, 1, 64) + random.normal(0, 0.01, 64)).clip(0, 1).tolist()

    def row(name, steps, share):
        share = {"share_first": share, "share_error": 0.0213}
        return {"name": name, "steps": steps, **share, "distance": 0.0161, "cost": 68.4, "train_seed": 7}

    steps = list(range(0, 2000, 5))
    metrics = {
        "rows": [
            {**row("data", None, 1.0), "cost": None},
            row("teacher", 16, 0.88),
            row("student", 16, 0.87),
            row("student", 2, 0.71),
        ],
        "tables": {
            "time": [{"frames": n, "ours": 0.88, "theirs": 2.1 + n / 65} for n in (8, 32, 128, 256, 1024)],
            "cache": [{"cache": "etm", "bytes": 98_304}, {"cache": "sdd", "bytes": 24_576}],
        },
        "columns": {table: columns_of(table) for table in TABLES},
        "versions": {"python": "3.11", "jax": "0.10.2"},
        "device": "CPU, 2 cores",
        "cpu": "A model of CPU (6-1)",
        "clock": "process CPU time",
        "commit": "0123456789abcdef",
        "gates": [
            {"name": "teacher follows the caption", "value": 0.97, "threshold": ">= 0.95", "passed": True},
            {"name": "time per frame at 256 over 32", "value": 1.0, "threshold": "<= 1.1", "passed": True},
        ],
        "config": {"model": {"width": 96, "layers": 4}, "seed": 0},
        "training_frames": 8,
        "extra": {"commands": ["python -m greedy_distill_jax.train --config configs/quickstart.py"], "psnr_db": 27.3},
    }
    return {
        "metrics": metrics,
        "videos": {column: [video(i + j) for i in range(len(captions))] for j, column in enumerate(COLUMNS)},
        "captions": list(captions),
        "sections": [
            Section("rows", "Quality", note="First and last.", names={"teacher": "The bidirectional one."}),
            Section(
                "frames",
                "Long videos",
                plots=(
                    by_frame("Validity", {"student (16 steps)": line(0.88, 0.01), "teacher": line(0.88, 0)[:8]}),
                    by_frame("Agreement", {"student (16 steps)": line(0.83, 0.01), "teacher": line(0.81, 0)[:8]}),
                ),
            ),
            Section(
                "time",
                "Cost",
                plots=(
                    Plot(
                        "Time",
                        "Lower is better.",
                        "Frames",
                        "ms",
                        {"ours": [0.9, 0.9], "theirs": [2.0, 9.0]},
                        x=[32, 1024],
                        log="xy",
                        points=True,
                    ),
                ),
                summary={"frames": "Growth, 256 / 32", "ours": "1.00 x", "theirs": "2.70 x"},
            ),
            Section("cache", "Cache"),
            Section(
                "training",
                "Training",
                plots=(
                    losses("teacher", steps, [0.9 / (1 + s / 60) + 0.02 * random.random() for s in steps]),
                    losses("stage1", steps[:50], [0.4 / (1 + s / 60) for s in steps[:50]]),
                ),
            ),
        ],
    }


def by_frame(what: str, lines: dict) -> Plot:
    return Plot(
        f"{what} over the frame index",
        "Flat is good.",
        "Frame index",
        what,
        lines,
        x_end=64,
        y_limits=(0.0, 1.0),
        marker=(8, "training length"),
    )


def losses(stage: str, steps: list, values: list) -> Plot:
    lines = {"flow_matching": values}
    return Plot(f"Stage {stage}", "Falls.", "Training step", "Loss", lines, x=steps, log="wide", smooth=True)


def write(directory, **changes) -> Page:
    path = write_report(directory, **{**make_inputs(), **changes})
    assert path == Path(directory) / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def gif(attributes: dict) -> Image.Image:
    kind, content = attributes["src"].split(",", 1)
    assert kind == "data:image/gif;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_page_loads_nothing(tmp_path):
    page = write(tmp_path)
    assert not page.named("script") and not page.named("link") and not page.named("iframe")
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, name, attributes[name][:80])
        assert not [name for name in attributes if name.startswith("on")]
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    policy = next(meta["content"] for meta in page.named("meta") if "content" in meta and "http-equiv" in meta)
    assert "default-src 'none'" in policy


def test_everything_given_is_shown(tmp_path):
    inputs = make_inputs()
    page = write(tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == inputs["metrics"]
    columns = [column for table in inputs["metrics"]["columns"].values() for column in table]
    for text in (
        *(column["label"] for column in columns),
        *(column["text"] for column in columns),
        *(row["name"] for row in inputs["metrics"]["rows"]),
        *inputs["captions"],
        *COLUMNS,
        *(gate["name"] for gate in inputs["metrics"]["gates"]),
        *(section.title for section in inputs["sections"]),
        *(plot.title for section in inputs["sections"] for plot in section.plots),
        "All 2 gates passed",
        "First and last.",
        "The distance, px",
        "Higher is better.",
        "96.0 KiB",
        "jax",
        "0.10.2",
        "CPU, 2 cores",
        "A model of CPU (6-1)",
        "process CPU time",
        "0123456789abcdef",
        "python -m greedy_distill_jax.train",
        '"width": 96',
        '"psnr_db": 27.3',
        "training length",
        "88.0% ±\N{NO-BREAK SPACE}2.1%",
        "What the rows are",
        "The bidirectional one.",
        "Growth, 256 / 32",
        "1.00 x",
    ):
        assert text in page.text, text
    plots = [attributes for attributes in page.named("svg") if attributes.get("role") == "img"]
    assert len(plots) == 2 + 1 + 2
    assert all(attributes["aria-label"].startswith("Line plot: ") for attributes in plots)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {reference["xlink:href"][1:] for reference in page.named("use")} <= set(ids)
    assert len(page.named("table")) == len(page.named("caption"))
    assert all("scope" in attributes for attributes in page.named("th"))


def test_videos_of_a_row_play_in_step(tmp_path):
    inputs = make_inputs()
    inputs["videos"]["teacher"][0] = inputs["videos"]["teacher"][0][:8]
    page = write(tmp_path, videos=inputs["videos"])
    images = page.named("img")
    assert len(images) == len(COLUMNS) * len(inputs["captions"])
    assert images[0]["alt"] == "Video of 16 frames: 'a red square moving left', data"
    durations = set()
    for index, attributes in enumerate(images):
        image = gif(attributes)
        assert image.size == (128, 128) and image.info["loop"] == 0
        milliseconds = 0
        for frame in range(image.n_frames):
            image.seek(frame)
            milliseconds += image.info["duration"]
        durations.add(milliseconds)
        if index != 1:
            assert image.n_frames == 16
    assert len(durations) == 1
    image = gif(images[0])
    image.seek(3)
    shown = np.asarray(image.convert("RGB"))
    np.testing.assert_allclose(shown[4::8, 4::8], inputs["videos"]["data"][0][3], atol=2)
    assert (shown.reshape(16, 8, 16, 8, 3) == shown[None, ::8, None, ::8].reshape(16, 1, 16, 1, 3)).all()
    short = gif(images[1])
    short.seek(short.n_frames - 1)
    assert np.asarray(short.convert("RGB")).max() < 100  # the teacher's video had ended: dimmed


def test_any_caption_is_only_text(tmp_path):
    caption = '<script>alert("1")</script> & \'"><img src=http://x onerror=alert(1)> $x^2$'
    inputs = make_inputs(captions=(caption, "a blue circle"))
    metrics = inputs["metrics"]
    metrics["rows"][0]["name"] = metrics["gates"][0]["name"] = metrics["device"] = metrics["config"]["name"] = caption
    metrics["columns"]["time"][0]["label"] = metrics["columns"]["time"][1]["text"] = caption
    plot = Plot(caption, caption, caption, caption, {caption: [0.1, 0.2]}, marker=(1, caption))
    inputs["sections"].append(Section("more", caption, caption, (plot,), caption))
    inputs["videos"][caption] = inputs["videos"]["data"]
    page = write(tmp_path, **inputs)
    assert not page.named("script")
    assert len(page.named("img")) == 2 * (len(COLUMNS) + 1)
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
    assert page.text.count(caption) >= 8


def test_missing_values_say_so(tmp_path):
    inputs = make_inputs()
    metrics = {**inputs["metrics"], "commit": None, "versions": {}, "config": {}}
    metrics["rows"] = [{**metrics["rows"][1], "distance": None, "share_first": float("nan")}]
    metrics["tables"] = {"time": [{"frames": 32, "ours": np.float32(0.9), "theirs": None}], "cache": []}
    metrics["gates"] = [*metrics["gates"], {"name": "linear", "value": None, "threshold": 1.1, "passed": None}]
    del metrics["extra"]
    videos = {"data": inputs["videos"]["data"], "teacher": [None, None]}
    sections = [
        *inputs["sections"][:1],
        Section("frames", "Long", plots=(by_frame("Validity", {"student": [0.9, None, float("nan"), 0.8]}),)),
        *inputs["sections"][2:4],
        Section("training", "Training", plots=(losses("teacher", [], []),)),
    ]
    page = write(tmp_path, metrics=metrics, videos=videos, sections=sections)
    assert page.text.count("not yet measured") >= 12
    assert "1 of 3 gates not yet measured" in page.text
    written = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert written["rows"][0]["share_first"] is None
    assert written["tables"]["time"][0]["ours"] == pytest.approx(0.9)


def test_an_empty_report_is_still_a_report(tmp_path):
    metrics = {**make_inputs()["metrics"], "rows": [], "gates": [], "tables": {"time": [], "cache": []}}
    sections = [Section(name, name) for name in ("rows", "time", "cache", "training")]
    page = write(tmp_path / "new" / "folder", metrics=metrics, videos={}, captions=[], sections=sections)
    assert "No gate measured yet" in page.text
    assert page.text.count("not yet measured") == 5  # videos, every section


def test_one_failed_gate_decides_the_verdict(tmp_path):
    metrics = make_inputs()["metrics"]
    metrics["gates"][1].update(passed=np.False_, value=1.4)
    page = write(tmp_path, metrics=metrics)
    assert "1 of 2 gates failed" in page.text and "✗ fail" in page.text and "✓ pass" in page.text
    metrics["gates"][1].update(value=float("nan"))  # it was measured: there is nothing to show
    told = write(tmp_path, metrics=metrics).text
    assert told.count("not yet measured") == page.text.count("not yet measured")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("device"), "missing key 'device'"),
        (lambda m: m["rows"][2].pop("distance"), r"\['rows'\]\[2\]: missing key 'distance'"),
        (lambda m: m["tables"]["time"][0].pop("ours"), r"\['tables'\]\['time'\]\[0\]: missing key 'ours'"),
        (lambda m: m["columns"].pop("cache"), r"\['columns'\]: missing key 'cache'"),
        (lambda m: m["tables"].pop("cache"), r"\['columns'\]: unknown key 'cache'"),
        (lambda m: m["gates"][1].pop("passed"), r"\['gates'\]\[1\]: missing key 'passed'"),
        (lambda m: m.update(speed=1), "unknown key 'speed'.*'extra'"),
        (lambda m: m["rows"][0].update(iou=1), r"\['rows'\]\[0\]: unknown key 'iou'"),
        (lambda m: m.update(rows={}), r"\['rows'\] must be a list"),
        (lambda m: m.update(versions=[]), r"\['versions'\] must be a mapping"),
        (lambda m: m.update(training_frames=None), "training_frames"),
        (lambda m: m["gates"][0].update(passed="yes"), "must be True, False or None"),
    ],
)
def test_wrong_metrics_are_named_and_nothing_is_written(tmp_path, change, message):
    metrics = make_inputs()["metrics"]
    validate_metrics(metrics)
    change(metrics)
    with pytest.raises(UserError, match=message):
        write(tmp_path / "report", metrics=metrics)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("at", ["creating", "writing"])
def test_a_failed_write_keeps_the_old_report(tmp_path, monkeypatch, at):
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["metrics.json", "report.html"]
    call = Path.write_bytes if at == "writing" else Path.touch

    def full_disk(path, *given, **options):
        if "report.html" in path.name:
            raise OSError(28, "No space left on device")
        return call(path, *given, **options)

    monkeypatch.setattr(Path, call.__name__, full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        write(tmp_path, captions=["other", "captions"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_directory_that_cannot_be_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the report"):
        write(tmp_path / "file" / "report")


def test_the_same_inputs_give_the_same_page(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert (tmp_path / "a/report.html").read_bytes() == (tmp_path / "b/report.html").read_bytes()


# --- lines and widths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [7, 16, 50])
def test_every_line_of_a_plot_can_be_told_from_every_other(count):
    lines = {f"model {i}": [0.1 * i, 0.2 * i] for i in range(count)}
    drawn = draw(Plot("Quality", "", "x", "y", lines), "quality")
    legend = [(color, dash) for _, color, dash in drawn["legend"]]
    assert len(set(legend)) == count
    drawn_paths = re.findall(
        r'<path d="[^"]*" clip-path="[^"]*" style="([^"]*stroke: var\(--s\d\)[^"]*)"', drawn["svg"]
    )
    assert len(drawn_paths) == len(set(drawn_paths)) == count
    assert count > 10 or len({color for color, _ in legend}) == count


def test_a_value_without_neighbours_is_a_dot():
    def dots(values):
        return draw(Plot("Loss", "", "x", "y", {"dmd": values, "critic": [1.0] * len(values)}), "loss")["svg"].count(
            "<use"
        )

    ticks = dots([1.0, 2.0, 3.0, 4.0, 5.0])
    assert dots([1.0, None, 3.0, None, 5.0]) == ticks + 3 and dots([1.0, 2.0, None, None, 5.0]) == ticks + 1


def test_every_colour_of_a_line_is_one_of_the_page(tmp_path):
    lines = {f"model {i}": [0.1 * i, 0.2 * i] for i in range(16)}
    write(tmp_path, sections=[Section("rows", "Quality", plots=(Plot("Quality", "", "x", "y", lines),))])
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    used = set(re.findall(r"var\((--s\d+)\)", html))
    assert len(used) == 10
    for name in used:
        light, dark = re.findall(rf"{name}: (#\w+);", html)
        assert light != dark
    of_each = zip(*(re.findall(rf"{name}: (#\w+);", html) for name in used), strict=True)
    assert all(len(set(colours)) == 10 for colours in of_each)


def test_a_wide_table_is_dense_and_says_that_it_scrolls(tmp_path):
    inputs = make_inputs()
    page = write(tmp_path)
    assert not [table for table in page.named("table") if table.get("class") == "dense"]
    metrics = inputs["metrics"]
    more = [{**columns_of("time")[1], "name": f"more_{i}"} for i in range(6)]
    metrics["columns"]["rows"] += more
    metrics["rows"] = [row | {column["name"]: 1.5 for column in more} for row in metrics["rows"]]
    page = write(tmp_path, metrics=metrics)
    assert len([table for table in page.named("table") if table.get("class") == "dense"]) == 1
    scrolls = [tag for tag in page.named("div") if "scroll" in tag.get("class", "").split()]
    assert len(scrolls) == len(page.named("table")), "every table can be scrolled, also from the keyboard"
    assert all(tag.get("tabindex") == "0" and tag["role"] == "region" and tag["aria-label"] for tag in scrolls)
    assert re.search(r"\.scroll {[^}]*var\(--shade\)", (tmp_path / "report.html").read_text(encoding="utf-8"))
