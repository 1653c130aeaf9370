"""The word encoder: frozen numbers, zero padding, a warning when it cuts."""

import numpy as np
import pytest

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.text.hashed_words import HashWordEncoder
from greedy_distill_jax.text.protocol import TextEncoder


def test_rows_are_words_then_zeros():
    encoder = HashWordEncoder()
    assert isinstance(encoder, TextEncoder)
    rows = encoder(["A red, square moving-left!", "", "a blue square"])
    assert rows.shape == (3, 16, 32) and rows.dtype == np.float32
    assert not rows[0, 5:].any() and not rows[1].any() and not rows[2, 3:].any()
    np.testing.assert_array_equal(rows[0, [0, 2]], rows[2, [0, 2]])  # equal words, equal rows, whatever the case
    assert (rows[0, 1] != rows[2, 1]).any()


def test_numbers_are_frozen():
    row = HashWordEncoder(text_len=1, text_dim=4)(["red"])[0, 0]
    np.testing.assert_allclose(row, [-1.620293, 0.756444, 0.135369, 1.614143], atol=1e-6)
    many = HashWordEncoder(400, 64)([" ".join(f"w{i}" for i in range(400))])
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


def test_long_prompt_is_cut_with_a_warning():
    with pytest.warns(UserWarning, match=r"5 words, text_len is 3: cut after 'c' \(word 3\)"):
        cut = HashWordEncoder(text_len=3)(["a b c d e"])
    np.testing.assert_array_equal(cut, HashWordEncoder(text_len=3)(["a b c"]))


def test_bad_arguments():
    with pytest.raises(UserError, match="text_len=0"):
        HashWordEncoder(text_len=0)
    with pytest.raises(TypeError, match="list"):
        HashWordEncoder()("a red square")
