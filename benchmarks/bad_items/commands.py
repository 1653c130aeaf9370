"""Command lines as such: unknown commands, what is missing or belongs elsewhere, bytes that are no text; platforms."""

from bad_items.case import ACCEPTED, Case, Source, kind
from bad_items.values import CLIPS, EVALUATE, ODE, STUDENT, TEACHER, TEXT, train

COMMANDS = (
    *(("sample", STUDENT), ("sample", TEACHER), ("prepare", CLIPS), ("prepare", ODE), ("prepare", TEXT)),
    *(
        ("evaluate", EVALUATE),
        ("convert", ("inspect", "{made}/wan")),
        ("convert", ("import", "{made}/wan", "{here}/o")),
    ),
    *(("compile", ("vae", "--target=v5e")), ("compile", ("train", "--config={made}/config.py", "--topology=v5e:2x2"))),
    *(("train", train("teacher")), ("quickstart", ("--workdir={here}/run", "--smoke"))),
)
ELSEWHERE = (
    *(("sample", STUDENT, (f"--{name}=2",), f"--{name}") for name in ("height", "width", "shift", "guidance")),
    *(("sample", STUDENT, (argument,), argument.split("=")[0]) for argument in ("--solver=euler", "--dtype=float32")),
    ("sample", STUDENT, ("--negative-prompt=a",), "--negative-prompt"),
    ("sample", STUDENT, ("--model={made}/diffusers",), "--model"),
    ("sample", TEACHER, ("--switch=1:a",), "--switch"),
    ("sample", TEACHER, ("--solver=heun",), "--solver"),
    ("prepare", CLIPS, ("--shard-index=0",), "--num-shards"),
    ("prepare", CLIPS, ("--num-shards=2",), "--shard-index"),
    ("prepare", CLIPS, ("--num-shards=2", "--shard-index=2"), "--shard-index"),
    ("prepare", CLIPS, ("--num-shards=2", "--shard-index=1", "--overwrite"), "--overwrite"),
    ("prepare", CLIPS, ("--dtype=float32",), "--dtype"),
    ("prepare", ODE, ("--model={made}/diffusers",), "--model"),
    ("prepare", ODE, ("--dtype=float16",), "--dtype"),
    ("prepare", ODE, ("--student={made}/config.py:teacher",), "--student"),
    ("convert", ("inspect", "{made}/wan"), ("--step=3",), "step"),
    ("convert", ("inspect", "{made}/wan"), ("--part=ema",), "part"),
    ("convert", ("inspect", "{made}/teacher"), ("--part=generator",), "generator"),
    ("convert", ("inspect", "{made}/teacher"), ("--step=7",), "7"),
    ("convert", ("import", "{made}/teacher", "{here}/o"), (), "already"),
    ("convert", ("export", "{made}/student", "{here}/o", "--format=original"), (), "torch-student"),
    ("convert", ("export", "{made}/teacher", "{here}/o", "--format=torch-student"), (), "torch-student"),
    ("convert", ("export", "{made}/teacher", "{here}/o"), ("--format=onnx",), "--format"),
    ("convert", ("export", "{made}/teacher", "{here}/o"), (), "--format"),
    ("convert", ("import", "{made}/wan", "{here}/o"), ("--dtype=int8",), "--dtype"),
    ("convert", ("import", "{made}/wan", "{here}/o"), ("--heads=5",), "heads"),
    ("compile", ("vae",), ("--target=v9",), "--target"),
    ("compile", ("vae", "--target=v5e"), ("--decoder=huge",), "--decoder"),
    ("compile", ("sharding", "--config={made}/config.py"), (), "--topology"),
    ("train", ("--config={made}/config.py",), (), "--workdir"),
    ("train", ("--workdir={here}/run",), (), "--config"),
    ("train", train("teacher"), ("--config.teacher_from={made}/none",), "none"),
    ("train", train("teacher"), ("--config.student_from={made}/student",), "student_from"),
    ("train", train("teacher_forcing"), ("--config.teacher_from={made}/student",), "teacher_from"),
    ("train", train("dmd"), ("--config.student_from={made}/teacher",), "student_from"),
    ("train", train("dmd"), ("--config.student_from=",), "student_from"),
    ("train", train("teacher"), ("--config.data.source=prompts:{made}/prompts.txt",), "prompts"),
    ("train", train("ode"), (), "ode"),
    ("train", train("teacher"), ("--config.data.source=clips:{made}/clips",), "clips"),
    ("train", train("teacher"), ("--config.data.text={made}/wan",), "wan"),
    ("train", train("teacher"), ("--config.data.source=clips:{made}/dataset", "--config.data.frames=7"), "frames"),
    ("train", train("teacher_forcing"), ("--config.model.dim=48",), "teacher_from"),
    ("train", train("teacher"), ("--config.data.accumulate=3",), "accumulate"),
    ("train", train("teacher"), ("--config.model.num_heads=7",), "heads"),
    ("train", train("teacher_forcing"), ("--config.student.chunk=3",), "chunk"),
    ("train", train("teacher"), ("--config.data.size=17",), "size"),
    ("evaluate", EVALUATE, ("--teacher={made}/student",), "--teacher"),
    ("evaluate", EVALUATE, ("--student={made}/teacher",), "--student"),
    ("evaluate", EVALUATE, ("--more=a",), "--more"),
    ("evaluate", EVALUATE, ("--more=a={made}/none",), "none"),
    ("evaluate", EVALUATE, ("--more=a={made}/student", "--more=a={made}/student"), "--more"),
    ("evaluate", EVALUATE, ("--more=teacher={made}/student",), "--more"),
    ("evaluate", EVALUATE, ("--more=stage1={made}/student",), "--more"),
    ("evaluate", EVALUATE, ("--more=b={made}/teacher",), "--more"),
    ("evaluate", EVALUATE, ("--more==",), "--more"),
    ("evaluate", EVALUATE, ("--suite=none",), "--suite"),
    ("evaluate", EVALUATE, ("--suite=none.py:SUITE",), "--suite"),
    ("evaluate", EVALUATE, ("--suite={made}/loss.py:mine",), "--suite"),
    ("evaluate", EVALUATE, ("--suite={made}/loss.py:other",), "--suite"),
    ("quickstart", ("--workdir={here}/run",), ("--clips={made}/clips",), "--clips"),
    ("quickstart", ("--workdir={here}/run",), ("--captions={made}/captions.csv",), "clips"),
    ("quickstart", ("--workdir={here}/run", "--captions={made}/captions.csv"), ("--clips={made}/wan",), "--clips"),
)


@kind("command lines", 9)
def command_lines(source: Source) -> Case:
    """What is unknown, missing, in two places, or belongs to another command."""
    rng = source.rng
    form = rng.randrange(10)
    if form == 0:
        command = source.pick("prepare", "convert", "compile")
        word = source.misspelt(source.pick("clips", "text", "inspect", "verify", "sharding", "kernels", "ode"))
        word = word if word != "x" else "zzz"
        return Case(command, (word, *rng.sample(("a", "b", "--x"), 2)), needs=((word, repr(word), "command"),))
    if form <= 2:
        command, argv = source.pick(*COMMANDS)
        option = f"--{source.word(6, 12)}x"
        return Case(command, (*argv, source.pick(option, f"{option}={source.word()}")), needs=((option,),))
    if form == 3:
        return _without(source)
    if form == 4:
        return source.pick(
            Case(source.pick("sample", "evaluate", "quickstart"), ("--help",), ACCEPTED),
            Case("prepare", (source.pick("clips", "text", "latents", "ode"), "--help"), ACCEPTED),
            Case("convert", (source.pick("import", "export", "inspect", "verify"), "-h"), ACCEPTED),
            Case("convert", ("inspect", "{made}/" + source.pick("wan", "diffusers", "teacher", "wan.pt")), ACCEPTED),
            Case("train", (*train("teacher"), "--help"), ACCEPTED),
        )
    if form == 5:
        return _no_text(source)
    command, argv, more, word = source.pick(*ELSEWHERE)
    argv = rng.sample(argv, len(argv)) if all(a.startswith("-") for a in argv) else argv
    seed = (f"--seed={rng.randint(0, 9999)}",) if command == "sample" and "--seed" not in more else ()
    return Case(command, (*argv, *seed, *more), needs=((word,),))


def _without(source: Source) -> Case:
    """A required option is missing, or has no value."""
    command, argv = source.pick(*(pair for pair in COMMANDS if pair[0] in ("sample", "prepare", "evaluate")))
    options = [argument for argument in argv if argument.startswith("--") and not argument.startswith("--output=")]
    options += [argument for argument in argv if argument.startswith("--output=") and command != "sample"]
    lost = source.rng.choice(options)
    name = lost.split("=")[0]
    rest = [argument for argument in argv if argument != lost]
    words = (name, "--checkpoint", "--teacher")
    return Case(command, tuple(rest + ([name] if source.chance(0.4) else [])), needs=(words,))


def _no_text(source: Source) -> Case:
    """An argument with bytes that are not UTF-8, as a shell hands it on, in places where there is no such thing."""
    bad = source.rng.randbytes(4).decode("latin-1").encode("ascii", "ignore").decode() + "\udcff" + source.word()
    bad = bad.replace("\0", "")
    return source.pick(
        Case("sample", (*STUDENT, f"--checkpoint={bad}")),
        Case("sample", (*STUDENT, f"--frames={bad}")),
        Case("sample", (*STUDENT, f"--switch={bad}")),
        Case("sample", (*STUDENT, f"--steps={bad}")),
        Case("train", train("teacher", f"--config.data.source={bad}")),
        Case("train", train("teacher", f"--config.stage={bad}")),
        Case("train", (f"--config={bad}", "--workdir={here}/run")),
        Case("convert", ("inspect", bad)),
        Case("prepare", (*CLIPS, f"--clips={bad}")),
        Case("prepare", (*CLIPS, f"--captions={bad}")),
        Case("evaluate", (*EVALUATE, f"--teacher={bad}")),
        Case("sample", (*STUDENT, "--frames=2", f"--prompt={bad}")),
    )


@kind("compile", 4)
def compiling(source: Source) -> Case:
    """Slices that there are not, files that cannot be written."""
    config = "--config={made}/config.py:" + source.pick("teacher", "teacher_forcing", "dmd")
    rng = source.rng
    command = source.pick("train", "sharding")
    four = "--config.data.batch=4"  # one of each device
    form = rng.randrange(6)
    if form == 0:
        n, m = rng.randint(3, 99), rng.randint(3, 99)
        wrong = source.pick(
            f"v5e:{n}x{m}", f"v{n}:4x4", "v5e", f"v5p:{n}", "v5e:", ":4x4", source.word(), f"v5e:{n}xx{m}"
        )
        wrong = wrong if wrong not in ("v5e:4x8", "v5e:8x8") else "v5e:3x3"
        return Case("compile", (command, config, f"--topology={wrong}"), needs=((wrong,),))
    if form == 1:
        size = source.pick("", "1080p", "0p", "480", source.word(), f"{rng.randint(1, 999)}x{rng.randint(1, 999)}")
        return Case(
            "compile", (command, config, four, "--topology=v5e:2x2", f"--size={size}"), needs=(("--size", "size"),)
        )
    if form == 2:
        where = source.pick("{here}", "{made}/captions.csv/x.json", "{here}/none/x.json", f"{{here}}/{'x' * 300}/y")
        return Case("compile", ("train", config, four, "--topology=v5e:2x2", f"--json={where}"), needs=(("--json",),))
    if form == 3:
        word = source.word() + "x"
        return Case("compile", ("train", config, four, "--topology=v5e:2x2", f"--only={word}"), needs=((word,),))
    if form == 4:
        return Case("compile", ("kernels", "--target=v5e", f"--only={source.word()}qq"), needs=(("--only",),))
    wrong = source.misspelt(source.pick("v5e", "v6e", "v5p"))
    return Case("compile", (source.pick("kernels", "sweep", "vae"), f"--target={wrong}"), needs=((wrong,),))


@kind("platforms", 1)
def platforms(source: Source) -> Case:
    """JAX on devices that are not there, in a process of its own."""
    if not source.chance(0.25):  # these take seconds; the others go to an argument that jax is not asked for
        command = source.pick("sample", "train")
        return Case(command, (f"--{source.word()}qq=1",), needs=(("--",),))
    name = source.pick("nowhere", "tpuu", "gpu2", source.word())
    command, argv = source.pick(("train", train("teacher")), ("sample", (*STUDENT, "--frames=2")))
    return Case(command, argv, needs=((name,),), env={"JAX_PLATFORMS": name})
