"""Does a student trained on real clips predict the next frame better than repeating the last one?

    python benchmarks/next_frame.py --checkpoint runs/clips/student

Prints PSNR on the held-out windows of the data the student was trained on, overall and per caption.
"""

from pathlib import Path

from greedy_distill_jax import cli
from greedy_distill_jax.eval.next_frame import next_frame_psnr
from greedy_distill_jax.eval.videos import held_out_videos
from greedy_distill_jax.measure import record
from greedy_distill_jax.runs.run import Run


def main() -> None:
    """Command line."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="run directory of a student trained on clips")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    run = Run.load(args.checkpoint)
    videos, captions = held_out_videos(run, run.latent_shape[0], 10_000, seed=0)
    groups = {"all": range(len(captions))}
    groups |= {caption: [i for i, c in enumerate(captions) if c == caption] for caption in sorted(set(captions))}
    result = {}
    for name, members in groups.items():
        members = list(members)
        text = run.text([captions[i] for i in members])
        result[name] = next_frame_psnr(run.model, run.params, run.codec, videos[members], text, run.settings.plan)
        figures = "  ".join(f"{key} {value:.2f}" for key, value in result[name].items())
        print(f"{name} ({len(members)} windows), PSNR in dB: {figures}")
    record.write_json(args.output, result)


if __name__ == "__main__":
    cli.run(main)
