"""What users name as `file.py:NAME` or `package.module:NAME`."""

import pytest

from greedy_distill_jax.cli import extensions
from greedy_distill_jax.errors import UserError

OWN = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class Own:
    x: int = 1
"""


def test_a_file_may_hold_what_asks_for_its_module(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    assert extensions.load(f"{tmp_path}/own.py:Own")().x == 1
    (tmp_path / "own.py").write_text(OWN.replace("= 1", "= 2"))  # as edited beside a notebook
    assert extensions.load(f"{tmp_path}/own.py:Own")().x == 2
    assert extensions.load("greedy_distill_jax.cli.extensions:load") is extensions.load


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere.py:X", "loss 'nowhere.py:X' cannot be loaded: there is no file nowhere.py"),
        ("no.such.module:X", "cannot be loaded: No module named 'no'"),
        ("greedy_distill_jax.errors:X", "cannot be loaded: greedy_distill_jax.errors has no 'X'"),
        (":X", "cannot be loaded: give 'package.module:NAME' or 'file.py:NAME'"),
        ("own.py:", "cannot be loaded: give 'package.module:NAME' or 'file.py:NAME'"),
    ],
)
def test_what_is_not_there(name, message):
    with pytest.raises(UserError, match=message) as error:
        extensions.load(name, kind="loss ", field="losses")
    assert error.value.field == "losses"


@pytest.mark.parametrize(
    "text, message",
    [(b"\ndef own(:\n", "own.py line 2 is not Python"), (b"\0", "is not Python"), (b"\xff", "is not Python")],
)
def test_a_file_that_is_no_python(tmp_path, text, message):
    (tmp_path / "own.py").write_bytes(text)
    with pytest.raises(UserError, match=message) as error:
        extensions.load(f"{tmp_path}/own.py:X", kind="loss ", field="losses")
    assert error.value.field == "losses"


def test_a_fault_of_the_file_is_told_as_it_is(tmp_path):
    (tmp_path / "own.py").write_text("import math\nmath.nothing\n")
    with pytest.raises(AttributeError, match="nothing"):
        extensions.load(f"{tmp_path}/own.py:X")
