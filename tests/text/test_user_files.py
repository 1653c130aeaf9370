"""Tables and prompts that users write: what `csv` wrote is read back, every other row is named with its line."""

import csv

import pytest
from hypothesis import given, strategies as st

from greedy_distill_jax.data.sources.captions import read_captions
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.text.prompts import read_prompts
from greedy_distill_jax.text.user_files import read_table

CAPTION = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]) | st.sampled_from(',;\t"\n\r '))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("captions")


@given(captions=st.lists(CAPTION.map(str.strip).filter(bool), min_size=1, max_size=5), mark=st.sampled_from(",;\t"))
def test_captions_are_read_as_csv_wrote_them(folder, captions, mark):
    clips = [f"{index}.mp4" for index in range(len(captions))]
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=mark).writerows([("clip", "caption"), *zip(clips, captions)])
    names, rows = read_table(folder / "captions.csv", ("clip", "caption"), "captions")
    assert names == ["clip", "caption"]
    assert [row for _, row in rows] == [{"clip": clip, "caption": text} for clip, text in zip(clips, captions)]
    assert read_prompts(folder / "captions.csv") == list(dict.fromkeys(captions))


@given(prompts=st.lists(CAPTION, max_size=5).filter(lambda texts: any(text.strip() for text in texts)))
def test_prompts_are_lines_without_white_space_around_them(folder, prompts):
    lines = [prompt.replace("\n", " ").replace("\r", " ") for prompt in prompts]
    (folder / "prompts.txt").write_bytes("\n".join(lines).encode())
    assert read_prompts(folder / "prompts.txt") == list(dict.fromkeys(line.strip() for line in lines if line.strip()))


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        (b"clip;caption\na.mp4;a dog, running\n", "';'"),
        (b'"clip";"caption"\n"a.mp4";"a dog, running"\n', "';'"),
        (b"\xef\xbb\xbfclip\tcaption\r\n\r\na.mp4\ta dog, running\r\n", "tabs"),
        (b'clip, caption\na.mp4, "a dog, running"\n', None),
    ],
)
def test_the_delimiter_is_told_unless_it_is_a_comma(tmp_path, capsys, text, mark):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "captions.csv").write_bytes(text)
    assert read_captions(tmp_path, tmp_path / "captions.csv") == {"a.mp4": "a dog, running"}
    told = capsys.readouterr().err
    assert f"captions.csv: fields are separated by {mark}" in told if mark else told == ""


BAD_ROWS = [
    (b"a.mp4,x\nb.mp4,a dog, running fast\n", "line 3: the header has 2 fields, this row 3; .* in quotes"),
    (b"a.mp4\n", "line 2: the header has 2 fields, this row 1"),
    (b'a.mp4,x\nb.mp4,"a dog\nc.mp4,y\n', "line 3: a quote opens and is never closed"),
    (b'"a",x\nb.mp4,"a dog" running\n', "line 3: .* put quotes around whole fields"),
    (b"a.mp4," + b"x" * 200_000 + b"\n", "line 2: a field has more than 131072 characters"),
    (b"a.mp4,x\nb.mp4,a\0dog\n", "line 3 holds a NUL byte"),
    (b"a.mp4,x\nb.mp4,\xff\n", "line 3 cannot be read .byte 0xff is not UTF-8"),
    (b'a.mp4,"x\ny"\nb.mp4,\n', "line 4"),  # no caption, after one of two lines
]


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS)
@pytest.mark.parametrize("reader", [read_prompts, lambda path: read_captions(path.parent, path)])
def test_a_row_that_would_be_read_wrongly_is_named(tmp_path, rows, message, reader):
    (tmp_path / "a.mp4").touch()
    path = tmp_path / "captions.csv"
    path.write_bytes(b"clip,caption\n" + rows)
    with pytest.raises(UserError, match=message) as told:
        reader(path)
    assert told.value.field in ("prompts", "captions")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"prompt,note,prompt\nx,1,y\n", "names the column 'prompt' twice"),
        ("a.csv", b"prompt,caption\nx,y\n", "has both a column prompt and a column caption"),
        ("a.csv", b"text\nx\n", "has neither a column prompt nor a column caption"),
        ("a.csv", b"", "has neither"),
        ("a.txt", b"a\nb\0\n", "line 2 holds a NUL byte"),
        ("a.txt", "a\n".encode("utf-16"), "line 1 cannot be read"),
        ("a.txt", b"\xef\xbb\xbfa\nb\n\xff\n", "line 3 cannot be read .byte 0xff"),
    ],
)
def test_files_of_prompts_that_are_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


def test_a_clip_of_another_kind_is_not_called_missing(tmp_path):
    for name in ("a.mp4", "b.gif"):
        (tmp_path / name).touch()
    (tmp_path / "captions.csv").write_text("clip,caption\na.mp4,a\nb.gif,b\n")
    with pytest.raises(UserError, match="names 'b.gif', of a kind that is not read"):
        read_captions(tmp_path, tmp_path / "captions.csv")
