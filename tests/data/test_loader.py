"""The loader: global batch k is a function of (seed, k), whatever the processes, threads or restarts."""

import itertools
import pickle
import warnings

import numpy as np
import pytest

from greedy_distill_jax.data.augment import augmented
from greedy_distill_jax.data.loader import SkipBadRecords, make_loader
from greedy_distill_jax.data.sources import registry
from greedy_distill_jax.data.sources.protocol import captions_of, check_example
from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.text.hashed_words import HashWordEncoder


class Listed:
    """Record i is a video of grey level i; those in `bad` raise."""

    def __init__(self, length, bad=()):
        self.length, self.bad = length, set(bad)

    def __len__(self):
        return self.length

    def __repr__(self):
        return "Listed"

    def __getitem__(self, index):
        if index in self.bad:
            raise ValueError(f"shard.array_record index {index} is damaged")
        return {"video": np.full((2, 4, 4, 3), index, np.uint8), "caption": f"number {index}"}


class Grey:
    """A codec whose latents are the grey level."""

    temporal_stride, params = 1, ()

    def latent_shape(self, height, width):
        return height // 4, width // 4, 1

    def decode(self, *args):
        raise AssertionError("a loader never decodes")

    open_decoder = decode_next = pixels = decode

    def encode(self, video):
        return video[..., ::4, ::4, :1].astype(np.float32)


def _loader(source, **options):
    options = {"global_batch": 6, "seed": 1, "codec": Grey(), "text_encoder": HashWordEncoder()} | options
    return make_loader(source, **options)


def _indices(loader, batches):
    return np.stack([batch["latents"][:, 0, 0, 0, 0].astype(int) for batch in itertools.islice(loader, batches)])


@pytest.fixture(scope="module")
def shapes():
    return load_source("moving_shapes", "train")


def test_batches_have_the_contract(shapes):
    source, codec = shapes
    batch = next(make_loader(source, codec=codec, text_encoder=HashWordEncoder(), global_batch=4, seed=0))
    assert set(batch) == {"latents", "text", "captions"} and len(batch["captions"]) == 4
    assert batch["latents"].shape == (4, 8, 4, 4, 16) and batch["latents"].dtype == np.float32
    assert batch["text"].shape == (4, 16, 32) and batch["text"].dtype == np.float32


def test_latents_and_text_belong_together():
    batch = next(_loader(Listed(50)))
    numbers = batch["latents"][:, 0, 0, 0, 0].astype(int)
    np.testing.assert_array_equal(batch["text"], HashWordEncoder()([f"number {n}" for n in numbers]))


def test_start_resumes_exactly(shapes):
    source, codec = shapes
    options = {"codec": codec, "text_encoder": HashWordEncoder(), "global_batch": 4, "seed": 3}
    whole = list(itertools.islice(make_loader(source, **options), 5))
    resumed = list(itertools.islice(make_loader(source, start=3 * 4, **options), 2))
    for a, b in zip(whole[3:], resumed, strict=True):
        np.testing.assert_array_equal(a["latents"], b["latents"])
        np.testing.assert_array_equal(a["text"], b["text"])
    other = next(make_loader(source, **options | {"seed": 4}))
    assert (other["latents"] != whole[0]["latents"]).any()


@pytest.mark.parametrize("shares", [[(0, 1, 2), (3, 4, 5)], [(0, 5), (1, 2), (3, 4)]])
def test_rows_of_processes_make_the_global_batch(shares):
    source = Listed(40)
    whole = _indices(_loader(source, start=12), 15)  # past the end of the first epoch
    for rows in shares:
        np.testing.assert_array_equal(_indices(_loader(source, start=12, rows=rows), 15), whole[:, rows])


def test_threads_do_not_matter():
    one, many = (_indices(_loader(Listed(100), num_threads=threads), 30) for threads in (0, 8))
    np.testing.assert_array_equal(one, many)


def test_epochs_cover_the_source_in_different_orders():
    order = _indices(_loader(Listed(30)), 15).reshape(-1)
    first, second = order[:30], order[30:60]
    assert sorted(first) == sorted(second) == list(range(30)) and (first != second).any()
    plain = _indices(_loader(Listed(30), shuffle=False), 6).reshape(-1)
    np.testing.assert_array_equal(plain, np.arange(36) % 30)
    np.testing.assert_array_equal(_indices(_loader(Listed(1)), 2), np.zeros((2, 6)))  # smaller than a batch


def test_bad_records_are_replaced_named_and_counted():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = _indices(_loader(Listed(20, bad=(3, 4, 19)), shuffle=False, num_threads=0), 7).reshape(-1)
    expected = [{3: 5, 4: 5, 19: 0}.get(i % 20, i % 20) for i in range(42)]
    np.testing.assert_array_equal(got, expected)
    messages = sorted(str(warning.message) for warning in caught)
    assert len(messages) == 3 and all("shard.array_record index" in message for message in messages)


def test_replacement_does_not_depend_on_history():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = Listed(40, bad=(5, 6, 17, 30))
        whole = _indices(_loader(source), 20)
        np.testing.assert_array_equal(_indices(_loader(source, start=60), 10), whole[10:])
        for rows in ((0, 4, 5), (1, 2, 3)):
            np.testing.assert_array_equal(_indices(_loader(source, rows=rows), 20), whole[:, rows])


def test_a_record_that_another_process_can_read_is_not_skipped():
    """Where several processes feed the same rows, all skip a record or none does."""
    asked = []
    with pytest.warns(UserWarning, match="index 2"):
        source = SkipBadRecords(Listed(20, bad=(2,)), 2, lambda index: asked.append(index) or [])
        assert [source[2]["caption"], source[2]["caption"]] == [Listed(20)[3]["caption"]] * 2 and asked == [2]
    message = "index 5.*; but process 3, which feeds the same rows, did not say that it cannot read it"
    with pytest.raises(UserError, match=message):  # as a run opens its data: one source in the loader's own
        source = SkipBadRecords(Listed(20, bad=(5,)), 2, lambda index: [3])
        next(_loader(source, shuffle=False, num_threads=0))


def test_too_many_bad_records_raise():
    reached = r"3 bad records, max_bad_records=2; .*index 8"
    with pytest.warns(UserWarning, match="index [25]"), pytest.raises(UserError, match=reached):
        _indices(_loader(Listed(20, bad=(2, 5, 8)), shuffle=False, max_bad_records=2, num_threads=0), 9)
    with pytest.warns(UserWarning), pytest.raises(UserError, match=f"^{reached}") as error:  # one source in another
        source = SkipBadRecords(Listed(20, bad=(2, 5, 8)), 2)
        _indices(_loader(source, shuffle=False, max_bad_records=2, num_threads=0), 9)
    assert str(error.value).count("bad records") == 1
    with pytest.raises(UserError, match=r"max_bad_records=0; .*index 2"):
        _indices(_loader(Listed(20, bad=(2,)), shuffle=False, max_bad_records=0), 3)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="all 4 records are bad"):
        _indices(_loader(Listed(4, bad=range(4)), num_threads=0), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 7}, "start=7 is not a multiple of global_batch=6.*at 6"),
        ({"start": -6}, "start=-6"),
        ({"rows": (4, 6)}, r"rows=\[4, 6\]; use some of 0 to 5"),
        ({"rows": ()}, r"rows=\[\]"),
        ({"global_batch": 0}, "global_batch=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UserError, match=message):
        _loader(Listed(20), **options)


def test_empty_source():
    with pytest.raises(UserError, match="Listed is empty"):
        _loader(Listed(0))


def test_load_source_of_moving_shapes(shapes):
    _, codec = shapes
    held_out, again = load_source("moving_shapes", "held_out", frames=12, seed=9)
    assert held_out[0]["video"].shape == (12, 16, 16, 3)
    np.testing.assert_array_equal(codec.components, again.components)
    assert codec.scale == again.scale


def test_a_batch_holds_what_its_source_holds():
    """States and stored text of trajectories, captions alone of prompts."""

    class Ways(Listed):
        levels = (1.0, 0.5)

        def __getitem__(self, index):
            latents = np.full((2, 1, 1, 3), index, np.float32)
            return {
                "latents": latents,
                "states": np.stack([latents + 1, latents + 2]),
                "text": np.full((16, 32), index, np.float32),
                "caption": str(index),
            }

    batch = next(_loader(Ways(50), codec=None))
    assert set(batch) == {"latents", "states", "text", "captions"}
    assert batch["latents"].shape == (6, 2, 1, 1, 3) and batch["states"].shape == (6, 2, 2, 1, 1, 3)
    np.testing.assert_array_equal(batch["states"][:, 1], batch["latents"] + 2)
    np.testing.assert_array_equal(batch["text"][:, 0, 0], batch["latents"][:, 0, 0, 0, 0])
    with pytest.raises(UserError, match="the data holds 16 text rows of width 32, the network takes 4 of 32"):
        next(_loader(Ways(50), codec=None, text_encoder=HashWordEncoder(4, 32), num_threads=0))


def test_prompts_are_enough_for_a_batch(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red square\n\na blue circle\na red square\n")
    source, codec = load_source(f"prompts:{tmp_path / 'prompts.txt'}")
    assert len(source) == 2 and codec is None and captions_of(source) == {"a red square", "a blue circle"}
    assert [pickle.loads(pickle.dumps(source))[i] for i in range(2)] == [
        {"caption": "a red square"},
        {"caption": "a blue circle"},
    ]
    with pytest.raises(IndexError):
        source[2]
    batch = next(_loader(source, codec=None, shuffle=False))
    assert set(batch) == {"text", "captions"}
    np.testing.assert_array_equal(batch["text"], HashWordEncoder()(["a red square", "a blue circle"] * 3))
    with pytest.raises(UserError, match="nowhere.txt cannot be read") as error:
        load_source(f"prompts:{tmp_path / 'nowhere.txt'}")
    assert error.value.field == "source"


def test_a_source_from_outside(monkeypatch):
    monkeypatch.setattr(registry, "_OPENERS", dict(registry._OPENERS))

    @registry.register("grey", "grey:LENGTH")
    def open_grey(length, *, split, size, frames, seed):
        return Listed(int(length)), Grey()

    source, codec = load_source("grey:9", "held_out", frames=4)
    assert len(source) == 9 and isinstance(codec, Grey)
    assert _indices(_loader(source, codec=codec, shuffle=False), 1).tolist() == [[0, 1, 2, 3, 4, 5]]
    with pytest.raises(UserError, match="prompts:FILE, (.*, )?grey:LENGTH"):
        load_source("gray:9")
    with pytest.raises(UserError, match="data 'grey' is unknown"):
        load_source("grey")


@pytest.mark.parametrize("opened", [Listed(9), (Listed(9),), (iter("ab"), None), None])
def test_an_opener_that_returns_no_source(monkeypatch, opened):
    monkeypatch.setattr(registry, "_OPENERS", {"mine": ("mine", lambda argument, **options: opened)})
    with pytest.raises(UserError, match="'mine': its opener returned a .*; return .source, codec.") as error:
        load_source("mine")
    assert error.value.field == "source"


@pytest.mark.parametrize(
    "example, said",
    [
        ("a caption", "without a text as its caption: a str"),
        ({"video": None}, "without a text as its caption: .'video'."),
        ({"caption": b"a cat"}, "without a text as its caption"),
        (
            {"caption": "a", "video": np.zeros((2, 4, 4, 3), np.float32)},
            r"'video' as float32\[2, 4, 4, 3\]; a source gives uint8",
        ),
        (
            {"caption": "a", "latents": np.zeros((2, 4, 4), np.float32)},
            r"'latents' as float32\[2, 4, 4\].*float32 \[T, h, w, C\]",
        ),
        ({"caption": "a", "states": [1.0]}, r"'states' as list\[1\]"),
    ],
)
def test_an_example_that_is_none(example, said):
    check_example(Listed(3)[0], "mine")
    with pytest.raises(UserError, match=f"'mine' gives .*{said}"):
        check_example(example, "mine")


def test_augmentation_needs_pixels(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red square")
    source, _ = load_source(f"prompts:{tmp_path / 'prompts.txt'}")
    assert augmented(source, "none", 0) is source
    with pytest.raises(UserError, match="changes pixels, but Prompts") as error:
        augmented(source, "labelled", 0)
    assert error.value.field == "augment"


@pytest.mark.parametrize("spec", ["shapes", "clips:", "clips", "ode", "moving_shapes:1"])
def test_unknown_source(spec):
    with pytest.raises(UserError, match="clips:DIR, latents:DIR, ode:DIR, prompts:FILE|use one of captioned") as error:
        load_source(spec)
    assert error.value.field == "source"
