"""Teacher sampling from a folder that diffusers wrote: its `WanPipeline`'s latents; the command and its bad input."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax import cli, sample
from greedy_distill_jax.codecs import vae_codec
from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.data.video_io import probe, read_frames
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.wan.linear import FLOAT32
from greedy_distill_jax.runs.model_folder import load_model_folder
from greedy_distill_jax.testing import wan_folder
from greedy_distill_jax.weights.pipeline import load_codec, load_transformer, read_shift

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
pytest.importorskip("diffusers", reason="needs diffusers: pip install 'greedy_distill_jax[parity]'")

PROMPTS = ["a red square moving left", "a  blue &amp; red circle"]
NEGATIVE = "worst quality"


@pytest.fixture(scope="module")
def pipe():
    return wan_folder.pipeline()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("wan")
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def with_codec(folder, tmp_path_factory):
    """The folder with a patch codec where the VAE was."""
    path = tmp_path_factory.mktemp("patches") / "model"
    shutil.copytree(folder, path)
    shutil.rmtree(path / "vae")
    load_source("moving_shapes")[1].save(path / "codec.npz")
    return path


def run_of(folder):
    return load_model_folder(folder, PROMPTS, height=32, width=48, frames=9, negative=NEGATIVE, dtype="float32")


@pytest.mark.parametrize("guidance, shift, output", [(5.0, 3.0, "np"), (1.0, 8.0, "latent")])
def test_videos_are_those_of_the_pipeline(pipe, folder, guidance, shift, output):
    noise = np.random.default_rng(0).standard_normal((2, 16, 3, 4, 6)).astype(np.float32)
    pipe.scheduler.register_to_config(flow_shift=shift)
    want = pipe(
        prompt=PROMPTS,
        negative_prompt=NEGATIVE,
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=torch.from_numpy(noise),
        output_type=output,
    ).frames
    run = run_of(folder)
    assert run.latent_shape == (3, 4, 6, 16)
    sampler = run.teacher_sampler(steps=4, guidance=guidance, shift=shift)
    got = np.asarray(sampler.denoise(jnp.asarray(noise.transpose(0, 2, 3, 4, 1)), run.text(PROMPTS)))
    if output == "latent":
        want = want.permute(0, 2, 3, 4, 1).numpy()
        assert 0.3 < want.std() < 3 and np.abs(want - noise.transpose(0, 2, 3, 4, 1)).std() > 0.3
    else:  # pixels in [0, 1]; ours before they are rounded to uint8
        decode = functools.partial(run.codec.vae.decode_step, run.codec.params)
        video = jax.jit(lambda x: vae_codec.whole(decode, x, 1, 1))(got)
        np.testing.assert_allclose(run.codec.decode(got), np.clip(np.rint(want * 255), 0, 255), atol=1)
        got = np.clip(np.asarray(video) / 2 + 0.5, 0, 1)
        assert want.shape == (2, 9, 32, 48, 3) and want.std() > 0.02
    np.testing.assert_allclose(got, want, atol=1e-3, rtol=0)


def test_bfloat16_keeps_kernels_alone_in_half_precision(folder):
    cfg, params = load_transformer(folder)
    assert (cfg.dtype, cfg.num_heads, cfg.dim, cfg.text_dim, cfg.text_len) == ("bfloat16", 2, 24, 12, 512)
    leaves = [([key.key for key in path], leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    kept = {layer for (*_, layer, name), leaf in leaves if name == "kernel" and leaf.dtype == "float32"}
    assert kept == set(FLOAT32)
    dtypes = {name: leaf.dtype.name for (*_, layer, name), leaf in leaves if layer not in FLOAT32}
    assert dtypes == {"kernel": "bfloat16", "bias": "float32", "scale": "float32", "modulation": "float32"}


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.run(sample.main, [str(a) for a in arguments])
    return end.value.code


def test_the_command_writes_videos(with_codec, tmp_path, capsys):
    options = ["--height", 16, "--width", 24, "--frames", 3, "--steps", 2, "--dtype", "float32", "--upscale", 1]
    prompts = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    assert run("--model", with_codec, *prompts, *options, "--output", tmp_path / "x.mp4") == 0
    info = probe(tmp_path / "x-0.mp4")
    assert (info.width, info.height, info.fps) == (24, 16, 16.0)
    first = list(read_frames(tmp_path / "x-0.mp4"))
    assert len(first) == 3 and np.std(first) > 1
    assert "x-1.mp4: 3 frames, 'a  blue &amp; red circle'" in capsys.readouterr().out
    changed = [*prompts[:2], *options, "--solver", "euler", "--guidance", 1, "--shift", 8, "--negative-prompt", ""]
    assert run("--model", with_codec, *changed, "--fps", 4, "--output", tmp_path / "y.mp4") == 0
    assert (
        probe(tmp_path / "y.mp4").fps == 4 and np.abs(np.subtract(list(read_frames(tmp_path / "y.mp4")), first)).max()
    )


def broken(model, tmp_path, what):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    if what == "channels":
        video = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
        PatchCodec.fit(video, channels=12).save(copy / "codec.npz")
    elif what == "scheduler":
        path = copy / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "epsilon"}))
    elif what == "two":
        shutil.copytree(copy / "transformer", copy / "transformer_2")
    elif what == "codec.npz":
        (copy / what).unlink()
    elif what:
        shutil.rmtree(copy / what)
    return copy


@pytest.mark.parametrize(
    "what, more, message",
    [
        ("codec.npz", [], "has no vae/ and no codec.npz"),
        ("channels", [], "have 12 channels, the transformer takes 16"),
        ("transformer", [], "error: --model: model folder"),
        ("transformer", [], "has no transformer/"),
        ("", ["--model", "nowhere"], "--model: nowhere: no such folder; give a model folder in the layout"),
        ("", ["--codec", "nowhere"], "--codec: nowhere does not exist; give a codec.npz"),
        ("", ["--frames", "9999999"], "--frames: 9999999 frames need more than"),
        ("text_encoder", [], "neither a folder made by prepare text nor a model folder"),
        ("tokenizer", [], "has no tokenizer/"),
        ("two", [], "two experts"),
        ("scheduler", [], "prediction_type 'epsilon'"),
        ("", ["--height", "18"], "multiples of 4"),
        ("", ["--height", "20"], "--height: 20 x 24: both must be multiples of 8 pixels"),
        ("", ["--frames", "0"], "--frames: it is 0; it must be at least 1"),
        ("", ["--shift", "0"], "--shift: it is 0; it must be above 0"),
        ("", ["--switch", "4:a"], "needs a streaming student"),
        ("", ["--weights", "float32"], "--weights belongs to --checkpoint; the weights of a model folder are held"),
        ("", ["--solver", "heun"], "invalid choice: 'heun'"),
        ("", ["--text", "/nowhere"], "neither a folder made by prepare text"),
        ("", ["--output", "x.txt"], "extension '.txt' is unknown"),
    ],
)
def test_bad_input_is_one_line_and_code_2(with_codec, tmp_path, monkeypatch, capfd, what, more, message):
    monkeypatch.chdir(tmp_path)
    model = broken(with_codec, tmp_path, what)
    options = ["--height", 16, "--width", 24, "--frames", 3, "--steps", 2, "--dtype", "float32", *more]
    assert run("--model", model, "--prompt", "a", *options) == 2
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "a file was left behind"


def test_codecs_are_found(folder, with_codec):
    assert isinstance(load_codec(with_codec), PatchCodec) and isinstance(
        load_codec(with_codec / "codec.npz"), PatchCodec
    )
    codec = load_codec(folder)
    assert isinstance(codec, vae_codec.VAECodec) and codec.vae.cfg.dtype == "bfloat16" and codec.temporal_stride == 4


def test_the_shift_of_a_folder(folder, tmp_path):
    assert read_shift(folder) == 3.0 == run_of(folder).settings.sample.shift and read_shift(tmp_path) == 5.0


def test_frames_have_to_fit_the_codec(folder):
    with pytest.raises(UserError, match=r"8 frames do not fit the codec, which makes 1 \+ 4 k .* 5 or 9") as error:
        load_model_folder(folder, ["a"], height=16, width=16, frames=8)
    assert error.value.field == "frames"
