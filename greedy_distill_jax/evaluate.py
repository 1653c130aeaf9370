"""Numbers, pictures and a report of a teacher and the student distilled from it.

python -m greedy_distill_jax.evaluate --teacher runs/teacher --student runs/student --output runs/report
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from greedy_distill_jax import cli
from greedy_distill_jax.data.loader import videos_of
from greedy_distill_jax.data.sources.moving_shapes import is_shapes
from greedy_distill_jax.diffusion import noise_levels
from greedy_distill_jax.distribution.mesh import use_compile_cache
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval import gates, oracle
from greedy_distill_jax.eval.metrics import evaluate_videos
from greedy_distill_jax.eval.next_frame import next_frame_psnr
from greedy_distill_jax.eval.report import ROW_KEYS, write_report
from greedy_distill_jax.eval.time_per_frame import kind_of, time_per_frame
from greedy_distill_jax.runs.run import Run, data_source
from greedy_distill_jax.storage.checkpoint import source_commit, versions
from greedy_distill_jax.streaming.loop import cache_bytes
from greedy_distill_jax.training.metrics import read_scalars

HORIZON = 8  # rollouts are this many times longer than training videos
SHOWN = 6  # captions in the report's grid


def held_out_videos(run: Run, frames: int, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Real videos [V, T, H, W, 3] of captions the run was not trained on, and the captions."""
    source, codec = data_source(run.settings, "held_out", frames=frames, seed=seed)
    if not len(source):
        raise UserError(
            f"{run.settings.data.source}, which --teacher was trained on, has no held-out windows; prepare it again "
            "with --held-out above 0."
        )
    examples = [source[i] for i in range(min(count, len(source)))]
    return videos_of(examples, codec), [e["caption"] for e in examples]


def _load(option: str, directory: str | Path, is_student: bool) -> Run:
    """A run of the wanted kind; errors name the option it was given by."""
    with cli.option(option, directory):
        run = Run.load(directory)
        if run.is_student != is_student:
            held, wanted = ("teacher", "student") if is_student else ("student", "teacher")
            raise UserError(f"{Path(directory).expanduser()} holds a {held}; give the run directory of a {wanted}.")
    return run


def data_of(run: Run) -> str:
    """What a run was trained on, in words: source and latent shape."""
    return f"{run.settings.data.source} ({'x'.join(map(str, run.latent_shape))})"


def few_steps(run: Run) -> int:
    """The few-step setting shown beside the many-step one."""
    steps = run.settings.sample.steps
    return steps if run.model.cfg.context == "last_step_kv" else min(2, steps)


def sampled(run: Run, captions: Sequence[str], *, batch: int = 256, **options) -> np.ndarray:
    """``run.sample_videos`` in batches."""
    parts = [captions[i : i + batch] for i in range(0, len(captions), batch)]
    seed = options.pop("seed", 0)
    return np.concatenate([run.sample_videos(part, seed=seed + i, **options) for i, part in enumerate(parts)])


def rows_of(
    videos: dict[str, tuple[np.ndarray, dict[str, Any]]], captions: list[str], real: np.ndarray, window: int
) -> tuple[list[dict[str, Any]], dict[str, dict[str, list[float]]]]:
    """Table rows and per-frame curves of moving-shape videos; ``videos``: name -> (video, fixed columns)."""
    rows, by_frame = [], {"validity": {}, "quality": {}}
    for name, (video, fixed) in videos.items():
        metrics = evaluate_videos(video, captions, window=window, reference_VTHWC=real)
        rows.append({key: fixed.get(key, metrics.get(key)) for key in ROW_KEYS} | {"name": name})
        by_frame["validity"][name] = metrics["valid_by_frame"]
        by_frame["quality"][name] = oracle.read(video).iou_VT.mean(0).tolist()
    return rows, by_frame


def loss_curves(run: Run, directory: str | Path) -> dict[str, list[float | int]]:
    """{"step": [...], term: [...]} of every loss term in the run's scalars.jsonl, from its first update on."""
    stage = run.settings.stage
    lines = [line for line in read_scalars(directory) if f"{stage}/loss" in line]
    terms = [t for t in run.settings.losses if lines and f"{stage}/{t}" in lines[0]]
    return {"step": [line["step"] for line in lines]} | {t: [line[f"{stage}/{t}"] for line in lines] for t in terms}


def evaluate(
    teacher_dir: str | Path,
    student_dir: str | Path,
    output: str | Path,
    *,
    more: Mapping[str, str | Path] | None = None,
    videos: int = 256,
    seed: int = 1000,
    lengths: Sequence[int] | None = None,
    commands: Sequence[str] = (),
    announce: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Samples, measures, writes ``metrics.json`` and ``report.html`` and returns the metrics.

    Args:
      teacher_dir, student_dir: run directories.
      output: folder of the report.
      more: further students by the name of their row, such as {"stage2": ...}, each streamed with the step lists of the
        one with the fewest steps, as is the student itself in its few-step row.
      videos: held-out videos per row.
      seed: of held-out data and noise.
      lengths: video lengths of the timing; None for 32, 256, and 1024 where the teacher still has few tokens.
      commands: shown in the report.
      announce: told what is being done.
    """
    if videos < 1:
        raise UserError(f"--videos is {videos}; evaluate at least one video.")
    teacher, student = _load("--teacher", teacher_dir, False), _load("--student", student_dir, True)
    students, others = {f"--student {student_dir}": student}, {}
    for name, directory in (more or {}).items():
        option = f"--more {name}={directory}"
        if name in ("", "data", "teacher", "stage1", "stage1_few_steps"):
            raise UserError(f"{option}: {name!r} cannot be its row, which others have; write --more OTHER={directory}.")
        students[option] = others[name] = _load(f"--more {name}", directory, True)
    for option, run in students.items():
        if data_of(run) != data_of(teacher):
            raise UserError(
                f"{option} was trained on {data_of(run)}, --teacher {teacher_dir} on {data_of(teacher)}; give runs "
                "that belong together."
            )
        if HORIZON * teacher.latent_shape[0] % run.model.cfg.chunk:
            raise UserError(
                f"{option} makes chunks of {run.model.cfg.chunk} frames, which do not divide the {HORIZON} x "
                f"{teacher.latent_shape[0]} frames that evaluate streams; train with another chunk or frame count."
            )
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}); choose another folder.") from error
    use_compile_cache(teacher.settings.compile_cache)
    frames = teacher.latent_shape[0]
    shapes = is_shapes(teacher.settings.data.source)
    long = HORIZON * frames
    real, captions = held_out_videos(teacher, long if shapes else frames, videos, seed)
    few, many = few_steps(student), student.settings.sample.steps
    first = few
    if others:
        sample = min((run.settings.sample for run in others.values()), key=lambda sample: sample.steps)
        few, first = sample.steps, sample.first_steps or sample.steps

    announce(f"evaluate: {len(captions)} held-out videos per model, students to {long} frames")
    todo: list[tuple[str, Run, int, dict[str, Any]]] = [
        ("teacher", teacher, frames, dict(steps=teacher.settings.sample.steps)),
        ("stage1", student, long, dict(steps=many)),
        ("stage1_few_steps", student, long, dict(steps=few, first_steps=first)),
        *((name, run, long, dict(steps=few, first_steps=first)) for name, run in others.items()),
    ]
    nothing = {"steps": "\N{EN DASH}", "train_cpu_s": 0.0, "seeds": [seed]}
    made: dict[str, tuple[np.ndarray, dict[str, Any]]] = {"data": (real, nothing)}
    for name, run, length, options in tqdm(todo, desc="sampling", disable=not sys.stderr.isatty()):
        video = sampled(run, captions, frames=length, seed=seed, **options)
        made[name] = (video, options | {"train_cpu_s": run.meta["train_cpu_s"], "seeds": [run.settings.seed, seed]})

    extra: dict[str, Any] = {"commands": list(commands), "videos": len(captions)}
    extra["held_out_captions"] = sorted(set(captions))
    gate_list: list[dict[str, Any]] = []
    if shapes:
        # Distances are to other real videos than the data row's, so that its own row is the floor.
        reference, _ = held_out_videos(teacher, long, videos, seed + 1)
        rows, by_frame = rows_of(made, captions, reference, frames)
        named = {row["name"]: row for row in rows}
        told = (oracle.captioned(captions, len(captions))[:, 2] >= 0).all()
        gate_list = gates.quality_gates(named["teacher"], named["stage1"], direction=bool(told))
        if "stage2" in named:
            gate_list += gates.stage2_gates(named["stage2"], named["stage1_few_steps"], named["data"])
    else:
        rows = [{key: fixed.get(key) for key in ROW_KEYS} | {"name": name} for name, (_, fixed) in made.items()]
        by_frame = {}
        scores = next_frame_psnr(student.model, student.params, student.codec, real, student.text(captions))
        extra["next_frame_psnr_db"] = scores
        gate_list = [{"name": "next frame, PSNR in dB: the student against repeating the last frame",
                      "value": round(scores["student"], 2), "threshold": f"> {scores['repeat']:.2f}",
                      "passed": scores["student"] > scores["repeat"]}]  # fmt: skip

    announce("evaluate: time per frame against video length, all models in this process")
    streamer, text = student.streamer(few, few), student.text(captions[:1])
    tokens = int(np.prod(student.latent_shape[1:3])) // teacher.model.cfg.patch**2
    lengths = lengths or (32, 256, *((1024,) if tokens <= 4 else ()))
    s = teacher.settings.sample
    times = time_per_frame(
        teacher.model, teacher.params, noise_levels.uniform_steps(few, s.shift), streamer, student.params, text,
        student.latent_shape[1:], frames=lengths,
    )  # fmt: skip
    gate_list.append(gates.cost_gate(times, min(lengths), 256 if 256 in lengths else max(lengths)))
    extra["timing"] = f"{few} evaluations per frame (students) and per video (teacher), one video, no guidance, "
    extra["timing"] += "CPU time of the process" if jax.default_backend() == "cpu" else "wall time"

    state = streamer.init(student.params, text, jax.random.key(0), student.latent_shape[1:])
    key_bytes = jnp.dtype(teacher.model.cfg.dtype).itemsize
    causal = 2 * teacher.model.cfg.num_layers * teacher.model.cfg.dim * tokens * key_bytes
    metrics = {
        "rows": rows,
        "time_per_frame_ms": times,
        "cache_bytes": {
            f"{kind_of(streamer)}, any length": cache_bytes(state),
            f"full_causal, {max(lengths)} frames": causal * max(lengths),
        },
        "versions": versions(),
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "commit": source_commit(),
        "gates": gate_list,
        "config": {name: json.loads(run.settings.text) for name, run in (("teacher", teacher), ("student", student))},
        "training_frames": frames,
        "extra": extra,
    }  # fmt: skip
    columns = {name: [video[i] for i in range(min(SHOWN, len(captions)))] for name, (video, _) in made.items()}
    curves = {
        name: loss_curves(run, folder)
        for name, run, folder in (
            ("teacher", teacher, teacher_dir), ("stage1", student, student_dir),
            *((name, run, (more or {})[name]) for name, run in others.items()),
        )
    }  # fmt: skip
    path = write_report(
        output, metrics=metrics, videos=columns, captions=captions[:SHOWN], curves=curves, by_frame=by_frame,
        fps=float(teacher.settings.log.fps),
    )  # fmt: skip
    announce(f"evaluate: {path}")
    return metrics


def print_table(metrics: dict[str, Any]) -> None:
    """Rows and gates as text."""
    for row in metrics["rows"]:
        cells = [f"{k} {v:.3f}" for k, v in row.items() if isinstance(v, float) and k != "train_cpu_s"]
        print(f"  {row['name']:<18} steps {row['steps']}  {'  '.join(cells)}")
    for row in metrics["time_per_frame_ms"]:
        print(
            f"  ms per frame at {row['frames']:>4} frames  "
            + "  ".join(f"{k} {v:.2f}" for k, v in list(row.items())[1:])
        )
    print(f"  (timed: {metrics['extra']['timing']})")
    for gate in metrics["gates"]:
        print(f"  {'pass' if gate['passed'] else 'FAIL'}  {gate['name']}: {gate['value']} ({gate['threshold']})")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = cli.Parser(prog="python -m greedy_distill_jax.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="run directory of the teacher")
    parser.add_argument("--student", required=True, help="run directory of the student")
    parser.add_argument(
        "--more", action="append", default=[], metavar="NAME=DIR",
        help="a further student and the name of its row, such as stage2=runs/stage2; may be repeated",
    )  # fmt: skip
    parser.add_argument("--output", required=True, help="folder of metrics.json and report.html")
    parser.add_argument("--videos", type=int, default=256, help="held-out videos per model")
    parser.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args(argv)
    wrong = [pair for pair in args.more if "=" not in pair]
    if wrong:
        raise UserError(f"--more {wrong[0]!r}: give NAME=DIR, such as --more stage2=runs/stage2.")
    more = dict(pair.split("=", 1) for pair in args.more)
    if len(more) < len(args.more):
        raise UserError(f"--more names a row twice: {', '.join(args.more)}.")
    metrics = evaluate(args.teacher, args.student, args.output, more=more, videos=args.videos, seed=args.seed,
                       commands=["python -m greedy_distill_jax.evaluate " + " ".join(sys.argv[1:])])  # fmt: skip
    print_table(metrics)


if __name__ == "__main__":
    cli.run(main)
