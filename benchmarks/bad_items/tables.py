"""Tables of captions and files of prompts."""

from bad_items.case import ACCEPTED, Case, Source, kind

WORDS = ("red", "blue", "square", "circle", "moving", "left", "up", "grün", "正方形", "a")


def _caption(source: Source) -> str:
    return " ".join(source.rng.choices(WORDS, k=source.rng.randint(1, 5)))


def _table(source: Source, mark: str = ",") -> list[str]:
    rows = [f"{name}{mark}{_caption(source)}" for name in ("a.mp4", "b.mp4")]
    source.rng.shuffle(rows)
    return [f"clip{mark}caption", *rows]


def _bytes(lines: list[str], end: str = "\n") -> bytes:
    return (end.join(lines) + end).encode()


def _spoilt(source: Source) -> tuple[bytes, str]:
    """A table that cannot be, and what its refusal must name."""
    rng, lines, word = source.rng, _table(source), source.word() + "x"
    at = rng.randint(1, 2)
    name, caption = lines[at].split(",", 1)
    said = f"line {at + 1}"
    spoilt = {
        "open quote": ([*lines[:at], f'{name},"{caption}', *lines[at + 1 :]], said),
        "quote inside": ([*lines[:at], f'{name},"{caption}"{word}', *lines[at + 1 :]], said),
        "extra field": ([*lines[:at], f"{lines[at]},{word}", *lines[at + 1 :]], said),
        "missing field": ([*lines[:at], name, *lines[at + 1 :]], said),
        "no clip": ([*lines, f",{word}"], "line 4"),
        "no caption": ([*lines[:at], f"{name},", *lines[at + 1 :]], said),
        "named twice": ([*lines, f"{name},{word}"], "line 4"),
        "another clip": ([*lines, f"{word}.mp4,{word}"], word),
        "a clip less": ([line for i, line in enumerate(lines) if i != at], name),
        "a column less": ([word, *lines[1:]], "line 2"),
        "column misspelt": (
            [source.pick("clips,caption", "clip,captions", f"clip,{word}", "Clip,Caption"), *lines[1:]],
            "line 1",
        ),
        "column twice": ([source.pick("clip,clip", "caption,caption"), *lines[1:]], "line 1"),
        "no header": (lines[1:], "line 1"),
        "header alone": (lines[:1], "a.mp4"),
        "another mark": ([line.replace(",", source.pick("|", ":", "  ")) for line in lines], "line"),
        "upper case": ([*lines[:at], f"{name.upper()},{caption}", *lines[at + 1 :]], name.upper()),
        "nothing": ([], "line 1"),
    }
    what = rng.choice((*spoilt, "NUL", "UTF-16", "Latin-1", "long"))
    if what == "NUL":
        data = _bytes(lines)
        cut = rng.randrange(len(data))
        while data[cut] & 0xC0 == 0x80:
            cut -= 1
        return data[:cut] + b"\0" + data[cut:], "NUL"
    if what == "UTF-16":
        return _bytes(lines).decode().encode("utf-16"), "UTF-8"
    if what == "Latin-1":
        return _bytes([*lines[:at], f"{name},ä{rng.choice('öüß')}", *lines[at + 1 :]]).decode().encode(
            "latin-1", "replace"
        ), "UTF-8"
    if what == "long":
        return _bytes([*lines[:at], f'{name},"{"a " * 70_000}"', *lines[at + 1 :]]), said
    return _bytes(spoilt[what][0], rng.choice(("\n", "\r\n"))), spoilt[what][1]


@kind("tables of captions", 12)
def captions(source: Source) -> Case:
    """Whose rows, columns, bytes or names are wrong."""
    rng = source.rng
    rest = ("--clips={made}/clips", "--output={here}/out", "--size=16x16", "--frames=4")
    name = f"{source.word()}.csv"
    argv = ("clips", f"--captions={{here}}/{name}", *rest)
    if source.chance(0.1):
        mark = rng.choice((",", ";", "\t"))
        lines = _table(source, mark)
        data = rng.choice((b"", b"\xef\xbb\xbf")) + _bytes(lines, rng.choice(("\n", "\r\n")))
        return Case("prepare", argv, ACCEPTED, files={name: data})
    if source.chance(0.1):
        content, needed = source.pick(
            (None, name), ("@{here}/nowhere", name), (b"", "line 1"), (rng.randbytes(99) + b"\xff", name)
        )
        files = {} if source.chance(0.2) else {name: content}
        return Case("prepare", argv, needs=(("--captions",), (needed, name)), files=files)
    data, needed = _spoilt(source)
    return Case("prepare", argv, needs=(("--captions",), (needed,), (name,)), files={name: data})


@kind("files of prompts", 7)
def prompts(source: Source) -> Case:
    """Of text and of tables, where an encoder, a teacher, or stage 2 reads them."""
    rng, word = source.rng, source.word()
    lines = [_caption(source) for _ in range(rng.randint(1, 6))]
    at, said = rng.randint(2, len(lines) + 1), ""
    quoted = {
        "open quote": (["prompt", *lines[: at - 2], f'"{word}', *lines[at - 2 :]], f"line {at}"),
        "extra field": (["prompt", *lines[: at - 2], f"{word},{word}", *lines[at - 2 :]], f"line {at}"),
        "both columns": (["prompt,caption", f"{word},{word}"], "line 1"),
        "neither column": ([word, *lines], "line 1"),
        "column twice": (["prompt,prompt", f"{word},{word}"], "line 1"),
        "empty row": (["prompt,other", *(f"{line},1" for line in lines[: at - 2]), ",2"], f"line {at}"),
        "header alone": (["prompt"], "prompt"),
        "nothing": ([], "prompt"),
    }
    form = rng.randrange(7)
    if form <= 2:
        suffix, (rows, said) = ".csv", quoted[rng.choice(tuple(quoted))]
        data = _bytes(rows)
    elif form == 3:
        suffix, data = ".txt", rng.choice((b"", b"\n\n", b"  \n \t\n", b"\r\n" * rng.randint(1, 9)))
    elif form == 4:
        text = _bytes(lines)
        suffix, data = (
            ".txt",
            rng.choice((text + b"\xff\n", text + b"\xc3", text.decode().encode("utf-16"), text + b"a\0b\n")),
        )
    elif form == 5:
        suffix, data = rng.choice((".json", ".tsv", "", ".text", ".csv.gz")), _bytes(lines)
    else:
        suffix, data = rng.choice((".txt", ".csv")), rng.choice((None, "@{here}/nowhere"))
    name = f"{word}{suffix}"
    where, ode = f"{{here}}/{name}", ("--teacher={made}/teacher", "--student={made}/config.py:teacher_forcing")
    command, argv, place = source.pick(
        ("prepare", ("ode", *ode, f"--prompts={where}", "--output={here}/out"), "--prompts"),
        ("prepare", ("text", "--model={made}/wan", f"--prompts={where}", "--output={here}/out"), "--prompts"),
        (
            "train",
            ("--config={made}/config.py:dmd", "--workdir={here}/run", f"--config.data.source=prompts:{where}"),
            "data.source",
        ),
    )
    files = {} if data is None and source.chance(0.5) else {name: data}
    return Case(command, argv, needs=((place,), (name,), (said or name,)), files=files)
