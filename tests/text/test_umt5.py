"""The text encoder and its store against transformers and against the encoding of diffusers' own pipeline."""

import json
import shutil

import numpy as np
import pytest

from greedy_distill_jax import cli, prepare
from greedy_distill_jax.data.sources.moving_shapes import MovingShapes
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.testing import tiny, wan_folder
from greedy_distill_jax.text import write_store
from greedy_distill_jax.text.cleaning import clean_prompt, cleaning
from greedy_distill_jax.text.hashed_words import HashWordEncoder
from greedy_distill_jax.text.load import load_text_encoder
from greedy_distill_jax.text.prompts import WAN_NEGATIVE_PROMPT, read_prompts
from greedy_distill_jax.text.protocol import TextEncoder
from greedy_distill_jax.text.store import TextStore
from greedy_distill_jax.text.table import TextTable
from greedy_distill_jax.train import train

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[torch]'")
pytest.importorskip("transformers", reason="needs transformers: pip install 'greedy_distill_jax[torch]'")

from greedy_distill_jax.text.umt5 import UMT5Encoder  # noqa: E402

LEN = 9
PROMPTS = ["a red square moving left", "a  blue &amp;amp; red\tcircle", "a horse", "worst quality"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return wan_folder.write_text_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(folder):
    path = folder.parent / f"{folder.name}.txt"
    path.write_text("\n".join(["", *PROMPTS, PROMPTS[0], "  "]), encoding="utf-8")
    return path


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.run(prepare.main, ["text", *map(str, arguments)])
    return end.value.code


@pytest.fixture(scope="module")
def store(folder, prompts):
    output = folder.parent / f"{folder.name}-store"
    assert run("--model", folder, "--prompts", prompts, "--output", output, "--text-len", LEN, "--batch", 2) == 0
    return output


def expected(prompts):
    """By hand: ids one prompt at a time without any padding, so without a mask; zeros behind."""
    tokens, model = wan_folder.tokenizer(), wan_folder.text_encoder()
    out = np.zeros((len(prompts), LEN, wan_folder.TEXT_DIM), np.float32)
    for rows, prompt in zip(out, prompts, strict=True):
        ids = tokens(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            rows[: ids.shape[1]] = model(ids).last_hidden_state[0].numpy()
    return out


def test_the_store_holds_what_the_encoder_says(store, folder):
    cleaned = [PROMPTS[0], "a blue & red circle", *PROMPTS[2:], WAN_NEGATIVE_PROMPT, ""]
    asked = [*PROMPTS, WAN_NEGATIVE_PROMPT, ""]
    want = expected(cleaned)
    assert 0.3 < want[0].std() < 3 and not np.allclose(want[0, 0], want[1, 0])
    reader = TextStore(store)
    assert isinstance(reader, TextEncoder) and (reader.text_len, reader.text_dim) == (LEN, wan_folder.TEXT_DIM)
    for encoder in (reader, load_text_encoder(folder, text_len=LEN, text_dim=wan_folder.TEXT_DIM)):
        got = encoder(asked)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(got == 0, want == 0)  # the padding, to the bit
    np.testing.assert_array_equal(TextTable(reader, asked)([PROMPTS[2], ""]), reader([PROMPTS[2], ""]))
    assert reader.info["plan"]["cleaning"] == cleaning() and reader([]).shape == (0, LEN, wan_folder.TEXT_DIM)


def test_rows_are_those_of_the_pipeline(store, folder):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'greedy_distill_jax[parity]'")
    pipe = diffusers.WanPipeline(
        wan_folder.tokenizer(), wan_folder.text_encoder(), vae=None, scheduler=None, transformer=None
    )
    with torch.no_grad():
        want = pipe._get_t5_prompt_embeds(PROMPTS, max_sequence_length=LEN).numpy()
    np.testing.assert_allclose(TextStore(store)(PROMPTS), want, atol=1e-5, rtol=0)


def test_an_unknown_prompt_names_itself_and_the_remedy(store):
    with pytest.raises(UserError, match=r"no prompt 'a green square'; encode it with .*prepare text"):
        TextStore(store)([PROMPTS[0], "a green square"])
    with pytest.raises(TypeError, match="list"):
        TextStore(store)("a red square")


def test_long_prompts_are_cut_with_a_warning_that_says_where(folder):
    encoder = UMT5Encoder(folder, text_len=4)
    with pytest.warns(UserWarning, match=r"'a red square moving left' has 6 tokens, text_len is 4: cut after 'a red s"):
        rows = encoder(["a red square moving left"])
    np.testing.assert_allclose(rows[0], expected(["a red square"])[0, :4], atol=1e-5)
    with pytest.raises(TypeError, match="list"):
        encoder("a red square")


def test_bfloat16_rows_are_stored_as_such(folder, prompts, tmp_path):
    options = ["--model", folder, "--prompts", prompts, "--text-len", LEN, "--dtype", "bfloat16"]
    assert run(*options, "--output", tmp_path / "half", "--negative", "worst quality") == 0
    reader = TextStore(tmp_path / "half")
    assert reader._source[0]["rows"].dtype.name == "bfloat16"
    np.testing.assert_array_equal(reader(PROMPTS), UMT5Encoder(folder, text_len=LEN, dtype="bfloat16")(PROMPTS))
    assert WAN_NEGATIVE_PROMPT not in reader.info["prompts"]


def test_a_killed_job_goes_on_and_a_finished_one_loads_nothing(store, folder, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(write_store, "_GROUP", 2)
    options = ["--model", folder, "--prompts", prompts, "--output", tmp_path / "out", "--text-len", LEN]
    call = UMT5Encoder.__call__

    def until_the_horse(self, prompts):
        if "a horse" in prompts:
            raise KeyboardInterrupt
        return call(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(UMT5Encoder, "__call__", until_the_horse)
        assert run(*options) == 130
    assert not (tmp_path / "out" / "dataset.json").exists()
    with pytest.raises(UserError, match="not finished"):
        TextStore(tmp_path / "out")
    assert run(*options, "--shard-index", 1, "--num-shards", 2) == 0
    assert run(*options, "--shard-index", 0, "--num-shards", 2) == 0
    asked = [*PROMPTS, ""]
    np.testing.assert_array_equal(TextStore(tmp_path / "out")(asked), TextStore(store)(asked))
    monkeypatch.setattr(UMT5Encoder, "__init__", None)
    assert run(*options) == 0


def damaged(folder, tmp_path, what):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    config = copy / "text_encoder" / "config.json"
    if what == "kind":
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "t5"}))
    elif what == "weights":
        weights = copy / "text_encoder" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:500])
    elif what == "layers":
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 3}))
    else:
        shutil.rmtree(copy / what)
    return copy


@pytest.mark.parametrize(
    "what, message",
    [
        ("tokenizer", "has no tokenizer/"),
        ("text_encoder", "has no text_encoder/"),
        ("kind", "model_type 't5', expected 'umt5'"),
        ("weights", "cannot be loaded"),
        ("layers", "lacks the tensor encoder.block.2"),
    ],
)
def test_a_damaged_folder_is_one_line_and_code_2(folder, prompts, tmp_path, capfd, what, message):
    model = damaged(folder, tmp_path, what)
    assert run("--model", model, "--prompts", prompts, "--output", tmp_path / "out") == 2
    assert message in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", b" \n\n", "holds no prompt"),
        ("p.txt", b"\xff\xfe\x00", "cannot be read"),
        ("p.json", b"[]", "give a .txt file"),
        ("p.csv", b"clip,words\na,b\n", "neither a column prompt nor a column caption"),
        (None, b"", "cannot be read"),
    ],
)
def test_bad_prompts_are_one_line_and_code_2(folder, tmp_path, capsys, name, content, message):
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(content)
    assert run("--model", folder, "--prompts", path, "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--text-len", "0"], "--text-len: it is 0"),
        (["--batch", "0"], "--batch: it is 0"),
        (["--shard-index", "1"], "belong together"),
        (["--shard-index", "2", "--num-shards", "2"], "--shard-index 2 of --num-shards 2"),
        (["--shard-index", "0", "--num-shards", "2", "--overwrite"], "remove the folder first"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_bad_options_are_one_line_and_code_2(folder, prompts, tmp_path, capsys, more, message):
    assert run("--model", folder, "--prompts", prompts, "--output", tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err


def test_captions_of_a_csv_are_prompts(tmp_path):
    (tmp_path / "c.csv").write_text('clip,caption\na.mp4,"a horse, running"\nb.mp4,a horse\nc.mp4,a horse\n')
    assert read_prompts(tmp_path / "c.csv") == ["a horse, running", "a horse"]


def test_cleaning():
    assert clean_prompt("  a &amp;lt;b&gt;\n\tc ") == "a <b> c"
    assert clean_prompt("schÃ¶n") == ("schön" if cleaning().startswith("ftfy") else "schÃ¶n")


def test_what_a_config_may_name(store, folder, tmp_path):
    assert isinstance(load_text_encoder("", text_len=3, text_dim=4), HashWordEncoder)
    with pytest.raises(UserError, match=f"has {LEN} rows of width 12, the network takes 4 of 12"):
        load_text_encoder(store, text_len=4, text_dim=12)
    with pytest.raises(UserError, match="has 9 rows of width 12, the network takes 9 of 32"):
        load_text_encoder(folder, text_len=LEN, text_dim=32)
    with pytest.raises(UserError, match="neither a folder made by prepare text nor"):
        load_text_encoder(tmp_path, text_len=4, text_dim=12)


def test_training_reads_the_store_and_finds_a_missing_caption_first(store, tmp_path):
    sizes = dict(data__text=str(store), model__text_len=LEN, model__text_dim=wan_folder.TEXT_DIM, steps=1)
    with pytest.raises(UserError, match=r"has no prompt 'a \w+ \w+ moving \w+'"):
        train(tiny.train_config(**sizes), tmp_path / "run", show_progress=False)
    with pytest.raises(UserError, match="augmentation 'labelled' changes captions"):
        train(tiny.train_config(**sizes, data__augment="labelled"), tmp_path / "run", show_progress=False)
    with pytest.raises(UserError, match="the network takes 6 of 12"):
        train(tiny.train_config(**{**sizes, "model__text_len": 6}), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_trained_from_a_store_samples_its_prompts(folder, tmp_path):
    shapes = MovingShapes(frames=2)
    captions = sorted({shapes[index]["caption"] for index in range(2000)})
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    options = ["--model", folder, "--prompts", tmp_path / "captions.txt", "--negative", "worst quality"]
    assert run(*options, "--output", tmp_path / "store", "--text-len", LEN, "--batch", 64) == 0
    sizes = dict(model__text_len=LEN, model__text_dim=wan_folder.TEXT_DIM, steps=1, data__frames=2)
    texts = dict(data__text=str(tmp_path / "store"), data__negative_prompt="worst quality")
    train(tiny.train_config(**sizes, **texts), tmp_path / "run", show_progress=False)
    trained = Run.load(tmp_path / "run")
    assert isinstance(trained.encoder, TextStore)
    assert np.isfinite(trained.sample_latents(captions[:1], steps=1)).all()
    with pytest.raises(UserError, match="no prompt 'a horse'"):
        trained.sample_latents(["a horse"], steps=1)
    live = Run.load(tmp_path / "run", text=str(folder))  # the encoder itself knows every prompt
    np.testing.assert_allclose(live.text(captions[:2]), trained.text(captions[:2]), atol=1e-5)
    assert np.any(live.text(["a horse"]))
    weights = Run.load(tmp_path / "run", needs_codec=False)
    assert weights.encoder is None
