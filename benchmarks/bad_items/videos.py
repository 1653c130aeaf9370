"""Video files that are cut off, damaged, of another kind, or no videos."""

from bad_items.case import ACCEPTED, EITHER, REFUSED, Case, Source, kind

SUFFIXES = (".mp4", ".webm", ".mov", ".avi", ".mkv")


@kind("videos", 11)
def videos(source: Source) -> Case:
    """Alone in a folder they are refused, beside a good one skipped by name."""
    rng, good = source.rng, (source.made / "clips/a.mp4").read_bytes()
    name, alone = f"{source.word()}{rng.choice(SUFFIXES)}", source.chance(0.4)
    argv = (
        "clips",
        "--clips={here}/in",
        "--captions={here}/c.csv",
        "--output={here}/out",
        "--size=16x16",
        "--frames=4",
    )
    files = {"c.csv": f"clip,caption\n{name},a\n".encode() + (b"" if alone else b"good.mp4,b\n")}
    if not alone:
        files["in/good.mp4"] = good
    form = rng.randrange(12)
    if form == 0:
        data, expect = rng.choice((good, (source.made / "clips/b.mp4").read_bytes())), ACCEPTED
        return Case("prepare", argv, expect, files={**files, f"in/{name}": data})
    if form <= 3:  # what is lost may be behind the last frame
        return Case("prepare", argv, EITHER, files={**files, f"in/{name}": source.damaged(good)}, needs=((name,),))
    if form <= 6:
        data = good[: rng.randrange(int(len(good) * 0.9))]
    elif form == 7:
        data = rng.choice(
            (b"", bytes(rng.randint(1, 5000)), rng.randbytes(rng.randint(1, 5000)), b"text\n" * rng.randint(1, 99))
        )
    elif form == 8:
        data = (source.made / "hlg.mp4").read_bytes() + bytes(8 * rng.randint(0, 9))
    elif form == 9:
        data = rng.choice((good[4:], good[rng.randint(8, 200) :], b"\x89PNG\r\n\x1a\n" + good, b"GIF89a" + good[:99]))
    elif form == 10:
        data = rng.choice((None, "@{here}/nowhere", "@{here}/in"))
        if data is not None:
            return Case(
                "prepare",
                argv,
                needs=((name,),),
                files={**files, f"in/{name}": data},
                expect=EITHER,
            )
        return Case("prepare", argv, EITHER, files={**files, f"in/{name}": data}, needs=((name,),))
    else:
        return _other_files(source, argv, files, name, good)
    expect = REFUSED if alone else ACCEPTED
    return Case("prepare", argv, expect, files={**files, f"in/{name}": data}, skipped=name, needs=((name,),))


def _other_files(source: Source, argv, files, name: str, good: bytes) -> Case:
    """Folders of clips that are none, clips that are too short, names that are not read."""
    word = source.word()
    in_ = f"in/{name}"
    few = tuple("--frames=40" if a.startswith("--frames") else a for a in argv)
    other = tuple(f"--clips={{here}}/{word}" if a.startswith("--clips") else a for a in argv)
    wrong = f"{word}.{source.pick('mpg', 'gif', 'txt', 'm4v', 'mp5')}"
    named = {"c.csv": f"clip,caption\n{wrong},a\n".encode(), f"in/{wrong}": good, "in/good.mp4": good}
    return source.pick(
        Case("prepare", few, files={**files, in_: good}, needs=(("--frames", "--held-out", "--clips"),)),
        Case("prepare", other, files={**files, in_: good}, needs=(("--clips",), (word,))),
        Case("prepare", other, files={**files, in_: good, word: b"x"}, needs=(("--clips",), (word,))),
        Case("prepare", other, files={**files, in_: good, word: None}, needs=(("--clips",), (word,))),
        Case("prepare", argv, files=named, needs=((wrong,),)),
    )
