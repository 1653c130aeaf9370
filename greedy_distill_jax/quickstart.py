"""The main job on one command: train a teacher, its student in three stages, stream a video, write the report.

    bash launch/quickstart.sh [--workdir DIR] [--clips DIR --captions FILE] [--controls] [--fast]

Every stage is the public command of the same name and resumes where it was interrupted; a finished one is skipped.
"""

import itertools
import json
import shlex
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from greedy_distill_jax import cli, prepare, sample
from greedy_distill_jax.cli.config_flags import read_config
from greedy_distill_jax.cli.workdir import claim
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.distribution.freed_memory import keep_freed_memory
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval.evaluation import evaluate
from greedy_distill_jax.evaluate import print_table
from greedy_distill_jax.storage.checkpoint import load_meta
from greedy_distill_jax.storage.lock import sole_writer
from greedy_distill_jax.train import train

CLIP_FRAMES = 16
# At 12 frames per second things move between frames; a third is held out, so that short clips have a window there too;
# crops make many small scenes of few clips.
PREPARE = ["--size", "32x32", "--frames", str(CLIP_FRAMES), "--fps", "12", "--stride", "2"]
PREPARE += ["--held-out", "0.35", "--crops", "15"]
CLIP_STEPS = {"full": {"teacher": 600, "student": 2500}, "fast": {"teacher": 200, "student": 800}}
# Row of the report -> quickstart config.
LATER = {"stage2": "stage2", "stage3": "stage3"}
CONTROLS = {"stage2_fake_self": "greedy_distill_paper"}
LONGER = "stage1_control"  # the row of ``control_config``
VIDEOS = {"full": 256, "fast": 128, "smoke": 16}


def stage_configs(speed: str, clips: Path | None, workdir: Path, *, controls: bool = False) -> dict[str, ConfigDict]:
    """Configs of the runs below ``workdir``, in their order; clips have more pixels, so they get smaller batches.

    Stages 2 and 3 are for the embedded data: of a few real clips there is no distribution to match.
    """
    names = {"teacher": "teacher", "student": "student"}
    names |= {} if clips else LATER | (CONTROLS if controls else {})
    configs = {name: read_config(f"configs/quickstart.py:{preset},{speed}").lock() for name, preset in names.items()}
    for name, config in configs.items():
        if name not in ("teacher", "stage3"):
            config.teacher_from = str(workdir / "teacher")
        if config.stage in ("dmd", "rl"):
            config.student_from = str(workdir / ("stage2" if name == "stage3" else "student"))
        if clips:
            batch = {"teacher": 4, "student": 2}[name]
            config.data.update(source=f"clips:{clips}", frames=CLIP_FRAMES, augment="labelled", batch=batch)
            config.student.fusion = "add"  # z sits on the frame's own grid: the shortest way to copy what does not move
            if name == "student":
                config.optimizer.update(muon_rate=2e-2, learning_rate=2e-3)
            if speed != "smoke":
                config.steps = CLIP_STEPS[speed][name]
        config.data.batch = -(-config.data.batch // jax.device_count()) * jax.device_count()
        read_settings(config)
    return configs


def control_config(config: ConfigDict, stage1: Path, stage2: Path) -> ConfigDict:
    """More of stage 1: from where it ended, for the CPU time that stage 2 took (compilation counts for both)."""
    spent = {directory: load_meta(directory / "checkpoints") for directory in (stage1, stage2)}
    of_update = spent[stage1]["train_cpu_s"] / spent[stage1]["steps"]
    control = config.copy_and_resolve_references()
    control.student_from, control.steps = str(stage1), max(1, round(spent[stage2]["train_cpu_s"] / of_update))
    control.seed += 1  # other examples than the first time
    return control


def quickstart(
    workdir: Path,
    *,
    clips: Path | None = None,
    captions: Path | None = None,
    controls: bool = False,
    speed: str = "full",
) -> Path:
    """Runs (or resumes) all stages in ``workdir`` and returns the path of the report.

    Args:
      workdir: created if missing.
      clips, captions: a folder of videos and a CSV with the columns clip,caption; None for the embedded data.
      controls: also train what stage 2 is compared with: more of stage 1, and stage 2 as published.
      speed: "full", "fast" (a third of the updates, a worse result) or "smoke" (a few updates, for CI).
    """
    if (clips is None) != (captions is None):
        raise UserError("clips and captions belong together: a folder, and a CSV with columns clip,caption.", "clips")
    if clips and controls:
        raise UserError("the controls are stage 2's, which clips do not have; leave out one of both.", "controls")
    begin, command = time.time(), ["bash", "launch/quickstart.sh", "--workdir", str(workdir)]
    data = f"clips {clips.resolve()}, captions {captions.resolve()}" if clips else "moving_shapes"
    job, report = f"{data}, {speed}", workdir / "report" / "report.html"
    marker = claim(workdir, job)
    if report.exists() and (not controls or LONGER in _rows(report)):
        print(f"quickstart: already done; report in {report}. Delete {workdir} to start over.")
        return report

    dataset, prompt = (workdir / "dataset").resolve() if clips else None, "a red square moving left"
    if clips:
        if not (marker.exists() and (dataset / "dataset.json").exists()):
            print("quickstart: preparing the clips")
            folders = ["--clips", str(clips), "--captions", str(captions), "--output", str(dataset), "--overwrite"]
            prepare.main(["clips", *folders, *PREPARE])
        prompt = load_source(f"clips:{dataset}")[0][0]["caption"]
    marker.write_text(job)  # only now: clips that cannot be used leave the folder free for another job
    configs = stage_configs(speed, dataset, workdir, controls=controls)
    numbers, parts = itertools.count(1), len(configs) + 2 + controls

    def announce(what: str):
        print(f"quickstart: {next(numbers)}/{parts} {what}", flush=True)

    for name, config in configs.items():
        announce(f"training the {name}, {config.steps} steps, in {workdir / name}")
        train(config, workdir / name)
    more = {name: workdir / name for name in configs if name not in ("teacher", "student")}
    if controls:
        more[LONGER] = workdir / LONGER
        control = control_config(configs["student"], workdir / "student", more["stage2"])
        announce(f"training the student further, for as long as stage 2 took, {control.steps} steps")
        train(control, more[LONGER])

    best, video = more.get("stage3", workdir / "student"), workdir / "stream.mp4"
    announce(f"streaming {prompt!r} to {video}")
    sample.main(["--checkpoint", str(best), "--prompt", prompt, "--frames", "128", "--output", str(video)])

    announce("measuring and writing the report")
    command += [] if speed == "full" else [f"--{speed}"]
    command += ["--clips", str(clips), "--captions", str(captions)] if clips else []
    command += ["--controls"] if controls else []
    runs = (workdir / "teacher", workdir / "student")
    print_table(evaluate(*runs, report.parent, more=more, videos=VIDEOS[speed], commands=[shlex.join(command)]))
    print(f"quickstart: done in {time.time() - begin:.0f} s\n  video   {video}\n  report  {report}")
    return report


def _rows(report: Path) -> set[str]:
    """Names of the models that a report is about."""
    metrics = json.loads((report.parent / "metrics.json").read_text(encoding="utf-8"))
    return {row["name"] for row in metrics["rows"]}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = cli.Parser(prog="bash launch/quickstart.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--clips", type=Path, help="folder of mp4/webm clips instead of the embedded data")
    parser.add_argument("--captions", type=Path, help="CSV with the columns clip,caption")
    parser.add_argument(
        "--controls", action="store_true", help="also train what stage 2 is compared with; a finished job may add them"
    )
    parser.add_argument("--fast", action="store_true", help="a third of the updates, and a worse result")
    parser.add_argument("--smoke", action="store_true", help="learns nothing: for CI")
    args = parser.parse_args(argv)
    speed = "smoke" if args.smoke else "fast" if args.fast else "full"
    with cli.places(workdir="--workdir", clips="--clips", controls="--controls"), sole_writer(args.workdir):
        quickstart(args.workdir, clips=args.clips, captions=args.captions, controls=args.controls, speed=speed)


if __name__ == "__main__":
    keep_freed_memory()
    cli.run(main)
