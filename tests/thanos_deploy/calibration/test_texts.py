import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thanos_deploy.calibration.texts import builtin_text, read_text
from thanos_deploy.errors import CalibrationError

ROWS = b'{"text": "first"}\n{"text": "second"}\n'


def test_the_two_parts_of_the_builtin_text_have_no_paragraph_in_common() -> None:
    calibration, held_out = (
        set(builtin_text(held_out=part).content.split("\n\n")) for part in (False, True)
    )
    assert not calibration & held_out
    assert sum(map(len, calibration)) > 150_000
    assert sum(map(len, held_out)) > 50_000


def test_text_is_read_as_it_is_and_rows_are_joined_by_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert read_text(tmp_path / "a.txt").content == "one\ntwo\n"
    rows = [{"body": "first"}, {"body": "second", "other": 3}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_text(tmp_path / "a.jsonl", text_field="body").content == "first\n\nsecond"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "no text"),
        ("blank.txt", b" \n\n\t", "no text"),
        ("latin.txt", b"caf\xe9", "byte 3 .0xe9. is not UTF-8"),
        ("bad.jsonl", b'{"text": "x"}\n{', "line 2: not JSON"),
        ("field.jsonl", b'{"body": "x"}', "line 1: no text field 'text'; found body"),
        ("list.jsonl", b"[1]", "line 1: no text field 'text': the row is of type list"),
        ("number.jsonl", b'{"text": 3}', "line 1: the field 'text' is a number, not a text: 3"),
    ],
)
def test_unusable_text_is_refused_with_file_and_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=f"{name}.*{message}"):
        read_text(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"nowhere\.txt"):
        read_text(tmp_path / "nowhere.txt")


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "b.c.NdJson"])
def test_json_lines_are_known_by_their_suffix_in_capital_letters_or_not(
    tmp_path: Path, name: str
) -> None:
    for path, content in (
        (tmp_path / name, ROWS),
        (tmp_path / f"{name}.gz", gzip.compress(ROWS, mtime=0)),
        (tmp_path / f"{name}.GZ", gzip.compress(ROWS[:18], mtime=0) + gzip.compress(ROWS[18:])),
    ):
        path.write_bytes(content)
        assert read_text(path).content == "first\n\nsecond"


@pytest.mark.parametrize(
    "name", ["a.txt", "a.TXT", "README.md", "a.rst", "wiki.test.raw", "corpus"]
)
def test_plain_text_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    text = "one\u2028two\x85three\r\n"
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert read_text(tmp_path / name).content == text
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode("utf-8-sig"), mtime=0))
    assert read_text(tmp_path / f"{name}.gz").content == text


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_whatever_a_row_holds_is_what_is_read(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in ["x", *texts]]
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    for encoding, end in (("utf-8", "\n"), ("utf-8-sig", "\r\n")):
        path.write_bytes(end.join(rows).encode(encoding))
        assert read_text(path).content == "\n\n".join(["x", *texts])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *[(name, "a table") for name in ("a.csv", "a.Tsv", "a.csv.gz", "a.xlsx")],
        *[(name, "a binary table") for name in ("a.arrow", "a.feather")],
        *[(name, "an archive") for name in ("a.zip", "a.tar.gz", "a.tgz", "a.jsonl.zst", "a.xz")],
        *[(name, "a document") for name in ("a.html", "a.HTM", "a.xml", "a.pdf")],
        *[(name, "not a supported kind of text") for name in ("a.yaml", "a.npy", "a.pkl")],
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_text("whatever is in it")
    with pytest.raises(
        CalibrationError, match=f"{name}: .*{said}.*supported are .*jsonl"
    ) as refused:
        read_text(tmp_path / name)
    assert refused.value.fix


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "corpus"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b"text", mtime=0), "gzip"),
        (b"PAR1\x15\x04", "Parquet"),
        (b"ARROW1\x00\x00", "Arrow"),
        (b"PK\x03\x04\x14", "zip"),
        (b"\x28\xb5\x2f\xfd\x04", "Zstandard"),
        (b"%PDF-1.7", "PDF"),
        ("text".encode("utf-16"), "UTF-16"),
        ("text".encode("utf-32"), "UTF-32"),
        ("text".encode("utf-16-le"), "byte 1 is 0"),
        (b"text\x00\x01", "byte 4 is 0"),
    ],
)
def test_contents_that_are_no_text_are_said_what_they_are(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=f"{name}: .*{said}"):
        read_text(tmp_path / name)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"text": null}', "is null"),
        ('{"text": true}', "is a truth value, not a text: true"),
        ('{"text": 1.5}', "is a number, not a text: 1.5"),
        ('{"text": ["a"]}', "is a list"),
        ('{"text": {"a": 1}}', "is an object"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ('{"body": "x", "n": 1}', "no text field 'text'; found body, n"),
        ("{}", "no text field 'text'; found none"),
        ("null", "no text field 'text': the row is of type NoneType"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_row_without_a_text_is_named_with_what_it_holds(
    tmp_path: Path, row: str, said: str
) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x"}}\n\n{row}\n')
    with pytest.raises(CalibrationError, match=rf"a\.jsonl, line 3: .*{said}"):
        read_text(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "content", [b"plain", gzip.compress(ROWS, mtime=0)[:-10], b"\x1f\x8bxxxxxxxxxxxx"]
)
def test_what_only_claims_to_be_gzip_is_said_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(CalibrationError, match=r"a\.jsonl\.gz: not readable gzip data"):
        read_text(tmp_path / "a.jsonl.gz")


def test_a_missing_file_is_missing_whatever_it_is_called_and_a_folder_is_no_file(
    tmp_path: Path,
) -> None:
    with pytest.raises(CalibrationError, match="No such file"):
        read_text(tmp_path / "a.csv")
    with pytest.raises(CalibrationError, match="directory"):
        read_text(tmp_path)
