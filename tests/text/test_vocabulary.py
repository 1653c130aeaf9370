"""The words of training: those that a network reads of its captions, bounded, kept with every checkpoint."""

from types import SimpleNamespace

import pytest

from greedy_distill_jax.config import read_settings
from greedy_distill_jax.data.augment import WORDS, augmented
from greedy_distill_jax.data.sources.moving_shapes import MovingShapes
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.text import vocabulary as words
from greedy_distill_jax.text.hashed_words import HashWordEncoder
from greedy_distill_jax.text.table import TextTable
from greedy_distill_jax.text.vocabulary import never_seen, unknown_words, vocabulary
from greedy_distill_jax.training import job


def test_words_are_those_that_are_read(monkeypatch):
    assert vocabulary(["a Cat, running", "a cat of 3"], text_len=2, more=["rbg"]) == ["a", "cat", "rbg"]
    monkeypatch.setattr(words, "MOST", 3)
    assert vocabulary(["a b c"], text_len=9) == ["a", "b", "c"] and vocabulary(["a b c", "d"], text_len=9) is None


def test_what_is_unknown_is_named_in_its_order():
    assert unknown_words(["a Purple cat", "zebra; purple"], ["a", "cat"], text_len=9) == ["purple", "zebra"]
    long = "a cat that runs and runs"  # of which a network with two rows of text reads two words, in training as here
    assert unknown_words([long], vocabulary([long], text_len=2), text_len=2) == []
    assert never_seen(["purple"]).startswith("'purple' was never seen in training")
    assert never_seen([str(n) for n in range(10)]).startswith("'0', '1', '2', '3', '4', '5', '6', '7' and 2 more were")


@pytest.mark.parametrize("motion", ["captioned", "wandering"])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_moving_shapes_list_their_captions(motion, split):
    source = MovingShapes(motion=motion, split=split)
    drawn = {source[index]["caption"] for index in range(300)}
    assert source.captions == drawn and len(drawn) == (3 if motion == "wandering" else 36 if split == "train" else 12)


def test_what_an_augmentation_says_is_among_its_words():
    changed = augmented(MovingShapes(), "labelled", 0)
    found = vocabulary([changed[index]["caption"] for index in range(300)], text_len=99)
    assert found == vocabulary(MovingShapes().captions, text_len=99, more=WORDS["labelled"])


def test_a_run_knows_the_words_of_its_captions(tiny_teacher):
    shapes = "a blue circle down green left moving red right square triangle up yellow"
    assert Run.load(tiny_teacher).meta["words"] == shapes.split()


def test_a_run_adds_its_words_to_those_of_the_run_it_starts_from():
    settings = read_settings(tiny.train_config(data__augment="labelled", data__negative_prompt="a blur"))
    encoder, source = HashWordEncoder(3, 8), SimpleNamespace(captions={"a cat runs fast", "a dog"})
    own = {"a", "cat", "runs", "dog", "blur", *WORDS["labelled"]}
    assert job._words(settings, encoder, source, [], None) == sorted(own)
    assert job._words(settings, encoder, source, ["horse"], None) == sorted({*own, "horse"})
    # A run that goes on has what it began with; what is not known stays unknown.
    assert job._words(settings, encoder, source, ["horse"], {"words": ["kept"]}) == ["kept"]
    assert job._words(settings, encoder, source, [], {}) is None
    assert job._words(settings, encoder, source, None, None) is None
    assert job._words(settings, encoder, SimpleNamespace(), [], None) is None
    assert job._words(settings, TextTable(encoder, [""]), source, [], None) is None
