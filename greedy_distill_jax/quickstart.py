"""The main job on one command: train a teacher, distil the student, stream a video, write the report.

    bash launch/quickstart.sh [--workdir DIR] [--clips DIR --captions FILE] [--fast]

Every stage is the public command of the same name and resumes where it was interrupted; a finished one is skipped.
"""

import argparse
import os
import time
from pathlib import Path

from ml_collections import ConfigDict

from greedy_distill_jax import cli, config as configuration, prepare, sample
from greedy_distill_jax.evaluate import evaluate, print_table
from greedy_distill_jax.train import train
from greedy_distill_jax.types import UserError

CLIP_SIZE, CLIP_FRAMES = "32x32", 16


def stage_configs(fast: bool, clips: Path | None) -> dict[str, ConfigDict]:
    """Configs of the teacher and the student; clips have more pixels, so they get smaller batches."""
    from configs import quickstart

    speed = ",fast" if fast else ""
    configs = {name: quickstart.get_config(name + speed) for name in ("teacher", "student")}
    for name, config in configs.items():
        if clips:
            config.data.source = f"clips:{clips}"
            config.data.frames = config.student.rope_frames = CLIP_FRAMES
            config.data.batch = 4
            config.steps = {"teacher": 800, "student": 1200}[name] // (4 if fast else 1)
            config.log.samples_every = config.steps
        configuration.validate(config)
    return configs


def check_workdir(workdir: Path) -> None:
    """Creates the folder; UserError when nothing can be written there."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written ({error.strerror}); choose another folder.") from error


def quickstart(workdir: Path, *, clips: Path | None = None, captions: Path | None = None, fast: bool = False) -> Path:
    """Runs (or resumes) all stages in ``workdir`` and returns the path of the report."""
    if (clips is None) != (captions is None):
        raise UserError("--clips and --captions belong together: a folder of videos and a CSV with the columns clip,caption.")
    check_workdir(workdir)
    begin = time.time()
    marker, report = workdir / "done", workdir / "report" / "report.html"
    job = f"clips {clips.resolve()}" if clips else "moving_shapes"
    job += " fast" if fast else ""
    if marker.exists() and report.exists():
        if marker.read_text() != job:
            raise UserError(
                f"--workdir {workdir} holds another job ({marker.read_text()}); choose another folder or delete it."
            )
        print(f"quickstart: already done; report in {report}. Delete {workdir} to start over.")
        return report

    dataset = None
    if clips:
        dataset = workdir / "dataset"
        if not (dataset / "dataset.json").exists():
            print("quickstart: preparing the clips")
            prepare.main(["clips", "--clips", str(clips), "--captions", str(captions), "--output", str(dataset),
                          "--size", CLIP_SIZE, "--frames", str(CLIP_FRAMES)])  # fmt: skip
    configs = stage_configs(fast, dataset)
    runs = {name: workdir / name for name in configs}
    configs["student"].teacher_from = str(runs["teacher"])
    for number, (name, config) in enumerate(configs.items(), 1):
        print(f"quickstart: {number}/4 training the {name}, {config.steps} steps, in {runs[name]}", flush=True)
        train(config, runs[name])

    prompt = "a red square moving left"
    if clips:
        from greedy_distill_jax.data.loader import load_source

        prompt = load_source(f"clips:{dataset}")[0][0]["caption"]
    video = workdir / "stream.mp4"
    print(f"quickstart: 3/4 streaming {prompt!r} to {video}", flush=True)
    sample.main(["--checkpoint", str(runs["student"]), "--prompt", prompt, "--frames", "128", "--output", str(video)])

    print("quickstart: 4/4 measuring and writing the report", flush=True)
    metrics = evaluate(runs["teacher"], runs["student"], report.parent, videos=128 if fast else 256,
                       commands=["bash launch/quickstart.sh" + (" --fast" if fast else "")])  # fmt: skip
    print_table(metrics)
    marker.write_text(job)
    print(f"quickstart: done in {time.time() - begin:.0f} s\n  video   {video}\n  report  {report}")
    return report


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="bash launch/quickstart.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--clips", type=Path, help="folder of mp4/webm clips to train on instead of the embedded data")
    parser.add_argument("--captions", type=Path, help="CSV with the columns clip,caption")
    parser.add_argument("--fast", action="store_true", help="a few minutes; the result is worse, and the report says so")
    args = parser.parse_args(argv)
    quickstart(args.workdir, clips=args.clips, captions=args.captions, fast=args.fast)


if __name__ == "__main__":
    cli.run(main)
