"""Where results go: what is there already, is a file, cannot be written, or is the input itself; jobs of quickstart."""

from bad_items.case import ACCEPTED, Case, Source, kind
from bad_items.values import EVALUATE, STUDENT, train

CUT = ("clips", "--clips={made}/clips", "--captions={made}/captions.csv", "--size=16x16", "--frames=4")
ODE = (
    "ode",
    "--teacher={made}/teacher",
    "--student={made}/config.py:teacher_forcing",
    "--prompts={made}/prompts.txt",
    "--steps=2",
)


def _nowhere(source: Source) -> tuple[str, dict]:
    """A place where no folder can be made, and the files that make it so."""
    word = source.word()
    return source.pick(
        (f"{{here}}/{word}", {word: b"a file"}),
        (f"{{here}}/{word}/out", {word: b"a file"}),
        (f"{{here}}/{word}/a/b/out", {word: b""}),
        (f"/proc/{word}", {}),
        (f"/dev/null/{word}", {}),
        (f"{{here}}/{word[0] * 300}", {}),
        (f"{{here}}/{'/'.join([word[0] * 200] * 30)}", {}),
        (f"{{here}}/{word}", {word: f"@{{here}}/{word}"}),
        (f"/sys/{word}", {}),
    )


@kind("places of results", 10)
def places(source: Source) -> Case:
    """Every command that writes, at a place where it cannot."""
    where, files = _nowhere(source)
    end = where.rsplit("/", 1)[-1]
    video, there = f"{where}.mp4" if "proc" in where else f"{where}/o.mp4", (end, "written", "long")
    argv = {
        "clips": ("prepare", (*CUT, f"--output={where}"), "--output"),
        "ode": ("prepare", (*ODE, f"--output={where}"), "--output"),
        "import": ("convert", ("import", "{made}/wan", where), ("DST", "--overwrite", "name too long")),
        "export": (
            "convert",
            ("export", "{made}/teacher", where, "--format=original"),
            ("DST", "--overwrite", "name too long"),
        ),
        "sample": ("sample", (*STUDENT[:2], "--frames=2", f"--output={video}"), "--output"),
        "train": ("train", ("--config={made}/config.py", f"--workdir={where}"), "--workdir"),
        "evaluate": ("evaluate", (*EVALUATE[:2], f"--output={where}"), "--output"),
        "quickstart": ("quickstart", (f"--workdir={where}", "--smoke"), "--workdir"),
    }
    command, given, place = source.pick(*argv.values())
    return Case(command, given, files=files, needs=(place if isinstance(place, tuple) else (place,), there))


@kind("what is there", 8)
def what_is_there(source: Source) -> Case:
    """Folders and files that are somebody's already stay as they are."""
    rng, word = source.rng, source.word()
    held = {f"{word}/{source.word()}.txt": rng.randbytes(20), f"{word}/more/{source.word()}": b"kept"}
    own = source.folder("teacher", "run")
    seed = str(rng.randint(1, 10**6))
    student = source.folder("student", "run")
    imported = source.folder("imported", "run")
    dataset = source.folder("dataset", "out")
    cut = ("--size=16x16", "--frames=4")
    done = {"q/job": b"moving_shapes, smoke", "q/report/report.html": b"<html>"}
    resume = {"config.seed": seed, "data.size": "32", "data.frames": "5", "data.batch": "4", "data.augment": "labelled"}
    key, value = rng.choice(list(resume.items()))
    key = key.removeprefix("config.")
    return source.pick(
        Case(
            "convert", ("import", "{made}/wan", f"{{here}}/{word}"), files=held, needs=(("DST", "--overwrite"), (word,))
        ),
        Case(
            "convert",
            ("export", "{made}/teacher", f"{{here}}/{word}", "--format=original"),
            files=held,
            needs=(("DST", "--overwrite"), (word,)),
        ),
        Case("convert", ("import", "{made}/wan", "{here}/out"), ACCEPTED, files=held),
        Case(
            "convert",
            ("import", f"{{here}}/{word}", f"{{here}}/{word}", "--overwrite"),
            files=source.folder("wan", word),
            needs=((word,),),
        ),
        Case(
            "convert",
            ("export", f"{{here}}/{word}/a", f"{{here}}/{word}", "--overwrite", "--format=original"),
            files=source.folder("wan", f"{word}/a"),
            needs=((word,),),
        ),
        Case("train", train("teacher", f"--config.{key}={value}"), files=own, needs=((key,), (value,))),
        Case("train", train("teacher"), files=student, needs=(("stage",),)),
        Case("train", train("teacher"), files=imported, needs=(("imported", "--workdir"),)),
        Case("train", train("teacher"), ACCEPTED, files={**own, f"run/{word}.txt": b"mine"}),
        Case(
            "prepare",
            (*CUT[:3], "--output={here}/out", f"--size={4 * rng.randint(5, 20)}x16", "--frames=4"),
            files=dataset,
            needs=(("--output",), ("out",)),
        ),
        Case(
            "prepare",
            (*CUT[:3], "--output={here}/out", "--size=16x16", f"--frames={rng.randint(5, 9)}"),
            files=dataset,
            needs=(("--output",), ("out",)),
        ),
        Case("prepare", (*CUT[:3], "--output={here}/out", *cut), ACCEPTED, files=dataset),
        Case("prepare", (*CUT, f"--output={{here}}/{word}", "--overwrite"), files=held, needs=(("--output",), (word,))),
        Case("prepare", (*CUT, f"--output={{here}}/{word}"), files=held, needs=(("--output",), (word,))),
        _video(source),
        _as_nobody(source),
        Case("quickstart", ("--workdir={here}/q",), files=done, needs=(("--workdir",), ("job",))),
        Case("quickstart", ("--workdir={here}/q", "--smoke"), ACCEPTED, files=done),
        Case(
            "quickstart",
            ("--workdir={here}/q", "--smoke"),
            files={**done, "q/job": word.encode()},
            needs=(("--workdir",), (word,)),
        ),
        Case(
            "quickstart",
            ("--workdir={here}/q", "--smoke"),
            files={**done, "q/job": b"\xff" + word.encode()},
            needs=(("--workdir",),),
        ),
        Case("quickstart", ("--workdir={here}/q", "--smoke"), files={"q/job": None}, needs=(("--workdir",),)),
    )


def _video(source: Source) -> Case:
    """Names of videos that say no kind, or a kind that is not written."""
    word = source.word()
    name = source.pick(
        word, f"{word}.avi", f"{word}.mp5", f"{word}.", f".{word}", f"{word}.mp4.txt", f"{word}.MPEG", ""
    )
    return Case("sample", (*STUDENT[:2], "--frames=2", f"--output={{here}}/{name}"), needs=(("--output",),))


def _as_nobody(source: Source) -> Case:
    """Without the rights of root, in a folder of root's."""
    word = source.word()
    command, argv, place = source.pick(
        ("prepare", (*CUT, f"--output={{here}}/{word}"), "--output"),
        ("convert", ("import", "{made}/wan", f"{{here}}/{word}"), ("DST", "--overwrite")),
        ("sample", (*STUDENT[:2], "--frames=2", f"--output={{here}}/{word}.mp4"), "--output"),
        ("train", ("--config={made}/config.py", f"--workdir={{here}}/{word}"), "--workdir"),
        ("evaluate", (*EVALUATE[:2], f"--output={{here}}/{word}"), "--output"),
    )
    return Case(command, argv, unprivileged=True, needs=(place if isinstance(place, tuple) else (place,), (word,)))


@kind("quickstart", 2)
def quickstart(source: Source) -> Case:
    """Clips of one's own that cannot be used."""
    word = source.word()
    clips, captions = "--clips={made}/clips", "--captions={made}/captions.csv"
    folder = "--workdir={here}/q"
    table = {f"{word}.csv": source.pick(b"", b"clip,caption\n", b"a,b\n1,2\n", b"\xff", b'clip,caption\na.mp4,"x\n')}
    return source.pick(
        Case("quickstart", (folder, clips), needs=(("--clips",),)),
        Case("quickstart", (folder, captions), needs=(("clips",),)),
        Case("quickstart", (folder, f"--clips={{here}}/{word}", captions), needs=(("--clips",), (word,))),
        Case(
            "quickstart",
            (folder, f"--clips={{here}}/{word}", captions),
            files={word: None},
            needs=(("--clips",), (word,)),
        ),
        Case("quickstart", (folder, clips, f"--captions={{here}}/{word}.csv"), needs=(("--captions",), (word,))),
        Case(
            "quickstart",
            (folder, clips, f"--captions={{here}}/{word}.csv"),
            files=table,
            needs=(("--captions",), (word,)),
        ),
        Case("quickstart", (folder, f"--{word}qq"), needs=((word,),)),
        Case("quickstart", (folder, "--fast", "--smoke", f"--clips={word}"), needs=(("clips",),)),
    )
