"""Bad values: configuration keys, lists of steps, numbers of options, switches, meshes."""

import dataclasses
import functools
import math
import types
import typing

from bad_items.case import ACCEPTED, Case, Source, kind
from greedy_distill_jax import ranges
from greedy_distill_jax.config import keys, stages

# What every stage of the tiny configuration is called with.
STAGE_OF = {"distill": "dmd", "critic": "dmd", "student": "teacher_forcing"}
NOT_NUMBERS = ("abc", "1,5", "1.2.3", "--", "½", "1e", "0x1g", "[1", "(", "{}", "None", "one", "1 2", "'", "\\", "%d")
# Texts whose place is a name of a list or a path.
NAMES = (
    *("stage", "data.source", "data.augment", "data.text", "model.prediction", "model.dtype", "model.gradient_dtype"),
    *("model.remat", "student.split", "student.fusion", "student.rope_mode", "student.context", "sample.sampler"),
)


def train(stage: str, *more: str, config: str = "{made}/config.py") -> tuple[str, ...]:
    """Arguments of a training of the tiny configuration in a folder "run" of the case."""
    return (f"--config={config}:{stage}", "--workdir={here}/run", *more)


def going_on(source: Source, *more: str) -> Case:
    """A training that is done: nothing is left to do but to read everything."""
    files = source.folder("teacher", "run")
    return Case("train", train("teacher", *more), ACCEPTED, files=files)


@dataclasses.dataclass(frozen=True)
class Number:
    """A numeric key: its annotation's type and ranges, and whether it is one of a pair."""

    key: str
    plain: type
    rules: tuple
    pair: bool


def _numbers(group: type, path: str = "") -> typing.Iterator[Number]:
    for name, hint in typing.get_type_hints(group, include_extras=True).items():
        here = f"{path}.{name}".strip(".")
        if dataclasses.is_dataclass(hint):
            yield from _numbers(hint, here)
            continue
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        pair = origin is tuple
        several = pair or origin in (typing.Union, types.UnionType)
        first = next(a for a in (inner if several else (hint,)) if a is not types.NoneType)
        plain, *rules = typing.get_args(first) if typing.get_origin(first) is typing.Annotated else (first,)
        yield Number(here, plain, tuple(rules), pair)


@functools.cache
def all_keys() -> tuple[Number, ...]:
    """Every key that is no group, of all stages."""
    own = [found for name, group in stages.groups().items() for found in _numbers(group, name)]
    return (*_numbers(keys.Keys), *own)


def stage_of(source: Source, key: str) -> str:
    """A stage that reads the key."""
    default = source.pick("teacher", "teacher_forcing", "dmd")
    return STAGE_OF.get(key.split(".")[0], default)


def outside(source: Source, plain: type, rules: tuple) -> str:
    """A number that none of the rules allows, as text of its type."""
    rng, found = source.rng, []
    for rule in rules:
        step = 10 ** rng.uniform(-3, 9) if plain is float else rng.choice((1, 2, rng.randint(3, 10**9)))
        for bound, inside, sign in ((rule.low, rule.with_low, -1), (rule.high, rule.with_high, 1)):
            if math.isfinite(bound):
                beyond = bound + sign * step
                found += [beyond] if beyond != rule.also and beyond != bound else []
                found += [] if inside else [bound]
    if plain is int:
        return str(int(rng.choice([*found, 2**31 + 2**32 * rng.randint(1, 9), -(2**63) - rng.randint(1, 99)])))
    return str(rng.choice([*found, math.nan, math.inf, -math.inf, rng.choice((-1, 1)) * 10.0 ** rng.randint(39, 300)]))


def not_a_number(source: Source, whole: bool) -> str:
    """Text that is not of the type of a number."""
    rng = source.rng
    forms = [rng.choice(NOT_NUMBERS), source.junk() + "x", f"{rng.randint(0, 99)}{source.word(1, 3)}", ""]
    forms += [f"{rng.uniform(0.1, 99):.3f}", f"{rng.randint(1, 9)}e{rng.randint(0, 3)}"] if whole else []
    return rng.choice(forms)


@kind("values of keys", 22)
def values_of_keys(source: Source) -> Case:
    """Numbers out of their range, text for numbers, and text that is no choice."""
    if source.chance(0.04):
        return _good_value(source)
    number = source.pick(*(n for n in all_keys() if n.plain in (int, float, bool) or _has_choice(n)))
    value = _bad_value(source, number)
    stage, more = stage_of(source, number.key), ()
    if number.key.startswith("student.causal"):
        more = ("--config.student.kind=causal", "--config.student.window=4")
    needs = ((_named(number.key),), (value, repr(value), *_other_forms(value)))
    return Case("train", train(stage, *more, f"--config.{number.key}={value}"), needs=needs)


def _named(key: str) -> str:
    """What must be said of a key: all of it, or of a network's fields and a student's the last part."""
    return key.rsplit(".", 1)[-1] if key in NAMES else key


def _has_choice(number: Number) -> bool:
    return number.key in NAMES or any(isinstance(rule, ranges.Choice) for rule in number.rules)


def _bad_value(source: Source, number: Number) -> str:
    if number.plain is bool:
        return source.pick("perhaps", "2", "-1", "nein", "tru", source.junk() + "x", "[]", "0.5")
    if _has_choice(number):
        return source.junk() + source.pick("", ":", ":" + source.word(), "/" + source.word())
    if number.pair:
        first = round(source.rng.uniform(0, 0.99), 3)
        rules = number.rules
        forms = [f"({first}, {outside(source, float, rules)})", f"({first},)", f"({first}, {first}, {first})"]
        forms += [f"({first}, 'a')", f"({first}", str(first), "()", f"({first}, None)"]
        return source.rng.choice(forms).replace("nan", "-1").replace("inf", "9")
    if source.chance(0.35):
        return not_a_number(source, number.plain is int)
    return outside(source, number.plain, number.rules)


def _other_forms(value: str) -> tuple[str, ...]:
    """What a number may be written as, once it was read."""
    try:
        return repr(float(value)), repr(int(float(value)))
    except (ValueError, OverflowError):
        return (value.strip("()[], "), value.replace("'", ""))


GOOD_VALUES = (
    *("log.every=3", "checkpoint.every=7", "checkpoint.keep=1", "log.fps=9", "data.threads=0", "ema.decay=0.5"),
    *("text_dropout=0.5", "optimizer.learning_rate=1e-3", "optimizer.betas=(0.5, 0.6)"),
    *("data.max_bad_records=0", "sample.guidance=1", "sample.steps=3", "ema.start=0", "losses.flow_matching.weight=2"),
    *("mesh.data=1", "compile_cache=", "optimizer.warmup=0", "log.samples_every=5", "sample.sampler=unipc"),
)


def _good_value(source: Source) -> Case:
    chosen = source.rng.sample(GOOD_VALUES, source.rng.randint(1, 4))
    return going_on(source, *(f"--config.{text}" for text in chosen))


@kind("names of keys", 9)
def names_of_keys(source: Source) -> Case:
    """Misspelt keys and options, groups given a value, keys of another stage, stray arguments."""
    if source.chance(0.03):
        return _good_value(source)
    known = {n.key for n in all_keys()}
    groups = {".".join(key.split(".")[:i]) for key in known for i in range(1, key.count(".") + 1)}
    key = source.pick(*sorted(known - {"losses", "critic.losses"}))
    form = source.rng.randrange(7)
    if form == 0:
        group = source.pick(*sorted(groups))
        value = source.pick("3", "True", source.junk(), "{}", "")
        return Case("train", train("teacher", f"--config.{group}={value}"), needs=((group,),))
    if form == 1:
        own = sorted(n.key for n in all_keys() if n.key.startswith(("distill.", "critic.")) and n.plain is int)
        key = source.pick(*own)
        stage = source.pick("teacher", "teacher_forcing")
        value = str(source.rng.randint(21, 99))
        return Case("train", train(stage, f"--config.{key}={value}"), needs=((key,), (value,)))
    if form == 2:
        word = source.junk() + "x"
        word = word.lstrip("-") or "x"
        return Case("train", train("teacher", word), needs=((word, repr(word)),))
    if form == 3:
        name = source.misspelt(source.pick("workdir", "config"))
        name = name if name.strip("_-") and not name.startswith("config=") else "wrkdir"
        given = (f"--config={{made}}/config.py:{source.pick('teacher', 'dmd')}", "--workdir={here}/run")
        return Case("train", (*given, f"--{name}={source.word()}"), needs=((name,),))
    if form == 4:
        key = source.pick(*sorted(n.key for n in all_keys() if n.plain is not bool and "losses" not in n.key))
        return Case("train", train("teacher", f"--config.{key}"), needs=((key, "--workdir"),))
    while (wrong := _wrong_key(source, key)) in known | groups or wrong.startswith(("losses.", "critic.losses.")):
        continue
    value = source.pick("1", "0.5", "True", source.word())
    return Case("train", train(stage_of(source, key), f"--config.{wrong}={value}"), needs=((wrong,),))


def _wrong_key(source: Source, key: str) -> str:
    parts = key.split(".")
    form = source.rng.randrange(5)
    if form == 0:
        return f"{key}.{source.word()}"
    if form == 1 and len(parts) > 1:
        return ".".join(parts[1:])
    if form == 2:
        return f"{source.word()}.{parts[-1]}"
    at = source.rng.randrange(len(parts))
    parts[at] = source.misspelt(parts[at])
    return ".".join(parts)


def bad_steps(source: Source) -> str:
    """A list of steps that cannot be: an entry of a good one is spoilt."""
    rng = source.rng
    good = [rng.choice((str(rng.randint(1, 9)), "1/.9/.4", "1.0/0.5", "1/.36")) for _ in range(rng.randint(1, 4))]
    bad = (
        *("0", "-1", "1001", "2147483648", "1e3", "x", "", " ", "nan", "inf", "1/nan", "1/inf", ".5/.4", "1/.5/.5"),
        *("1/.5/.7", "1/0", "1/-.5", "1//.5", "/", "1/", "1/.9/x", "2/1", "1/1", "-1/.5", "1.5", "4;3", "1/.5/", "½"),
        *("None", "1_0/.5_x", "0x4", f"{rng.randint(1001, 10**12)}", f"1/{1 + rng.random():.3f}"),
        *(f"1/.{rng.randint(10, 49)}/.{rng.randint(50, 99)}", f"-{rng.randint(1, 99)}", f"1/{-rng.random():.4f}"),
        source.word(),
    )
    good[rng.randrange(len(good))] = rng.choice(bad)
    return ",".join(good)


GOOD_STEPS = ("1", "2", "2,1", "1/.5", "3,1/.6,2", "1/.9/.2", "1,1", "3", "1.0/.25", "2,2,1")


@kind("lists of steps", 7)
def lists_of_steps(source: Source) -> Case:
    """Of a student's chunks, on a command line and in a configuration; levels of its context."""
    stream = ("--checkpoint", "{made}/student", "--prompt", "a red square", "--frames", "2")
    if source.chance(0.08):
        steps = source.pick(*GOOD_STEPS)
        return Case("sample", (*stream, f"--steps={steps}", "--output={here}/o.gif"), ACCEPTED)
    form = source.rng.randrange(4)
    if form == 0:
        steps = bad_steps(source)
        return Case("sample", (*stream, f"--steps={steps}", "--output={here}/o.mp4"), needs=(("--steps",),))
    if form == 1:
        steps = bad_steps(source)
        steps = f"{steps},0" if "," not in steps else f"{steps}0" if steps.endswith(",") else steps
        return Case("train", train("teacher_forcing", f"--config.sample.steps={steps}"), needs=(("steps",),))
    if form == 2:
        level = source.pick("1", "1.5", "-0.1", "nan", "inf", "x", "(0, 1)", "(0.1, -1)", "()", "(0, 'a')", "None")
        level = source.pick(level, f"{1 + source.rng.random():.4f}", f"-{source.rng.random():.4f}1", source.word())
        return Case("train", train("teacher_forcing", f"--config.sample.context_sigma={level}"), needs=(("context",),))
    teacher = ("--checkpoint", "{made}/teacher", "--prompt", "a", "--frames", "2", "--output={here}/o.mp4")
    steps = source.pick("4,2", "1/.5", "0", "-3", "1001", "x", "1.5", "", "2,2", str(source.rng.randint(1001, 10**10)))
    return Case("sample", (*teacher, f"--steps={steps}"), needs=(("--steps",),))


# Command and arguments that are good -> options of numbers with their type and ranges.
CLIPS = ("clips", "--clips={made}/clips", "--captions={made}/captions.csv", "--output={here}/out")
TEXT = ("text", "--model={made}/none", "--prompts={made}/prompts.txt", "--output={here}/out")
ODE = ("ode", "--teacher={made}/teacher", "--student={made}/config.py:teacher_forcing")
ODE = (*ODE, "--prompts={made}/prompts.txt", "--output={here}/out")
STUDENT = ("--checkpoint={made}/student", "--prompt=a", "--output={here}/o.mp4")
TEACHER = ("--checkpoint={made}/teacher", "--prompt=a", "--output={here}/o.mp4")
MODEL = ("--model={made}/diffusers", "--prompt=a", "--output={here}/o.mp4")
EVALUATE = ("--teacher={made}/teacher", "--student={made}/student", "--output={here}/report")
COUNT, NATURAL, POSITIVE, NOT_NEGATIVE = ranges.Count, ranges.Natural, ranges.Positive, ranges.NotNegative
OPTIONS = (
    *(("sample", STUDENT, f"--{name}", hint) for name, hint in (("frames", COUNT), ("upscale", NATURAL))),
    *(("sample", STUDENT, f"--{name}", hint) for name, hint in (("seed", ranges.Seed), ("fps", ranges.FrameRate))),
    *(("sample", TEACHER, f"--{name}", hint) for name, hint in (("shift", POSITIVE), ("guidance", NOT_NEGATIVE))),
    *(("sample", MODEL, f"--{name}", COUNT) for name in ("height", "width")),
    *(("prepare", CLIPS, f"--{name}", COUNT) for name in ("frames", "stride", "group", "num-shards")),
    *(("prepare", CLIPS, f"--{name}", NATURAL) for name in ("crops", "shard-index")),
    *(("prepare", CLIPS, "--fps", ranges.FrameRate), ("prepare", CLIPS, "--held-out", ranges.Momentum)),
    *(("prepare", TEXT, f"--{name}", COUNT) for name in ("text-len", "batch")),
    *(("prepare", ODE, f"--{name}", COUNT) for name in ("per-prompt", "batch", "group", "frames")),
    *(("prepare", ODE, "--steps", ranges.Steps), ("prepare", ODE, "--seed", ranges.Seed)),
    ("prepare", ODE, "--guidance", NOT_NEGATIVE),
    *(("convert", ("inspect", "{made}/wan"), f"--{name}", COUNT) for name in ("heads", "text-len")),
    ("convert", ("inspect", "{made}/teacher"), "--step", NATURAL),
    ("convert", ("verify", "{made}/wan", "{made}/wan"), "--atol", NOT_NEGATIVE),
    ("convert", ("export", "{made}/teacher", "{here}/out", "--format=original"), "--shard-gb", POSITIVE),
    *(("evaluate", EVALUATE, "--videos", COUNT), ("evaluate", EVALUATE, "--seed", ranges.Seed)),
    ("evaluate", EVALUATE, "--refresh-history", NATURAL),
    *(("compile", ("vae", "--target=v5e"), f"--{name}", COUNT) for name in ("height", "width")),
)
GOOD_OPTIONS = (
    ("sample", (*STUDENT, "--frames=2", "--seed={n}", "--fps={f}", "--upscale={k}")),
    ("sample", (*TEACHER, "--frames=2", "--seed={n}", "--guidance={f}", "--shift={f}")),
    ("prepare", (*CLIPS, "--size=16x16", "--frames={k}", "--stride={k}", "--held-out=0.3", "--crops={k}")),
    ("prepare", (*CLIPS, "--size=12x8", "--frames=3", "--fps={f}", "--held-out=0", "--group={k}")),
    ("convert", ("inspect", "{made}/wan", "--heads=2", "--text-len=6")),
    ("convert", ("verify", "{made}/wan", "{made}/diffusers", "--atol={f}")),
    ("convert", ("export", "{made}/student", "{here}/out", "--format=torch-student")),
    ("convert", ("export", "{made}/teacher", "{here}/out.pt", "--format=causal-pt", "--dtype=float16")),
    ("convert", ("import", "{made}/diffusers", "{here}/out", "--text-len=6", "--dtype=bfloat16")),
)


@kind("numbers of options", 17)
def numbers_of_options(source: Source) -> Case:
    """Options of every command that take a number, and sizes."""
    rng = source.rng
    if source.chance(0.2):
        command, argv = source.pick(*GOOD_OPTIONS)
        say = {"{n}": str(rng.randint(1, 99)), "{f}": f"{rng.uniform(1, 20):.2f}", "{k}": str(rng.randint(1, 4))}
        for mark, text in say.items():
            argv = tuple(argument.replace(mark, text) for argument in argv)
        return Case(command, argv, ACCEPTED)
    if source.chance(0.15):
        command, good = source.pick(("prepare", CLIPS), ("prepare", ODE))
        a, b = rng.randint(1, 99), rng.randint(1, 99)
        size = source.pick(
            "0x0", f"{a}", f"x{a}", f"-{a}x{b}", f"{a}x{b}x{a}", f"{a}X{b}", f"{a}*{b}", f"{a}.5x{b}", ""
        )
        size = source.pick(
            size, f"{4 * a + 1}x{b * 4}", f"{4 * a}x{4 * b + 2}", f"0x{4 * b}", f"{a}e1x{b}", source.word()
        )
        if good is ODE:
            size = size if "x" not in size.strip("x-") else f"{size}x"
        return Case(command, (*good, f"--size={size}"), needs=(("--size",),))
    command, good, option, hint = source.pick(*OPTIONS)
    first = typing.get_args(hint)[0]
    plain = int if first is int else float
    if source.chance(0.4):
        value = not_a_number(source, plain is int)
    else:
        value = outside(source, plain, typing.get_args(hint)[1:])
    return Case(command, (*good, f"{option}={value}"), needs=((option,), (value, repr(value), *_other_forms(value))))


@kind("huge numbers", 1)
def huge_numbers(source: Source) -> Case:
    """Numbers that no range excludes and no machine has the memory, the time, or the file format for."""
    n = source.rng.randint(10**8, 2 * 10**9)
    return source.pick(
        Case("sample", (*TEACHER, f"--frames={n}"), needs=(("--frames",),)),
        Case("sample", (*STUDENT, "--frames=1", f"--upscale={n}"), needs=(("--upscale",),)),
        Case("sample", (*MODEL, f"--height={n}", f"--width={n}"), needs=(("height", "codec", "--model"),)),
        Case("prepare", (*CLIPS, f"--frames={n}"), needs=(("--frames", "--held-out", "--clips"),)),
        Case("prepare", (*CLIPS, f"--size={n // 4 * 4}x{n // 4 * 4}"), needs=(("--size",),)),
        Case("train", train("teacher", f"--config.data.size={n}"), needs=(("data.size",),)),
        Case("train", train("teacher", f"--config.data.frames={n}"), needs=(("data.frames",),)),
        Case("compile", ("vae", "--target=v5e", f"--height={n}"), needs=(("--height", "height"),)),
        Case("sample", (*STUDENT, "--frames=1", "--steps=" + ",".join(["9999"] * (n % 50 + 2))), needs=(("--steps",),)),
    )


@kind("switches", 6)
def switches(source: Source) -> Case:
    """New prompts at frames that there are not, twice at one, and in no form."""
    rng = source.rng
    frames = rng.randint(3, 6)
    argv = ("--checkpoint={made}/student", "--prompt=a red square", f"--frames={frames}", "--output={here}/o.gif")
    at, word = rng.randint(1, frames - 1), source.word()
    if source.chance(0.12):
        return Case("sample", (*argv, f"--switch={at}:{word}"), ACCEPTED)
    far = rng.choice((frames, frames + rng.randint(1, 10**9), 0))
    form = rng.randrange(5)
    if form == 0:
        return Case("sample", (*argv, f"--switch={far}:{word}"), needs=(("--switch",), (str(far),)))
    if form == 1:
        more = (f"--switch={at}:{word}", f"--switch={rng.choice(('', '0', ' '))}{at}:{source.word()}")
        return Case("sample", (*argv, *more), needs=(("--switch",), (str(at),)))
    if form == 2:
        wrong = rng.choice((f"{word}:{at}", f"-{at}:{word}", f"{at}", f"{at}.5:{word}", f":{word}", f"{at};{word}"))
        wrong = rng.choice(
            (wrong, f"+{at}:{word}", f"1e0:{word}", "", f"²:{word}", f"{at} {word}", source.junk() + ";")
        )
        return Case("sample", (*argv, f"--switch={wrong}"), needs=(("--switch",),))
    if form == 3:
        whole = ("--checkpoint={made}/teacher", *argv[1:])
        return Case("sample", (*whole, f"--switch={at}:{word}"), needs=(("--switch",),))
    one = (*argv[:2], "--frames=1", argv[3])
    return Case("sample", (*one, f"--switch={at}:{word}"), needs=(("--switch",), (str(at),)))


@kind("meshes", 4)
def meshes(source: Source) -> Case:
    """Sizes that do not fit the devices, unknown and repeated axes, text."""
    rng = source.rng
    axis, size = rng.choice(("data", "fsdp", "context", "tensor")), rng.randint(2, 10**6)
    load = ("import", "{made}/wan", "{here}/out")
    if source.chance(0.12):
        return Case("convert", (*load, f"--mesh={axis}={rng.choice(('1', '-1'))}"), ACCEPTED)
    form = rng.randrange(5)
    if form == 0:
        more = (f"--config.mesh.{axis}={rng.choice((size, 0, -size))}",)
        return Case("train", train("teacher", *more), needs=((axis,),))
    if form == 1:
        return Case("train", train("teacher", "--config.mesh.data=-1", "--config.mesh.fsdp=-1"), needs=(("-1",),))
    if form == 2:
        wrong = rng.choice((axis, f"{axis}=", f"{axis}={source.word()}", f"{axis}=1=1", f"={size}", f"{axis}:1", ","))
        wrong = rng.choice((wrong, f"{axis}=1.5", f"{axis}=1,,", f"{axis}=1;", source.word()))
        return Case("convert", (*load, f"--mesh={wrong}"), needs=(("--mesh",),))
    if form == 3:
        value = rng.choice((size, 0, -2, -size))
        return Case("convert", (*load, f"--mesh={axis}={value}"), needs=(("--mesh", "mesh"), (str(value),)))
    name = source.misspelt(axis).strip("=,") or "x"
    wrong = rng.choice((f"{name}=1", f"{axis}=1,{name}=1", f"{axis}=1,{axis}=1", f"{axis}=1,{axis}=-1"))
    return Case("convert", (*load, f"--mesh={wrong}"), needs=(("--mesh",), (axis, name)))
