"""The one real-format path: a model folder and clips in, a video and a PyTorch student out."""

import csv
import shutil

import numpy as np
import pytest

from greedy_distill_jax import convert, prepare, sample
from greedy_distill_jax.data.video_io import probe, read_frames
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.testing import tiny, wan_folder
from greedy_distill_jax.train import train
from tests.conftest import exit_code
from tests.parity.test_torch_student import from_torch, jax_stream, loaded, step_noise

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
pytest.importorskip("diffusers", reason="needs diffusers: pip install 'greedy_distill_jax[parity]'")

CAPTIONS = {"bikes": "a red circle moving right", "carphone_pristine": "a blue square"}


@pytest.mark.slow
def test_from_a_model_folder_and_clips_to_a_streaming_pytorch_student(real_clips, tmp_path):
    model, clips, table = tmp_path / "model", tmp_path / "clips", tmp_path / "captions.csv"
    wan_folder.pipeline().save_pretrained(model)
    clips.mkdir()
    for name in CAPTIONS:
        shutil.copy(real_clips / f"{name}.mp4", clips)
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([("clip", "caption"), *((f"{n}.mp4", c) for n, c in CAPTIONS.items())])

    assert exit_code(convert.main, "import", model, tmp_path / "teacher") == 0
    text = ["--model", model, "--prompts", table, "--negative", "worst quality", "--output", tmp_path / "text"]
    assert exit_code(prepare.main, "text", *text) == 0
    cut = ["--fps", 25, "--size", "48x32", "--frames", 9, "--stride", 24]
    options = ["--clips", clips, "--captions", table, "--codec", model, *cut, "--output", tmp_path / "latents"]
    assert exit_code(prepare.main, "latents", *options) == 0

    sizes = Run.load(tmp_path / "teacher", needs_codec=False).settings.model
    shared = dict(
        steps=1,
        checkpoint__every=1,
        data__source=f"latents:{tmp_path / 'latents'}",
        data__text=str(tmp_path / "text"),
        data__frames=3,
        data__negative_prompt="worst quality",
        teacher_from=str(tmp_path / "teacher"),
        **{f"model__{key}": value for key, value in {**vars(sizes), "dtype": "float32"}.items()},
    )
    config = tiny.train_config("teacher_forcing", **shared)
    train(config, tmp_path / "stage1", show_progress=False)
    config = tiny.train_config("dmd", **shared, student_from=str(tmp_path / "stage1"), distill__generator_every=1)
    train(config, tmp_path / "stage2", show_progress=False)

    prompt, video = CAPTIONS["bikes"], tmp_path / "x.mp4"
    options = ["--prompt", prompt, "--frames", 9, "--upscale", 1, "--output", video]
    assert exit_code(sample.main, "--checkpoint", tmp_path / "stage2", *options) == 0
    info = probe(video)
    assert (info.width, info.height, len(list(read_frames(video)))) == (48, 32, 9)

    options = [tmp_path / "stage2", tmp_path / "torch", "--format", "torch-student"]
    assert exit_code(convert.main, "export", *options) == 0
    run = Run.load(tmp_path / "stage2")
    rows = run.text([prompt])
    frames, noise = jax_stream(run.model, run.params, rows, run.streamer().plan, run.latent_shape[1:], 6)
    stream = loaded(tmp_path / "torch").stream(torch.from_numpy(np.array(rows)), run.latent_shape[1:3])
    made = [from_torch(stream.step(row)) for row in step_noise(run.streamer().plan, noise)]
    scale = max(1.0, float(np.abs(frames).std()))
    np.testing.assert_allclose(np.concatenate(made, axis=1) / scale, np.asarray(frames) / scale, atol=2e-5, rtol=0)
