"""Python files of the user's own: configurations, losses, suites."""

from bad_items.case import ACCEPTED, DIVERGED, REFUSED, THEIRS, Case, Source, kind
from bad_items.values import EVALUATE, ODE, train

HEAD = "from greedy_distill_jax.testing import tiny\n\n\n"
GOOD = (
    HEAD
    + 'def get_config(stage="teacher"):\n    c = tiny.train_config(stage, data__batch=2, steps=2)\n{more}    return c\n'
)


def _config(more: str) -> str:
    return GOOD.replace("{more}", f"    {more}\n" if more else "")


@kind("configuration files", 10)
def configuration_files(source: Source) -> Case:
    """No Python, no get_config, wrong types, missing imports, keys that there are not, errors of their own."""
    rng, word = source.rng, source.word() + "x"
    name = f"{source.word()}.py"
    if source.chance(0.04):
        files = source.folder("teacher", "run") | {name: _config(f"# {word}").encode()}
        return Case("train", train("teacher", config=f"{{here}}/{name}"), ACCEPTED, files=files)
    n = rng.randint(1, 9)
    blank = "\n" * n
    refused = (
        (f"{blank}def get_config(:\n", f"line {n + 1}"),
        (f"{blank}{word} {word}\n", f"line {n + 1}"),
        (f"{blank}def get_config():\n  x = 1\n   y = 2\n", f"line {n + 3}"),
        (f"{blank}import {word}\n", word),
        (f"{blank}from greedy_distill_jax import {word}\n", word),
        (f"{blank}from {word} import *\n", word),
        (f"{blank}x = {word}\n", word),
        (f"{blank}def get_confg():\n    return {n}\n", "get_config"),
        ("", "get_config"),
        (f"get_config = {n}\n", "get_config"),
        (f"get_config = '{word}'\n", "get_config"),
        (
            f"{blank}def get_config(*a):\n    return {rng.choice((n, repr(word), {}, None, [n], 'object()'))}\n",
            "ConfigDict",
        ),
        (f"{blank}class get_config:\n    def __init__(self, *a): pass\n", "ConfigDict"),
        (f"{blank}def get_config(*a):\n    yield {n}\n", "ConfigDict"),
        (_config(f"c.{word} = {n}"), word),
        (_config(f"c.data.{word} = {n}"), word),
        (_config(f"x = c.model.{word}"), word),
        (_config(f"c.steps = '{word}'"), "steps"),
        (_config(f"c.data = {n}"), "data"),
        (
            _config(f"del c.{rng.choice(('data', 'optimizer', 'seed', 'losses', 'ema', 'distill'))}"),
            ("missing", "locked", "del"),
        ),
        (_config(f"c.losses.flow_matching.weight = '{word}'"), "weight"),
        (_config("c.losses = {}"), "losses"),
        (_config(f"c.losses.{word} = {n}"), word),
        (_config(f"c.losses.loss = dict(loss='{word}', weight=1.0)"), "losses.loss"),
        (_config(f"c.losses.m = dict(loss='flow_matching', wight={n})"), "losses.m"),
        (_config(f"c.losses.flow_matching.options = {n}"), "options"),
        (_config(f"c.steps = -{n}"), "config.steps"),
        (_config(f"c.optimizer.betas = ({n}.0, 0.5)"), "betas"),
        (_config("c.optimizer.betas = (0.5, 0.5, 0.5)"), "betas"),
        (_config(f"c.data.frames = {n}.5"), "frames"),
        (_config(f"c.sample.steps = object()  # {word}"), "steps"),
        (_config(f"c.sample.steps = [[1.0, '{word}']]"), "steps"),
        (HEAD + f"def get_config(stage):\n    raise ValueError('no {word} here')\n", word),
        (HEAD + f"def get_config():\n    return {n}\n", "get_config"),
    )
    theirs = (
        f"{blank}1 / 0\n",
        f"def get_config(*a):\n{blank}    return [][{n}]\n",
        f"{blank}raise RuntimeError('{word}')\n",
        f"{blank}def f(): raise ValueError('{word}')\ndef get_config(*a): f()\n",
        f"{blank}open('{word}').read()\n",
        f"def get_config(*a):\n    assert False, '{word}'\n",
    )
    where = f"{{here}}/{name}"
    if source.chance(0.15):
        text = rng.choice(theirs)
        return Case("train", train("teacher", config=where), THEIRS, files={name: text.encode()})
    form = rng.randrange(10)
    if form == 0:
        data = rng.choice(
            (b"\0" * n, b"\xff\xfe" + rng.randbytes(9), b"x = '\xff'\n", b"# coding: nope\n", rng.randbytes(99))
        )
        return Case("train", train("teacher", config=where), needs=((name,),), files={name: data})
    if form == 1:
        there, files = source.pick(
            ("{here}", {}),
            (f"{{here}}/{word}.py", {}),
            (f"{{here}}/{word}.txt", {f"{word}.txt": b"x = 1\n"}),
            (f"{{here}}/{word}", {word: GOOD.encode()}),
            (f"{{here}}/{word}.py", {f"{word}.py": None}),
            (f"{{here}}/{word}.py", {f"{word}.py": "@{here}/nowhere"}),
            ("", {}),
            (f"{{here}}/{'y' * 300}.py", {}),
        )
        return Case("train", train("teacher", config=there), needs=(("--config",),), files=files)
    text, needed = rng.choice(refused)
    needed = (needed,) if isinstance(needed, str) else needed
    if form == 2 and "stage)" not in text:
        argv = (*ODE[:2], f"--student={where}:teacher_forcing", *ODE[3:])
        return Case("prepare", argv, needs=(needed,), files={name: text.encode()})
    return Case("train", train("teacher", config=where), needs=(needed,), files={name: text.encode()})


BODY = """    x = batch["latents"]
    v = net(x, jnp.full(x.shape[:2], 0.5), batch)
    e = jnp.mean((v + x) ** 2, (1, 2, 3, 4))
"""
LOSS = "import jax\nimport jax.numpy as jnp\n\n\ndef mine(net, batch, key{options}):\n{body}    return {out}\n"


def _loss(out: str = "e, {}", body: str = BODY, options: str = "") -> bytes:
    return LOSS.replace("{options}", options).replace("{body}", body).replace("{out}", out).encode()


RETURNS = (
    *("e", "(e,)", "[e, {}]", "None", "e, None", "e, 1", "e, {}, 1", "jnp.mean(e), {}", "e[:, None], {}", "e[:1], {}"),
    *("e.astype(complex), {}", "'a', {}", "3.0, {}", "e, {1: e[0]}", "e, {'m': e}", "e, {'m': 'a'}", "{}, e"),
    *("e, {'m': (e[0], e)}", "e, {'m': None}", "e, [e]", "jnp.concatenate([e, e]), {}", "v, {}", "net, {}"),
    *("e, {'m': (e[0], 1, 2)}", "e[None], {}", "list(e), {}"),
)
SIGNATURES = (
    *("def mine(net, batch): return 1", "def mine(): return 1", "def mine(a, b, c, d): return 1", "mine = 3"),
    *("class mine: pass", "def mine(net, *, batch, key): return 1", "def mine(net, batch, key, *, other): return 1"),
    *("mine = 'x'", "mine = None", "mine = [1]", "other = 1", "def Mine(net, batch, key): return 1"),
)
OWN_ERRORS = ("1 / 0", "[][1]", "{}['a'], {}", "undefined", "batch['nothing'], {}", "int('x'), {}", "e.nothing, {}")


@kind("losses", 7)
def losses(source: Source) -> Case:
    """Missing files and functions, wrong signatures, returned values, options and gradients, NaN."""
    rng, word = source.rng, source.word()
    name = f"{word}.py"

    def case(content: bytes | None, *more: str, function: str = "mine", **kept) -> Case:
        path = f"{{here}}/{name}:{function}"
        argv = train("teacher", f"--config.losses.flow_matching.loss={path}", *more)
        return Case("train", argv, files={} if content is None else {name: content}, **kept)

    form = rng.randrange(20)
    if form == 0:  # a good one on a run that is done
        made = case(_loss(), expect=ACCEPTED)
        return Case(made.command, made.argv, ACCEPTED, files={**made.files, **source.folder("teacher", "run")})
    if form <= 3:
        return (
            case(None, needs=((name, word),)) if source.chance(0.4) else case(_loss(), function=word, needs=((word,),))
        )
    if form <= 5:
        return case(f"import jax  # {word}\n{rng.choice(SIGNATURES)}\n".encode(), needs=(("losses", "mine"),))
    if form <= 10:
        return case(_loss(f"{rng.choice(RETURNS)}  # {word}"), needs=(("losses.flow_matching",),))
    if form <= 12:
        option, value = source.pick(
            ("other", "1"),
            (f"{word}x", "True"),
            ("power", "-1"),
            ("power", "'a'"),
            ("power", "nan"),
            ("net", "1"),
            ("key", "2"),
        )
        head = b"from typing import Annotated\nfrom greedy_distill_jax.ranges import Positive\n"
        content = head + _loss(options=", *, power: Positive = 2.0")
        more = f"--config.losses.flow_matching.options.{option}={value}"
        return case(content, more, needs=((option,),))
    if form == 13:
        stopped = _loss(
            rng.choice(("jax.lax.stop_gradient(e), {}", "0 * e, {}", "e * 0.0 + 1, {}", "jnp.ones(e.shape), {}"))
        )
        return case(stopped + f"# {word}\n".encode(), needs=(("losses.flow_matching",),))
    if form == 14:
        nan = _loss(rng.choice(("e * jnp.nan, {}", "e / 0, {}", "jnp.log(-jnp.abs(e)), {}", "jnp.sqrt(e - 1e9), {}")))
        return case(nan + f"# {word}\n".encode(), expect=DIVERGED, needs=(("",),))
    if form <= 16:
        return case(_loss(rng.choice(OWN_ERRORS)) + f"# {word}\n".encode(), expect=THEIRS)
    if form == 17:
        other = source.pick(
            word,
            f"{word}:mine",
            f"greedy_distill_jax:{word}",
            ":",
            "a:",
            ":b",
            f"{word}.{word}:x",
            "",
            f"{{here}}/{word}:m",
        )
        argv = train("teacher", f"--config.losses.flow_matching.loss={other}")
        return Case("train", argv, needs=(("losses.flow_matching.loss",), (other, repr(other))))
    if form == 18:
        content = rng.choice((b"def mine(:\n", b"import " + word.encode() + b"qq\n", b"\0\0", b"\xff\xfe", b"x = y\n"))
        return case(
            content,
            expect=THEIRS if content == b"x = y\n" or content.startswith(b"import") else REFUSED,
            needs=((name,),),
        )
    key = rng.choice(
        ("weight=-1", "weight=nan", "weight=x", f"{word}=1", "options=3", "options.shift=-1", "options.shift=x")
    )
    return Case("train", train("teacher", f"--config.losses.flow_matching.{key}"), needs=(("losses.flow_matching",),))


@kind("suites", 2)
def suites(source: Source) -> Case:
    """A user's own measurement that is none, checked before anything is sampled."""
    word = source.word()
    content = source.pick(
        "SUITE = 3",
        "SUITE = None",
        "def SUITE(): pass",
        f"{word} = 1",
        "import greedy_distill_jax.eval.suites as s\nSUITE = s.Suite",
    )
    name = f"{word}.py"
    files = {name: f"{content}\n".encode()}
    asked = source.pick(
        f"{{here}}/{name}:SUITE", f"{{here}}/{name}:{word}x", f"{{here}}/x{name}:SUITE", word, f"{{here}}/{name}"
    )
    return Case("evaluate", (*EVALUATE, f"--suite={asked}"), needs=(("--suite",), (word, name)), files=files)
