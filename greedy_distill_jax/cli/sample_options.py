"""Options of the command sample."""

from collections.abc import Sequence

from greedy_distill_jax.cli import Parser, number, text
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ranges import Count, FrameRate, Natural, NotNegative, Positive, Seed, Steps

FRAMES, WAN_FRAMES = 64, 81  # default of a student; what Wan2.1 was trained on


def parse_switch(value: str) -> tuple[int, str]:
    """Reads "128:a blue circle moving up" as (128, prompt)."""
    frame, colon, prompt = value.partition(":")
    if not colon or not frame.strip().isdecimal():
        raise UserError(f'{value!r} is not of the form FRAME:"PROMPT", such as 128:"a blue circle"', "switches")
    return int(frame), prompt


def parse_switches(values: Sequence[str]) -> dict[int, str]:
    """Reads several; UserError (field "switches") for two at one frame, of which one would be lost."""
    found: dict[int, str] = {}
    for value in values:
        frame, prompt = parse_switch(value)
        if frame in found:
            told = f"frame {frame} has two new prompts, {found[frame]!r} and {prompt!r}; give one"
            raise UserError(told, "switches")
        found[frame] = prompt
    return found


def parse_steps(value: str) -> int | str:
    """Reads one number; what else a step plan can be is left as it is, such as "4,2"."""
    return value if set(value) & set(",./") or value.startswith("diagonal") else number(Steps)(value)


def parse_levels(value: str) -> float | tuple[float, ...]:
    """Reads "0.1" as a number and "0,0.1" as one per chunk; StepPlan says which are noise levels."""
    levels = tuple(number(NotNegative)(level) for level in value.split(","))
    return levels if len(levels) > 1 else levels[0]


def parser(description: str) -> Parser:
    """Returns the parser of the command."""
    out = Parser(prog="python -m greedy_distill_jax.sample", description=description)
    source = out.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="DIR", help="run directory (the --workdir of training)")
    source.add_argument("--model", metavar="DIR", help="model folder in the layout of diffusers: a teacher")
    out.add_argument(
        "--prompt",
        type=text,
        action="append",
        required=True,
        help="may be given several times; each gives the video it gives alone",
    )
    out.add_argument("--text", metavar="DIR", help="text store or model folder that encodes the prompts instead")
    out.add_argument("--codec", metavar="PATH", help="decodes instead: codec.npz, model folder or weights of a VAE")
    frames = f"of the video (default: {FRAMES}, or the next number that fits; a teacher's training length, with --model"
    out.add_argument("--frames", type=number(Count), help=f"{frames} {WAN_FRAMES})")
    steps = "evaluations per video, or per chunk of a student: 4,2 is four for the first chunk, two for all others"
    out.add_argument("--steps", type=parse_steps, help=f"{steps} (default: the run's, or 50)")
    out.add_argument("--seed", type=number(Seed), default=0)
    held = "how a checkpoint's kernels are held: in the dtype that they are used in (compute: the default), or float32"
    out.add_argument("--weights", choices=("compute", "float32"), help=f"{held}; the video is the same")
    out.add_argument("--fps", type=number(FrameRate), help="default: the run's, with --model 16")
    out.add_argument(
        "--upscale", type=number(Natural), default=0, help="pixels per pixel; 0 makes small videos about 128 wide"
    )
    kept = "keeps compiled programs (default: the run's config.compile_cache); '' leaves that to jax's own variables"
    out.add_argument("--compile-cache", metavar="DIR", help=kept)
    out.add_argument("--output", default="out.mp4", help=".mp4, .webm or .gif")
    student = out.add_argument_group("streaming students")
    more = dict(type=text, action="append", default=[], metavar='FRAME:"PROMPT"')
    student.add_argument("--switch", **more, help="new prompt from a frame on")
    given = "goes on behind this video, image, folder of images or latents (.npy), which begin the video"
    student.add_argument("--given", metavar="PATH", help=given)
    student.add_argument("--given-frames", type=number(Count), metavar="N", help="the last N of its frames (all)")
    kept = "noise level at which chunks are kept for later ones, the first one clean; 0.1,0.1 is one per chunk"
    student.add_argument("--context-sigma", type=parse_levels, metavar="LEVEL", help=f"{kept} (default: the run's)")
    teacher = out.add_argument_group("teachers (default: the run's; with --model the values in parentheses)")
    teacher.add_argument("--negative-prompt", type=text, metavar="TEXT", help="unconditional branch (Wan2.1's own)")
    teacher.add_argument("--solver", choices=("euler", "unipc", "unipc_wan"), help="(unipc)")
    teacher.add_argument("--shift", type=number(Positive), help="of the noise levels (what scheduler/ says, else 5)")
    teacher.add_argument("--guidance", type=number(NotNegative), help="scale of classifier-free guidance, 1 = off (5)")
    model = out.add_argument_group("model folders")
    model.add_argument("--height", type=number(Count), help="pixels (480)")
    model.add_argument("--width", type=number(Count), help="pixels (832)")
    model.add_argument("--dtype", choices=("bfloat16", "float32"), help="to compute in (bfloat16)")
    return out
