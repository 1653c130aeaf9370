"""Folders of runs: none, of another kind, damaged in one file."""

from bad_items.case import ACCEPTED, EITHER, Case, Source, kind
from bad_items.values import train

STATE = ("checkpoints/2/state/", "checkpoints/2/meta/", "checkpoints/2/_CHECK", "codec.npz")


def _reader(source: Source, where: str, run: str) -> tuple[str, tuple[str, ...]]:
    """A command that reads a run of that kind."""
    readers = [
        ("sample", (f"--checkpoint={where}", "--prompt=a", "--frames=2", "--output={here}/o.gif")),
        ("convert", ("inspect", where)),
        ("convert", ("export", where, "{here}/out", f"--format={'original' if run == 'teacher' else 'torch-student'}")),
        ("convert", ("verify", where, f"{{made}}/{run}")),
    ]
    if run == "teacher":
        student = "--student={made}/config.py:teacher_forcing"
        rest = ("--prompts={made}/prompts.txt", "--output={here}/out", "--steps=2")
        readers.append(("prepare", ("ode", f"--teacher={where}", student, *rest)))
    return source.pick(*readers)


@kind("folders of runs", 8)
def folders_of_runs(source: Source) -> Case:
    """Missing, empty, a file, of another kind, incomplete."""
    word, rng = source.word(), source.rng
    where, run = f"{{here}}/{word}", source.pick("teacher", "student")
    command, argv = _reader(source, where, run)
    held = source.folder(run, word)
    if source.chance(0.1):
        return Case(command, argv, ACCEPTED, files=held)
    form = rng.randrange(8)
    files = {
        0: {},
        1: {word: None},
        2: {word: rng.randbytes(rng.randint(0, 99))},
        3: {f"{word}/checkpoints": None},
        4: {f"{word}/checkpoints": b"x"},
        5: {f"{word}/checkpoints/{rng.randint(0, 99)}": None, f"{word}/codec.npz": held[f"{word}/codec.npz"]},
        6: {f"{word}/{name}": b"x" for name in ("config.json", "scalars.jsonl")},
        7: {word: "@{here}/nowhere"},
    }[form]
    if source.chance(0.12):
        return source.pick(
            Case(
                "evaluate",
                ("--teacher={made}/teacher", f"--student={where}", "--output={here}/r"),
                files=files,
                needs=(("--student",), (word,)),
            ),
            Case(
                "evaluate",
                (f"--teacher={where}", "--student={made}/student", "--output={here}/r"),
                files=files,
                needs=(("--teacher",), (word,)),
            ),
            Case(
                "evaluate",
                ("--teacher={made}/teacher", "--student={made}/student", f"--more=a={where}", "--output={here}/r"),
                files=files,
                needs=((word,),),
            ),
            Case(
                "train",
                train("teacher_forcing", f"--config.teacher_from={where}"),
                files=files,
                needs=(("teacher_from",), (word,)),
            ),
            Case(
                "train", train("dmd", f"--config.student_from={where}"), files=files, needs=(("student_from",), (word,))
            ),
            Case(
                "sample", ("--checkpoint={made}/imported", "--prompt=a", "--output={here}/o.mp4"), needs=(("codec",),)
            ),
            Case(
                "sample",
                (f"--checkpoint={where}", "--prompt=a", "--output={here}/o.mp4"),
                files={f"{word}/checkpoints": None},
                needs=((word,),),
            ),
        )
    return Case(command, argv, files=files, needs=((word,),))


@kind("damaged runs", 9)
def damaged_runs(source: Source) -> Case:
    """One file of a run lost, cut off, changed, or emptied; what is read in spite of it must be right."""
    word, rng = source.word(), source.rng
    run = source.pick("teacher", "student")
    held = source.folder(run, word)
    name = rng.choice([name for name in sorted(held) if any(part in name for part in STATE)])
    damage = rng.randrange(6)
    if damage == 0:
        held = {other: data for other, data in held.items() if other != name}
    else:
        data = held[name]
        forms = (
            source.cut(data) if data else b"x",
            source.damaged(data),
            rng.randbytes(len(data) + 1),
            b"",
            source.flipped(data) if data else b"y",
        )
        held[name] = forms[damage - 1]
    where = f"{{here}}/{word}"
    if source.chance(0.4):
        return Case("convert", ("verify", where, f"{{made}}/{run}"), EITHER, files=held, needs=((word, "damage"),))
    if source.chance(0.08):
        stage, argv = ("teacher", ()) if run == "teacher" else ("teacher_forcing", ())
        held = {f"run/{path.split('/', 1)[1]}": data for path, data in held.items()}
        argv = train(stage, "--config.steps=2")
        return Case("train", argv, EITHER, files=held, needs=(("run",),))
    command, argv = _reader(source, where, run)
    return Case(command, argv, EITHER, files=held, needs=((word, "damage"),))


@kind("damaged datasets", 5)
def damaged_datasets(source: Source) -> Case:
    """One file of a prepared folder lost, cut off or changed, where training opens it."""
    word, rng = source.word(), source.rng
    held = source.folder("dataset", word)
    argv = train(
        "teacher", f"--config.data.source=clips:{{here}}/{word}", "--config.data.frames=4", "--config.model.channels=7"
    )
    # Never trained: its codec makes more channels than the network takes, which shows once examples were read.
    name = rng.choice(
        [name for name in sorted(held) if "/parts/" not in name and "plan.json" not in name and "held_out" not in name]
    )
    damage = rng.randrange(6)
    if damage == 0:
        held = {other: data for other, data in held.items() if other != name}
    else:
        data = held[name]
        held[name] = (source.cut(data), source.damaged(data), rng.randbytes(len(data) + 1), b"", source.flipped(data))[
            damage - 1
        ]
    return Case("train", argv, files=held, needs=(("data.source", "channels", word),))
