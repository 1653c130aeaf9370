"""What cases start from: two tiny runs, clips, prepared folders and weights in several formats. Made once."""

import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np

CONFIG = '''"""A tiny run."""
from greedy_distill_jax.testing import tiny


def get_config(stage="teacher"):
    """Of any stage."""
    c = tiny.train_config(stage, data__batch=2, steps=2)
    if stage == "dmd":
        c.teacher_from, c.student_from = "{made}/teacher", "{made}/student"
    elif stage != "teacher":
        c.teacher_from = "{made}/teacher"
    return c
'''
LOSS = '''"""A loss."""
import jax.numpy as jnp


def mine(net, batch, key, *, power=2.0):
    """Squares of what is predicted of the data itself."""
    x = batch["latents"]
    v = net(x, jnp.full(x.shape[:2], 0.5), batch)
    return jnp.mean(jnp.abs(v + x) ** power, (1, 2, 3, 4)), {}
'''
CAPTIONS = b'clip,caption\na.mp4,"a red square, moving left"\nb.mp4,a blue circle\n'
PROMPTS = b"a red square\na blue circle moving up\n"


def make(folder: Path) -> None:
    """Fills the folder unless it is there already."""
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.py").write_text(CONFIG.replace("{made}", str(folder)))
    (folder / "loss.py").write_text(LOSS)
    (folder / "captions.csv").write_bytes(CAPTIONS)
    (folder / "prompts.txt").write_bytes(PROMPTS)
    _runs(folder)
    _clips(folder)
    _prepared(folder)
    _weights(folder)
    (folder / "done").touch()


def _runs(folder: Path) -> None:
    from greedy_distill_jax.cli.config_flags import read_config
    from greedy_distill_jax.train import train

    for stage, name in (("teacher", "teacher"), ("teacher_forcing", "student")):
        train(read_config(f"{folder / 'config.py'}:{stage}"), folder / name, show_progress=False)
    for events in folder.glob("*/events.out*"):
        events.unlink()


def _clips(folder: Path) -> None:
    import av

    rng = np.random.default_rng(0)
    still = rng.integers(0, 255, (48, 64, 3), np.uint8)
    (folder / "clips").mkdir()
    for name, frames, trc in (("clips/a.mp4", 24, None), ("clips/b.mp4", 20, None), ("hlg.mp4", 20, 18)):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            if trc:
                stream.codec_context.color_trc = trc
            for index in range(frames):
                picture = av.VideoFrame.from_ndarray(np.roll(still, index, 1), format="rgb24")
                picture.pts, picture.time_base = index, Fraction(1, 10)
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))


def _prepared(folder: Path) -> None:
    from greedy_distill_jax import prepare

    said = ["--clips", folder / "clips", "--captions", folder / "captions.csv", "--output", folder / "dataset"]
    prepare.main(["clips", *map(str, said), "--size=16x16", "--frames=4"])


def _weights(folder: Path) -> None:
    from greedy_distill_jax import convert

    forms = [("original", "teacher", "wan"), ("diffusers", "teacher", "diffusers")]
    forms += [("torch-student", "student", "torch_student"), ("causal-pt", "teacher", "wan.pt")]
    for form, run, name in forms:
        convert.main(["export", str(folder / run), str(folder / name), "--format", form])
    convert.main(["import", str(folder / "wan"), str(folder / "imported")])


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """(size, time of change) of every file below a folder."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            stat = os.lstat(os.path.join(parent, name))
            found[os.path.join(parent, name)] = stat.st_size, stat.st_mtime_ns
    return found
