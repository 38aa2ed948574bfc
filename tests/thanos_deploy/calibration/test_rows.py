"""Rows as people write them: texts, conversations, prompts with completions, in every format."""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thanos_deploy.calibration import mixture
from thanos_deploy.calibration.mixture import DataSet, Part
from thanos_deploy.calibration.texts import Text, read_text
from thanos_deploy.errors import CalibrationError, UsageError

ASKED = {"role": "user", "content": "Why?"}
SAID = {"role": "assistant", "content": "So."}
SHARED = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
WRITTEN = "[user: Why?][assistant: So.]"

# What a row holds, and its text.
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"text": "plain", "messages": [ASKED]}, "plain"),
    "messages": ({"id": 1, "messages": [ASKED, SAID]}, WRITTEN),
    "conversations of ShareGPT": ({"conversations": SHARED}, WRITTEN),
    "conversations with roles": ({"conversations": [ASKED, SAID]}, WRITTEN),
    "messages in the named field": ({"text": [ASKED, SAID]}, WRITTEN),
    "prompt and completion": ({"prompt": "Why? ", "completion": "So."}, "Why? So."),
    "both of messages": ({"prompt": [ASKED], "completion": [SAID]}, WRITTEN),
}


def template(messages: Sequence[Mapping[str, str]]) -> str:
    return "".join(f"[{one['role']}: {one['content']}]" for one in messages)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    lines = "\n".join(map(json.dumps, rows))
    content = (json.dumps(rows, indent=1) if ".json" in path.suffixes else lines).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"])
@pytest.mark.parametrize("kind", ROWS)
def test_a_row_is_read_by_what_it_holds_in_every_format(
    tmp_path: Path, kind: str, name: str
) -> None:
    row, expected = ROWS[kind]
    text = read_text(write(tmp_path / name, [row, row]), template=template)
    assert text.rows == (expected, expected)
    assert text.content == f"{expected}\n\n{expected}"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"messages": [{"role": "user"}]},
            "message 1 has neither the fields role and content.*found role",
        ),
        ({"messages": []}, "no text field 'text'; found messages"),
        ({"messages": [ASKED, {"role": "user", "content": None}]}, "message 2"),
        ({"prompt": "a"}, "no text field 'text'; found prompt"),
        ({"prompt": "a", "completion": None}, "'completion' is null"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_a_row_without_a_text_is_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "a.json", [{"text": "first"}, row])
    with pytest.raises(CalibrationError, match=rf"a\.json, row 2: .*{said}"):
        read_text(path, template=template)


def test_a_conversation_needs_a_chat_template(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"row 1: .*no chat template"):
        read_text(write(tmp_path / "a.json", [{"messages": [ASKED]}]))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'{"text": "x"}', "a single JSON value, not a list"),
        ("a.json", b'{"text": "x"}\n{"text": "y"}', "not JSON"),
        ("a.json", b"[]", "no text"),
        ("a.parquet", b"PAR1 and no more", "not a readable Parquet table"),
    ],
)
def test_what_is_no_list_of_rows_is_refused(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=f"{name}: .*{said}"):
        read_text(tmp_path / name)


def test_rows_are_chosen_by_the_seed() -> None:
    text = Text.of_rows("a", [str(number) for number in range(100)])
    chosen = text.sample(10, 0)
    assert chosen == text.sample(10, 0) != text.sample(10, 1)
    assert len(set(chosen.rows)) == 10
    assert set(chosen.rows) < set(text.rows)
    assert chosen.content.split("\n\n") == list(chosen.rows)
    with pytest.raises(
        CalibrationError, match="101 rows were asked for with --calib-rows, and the text has 100"
    ):
        text.sample(101, 0)
    with pytest.raises(CalibrationError, match="the text has none"):
        Text("plain", "no rows").sample(1, 0)


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("a.txt", [Part("a.txt")]),
        ("3*a.txt + b.txt", [Part("a.txt", weight=3.0), Part("b.txt")]),
        ("0.5*a b.txt", [Part("a b.txt", weight=0.5)]),
        ("hub:a/b", [Part("hub:a/b", DataSet("a/b"))]),
        ("hub:a/b:test", [Part("hub:a/b:test", DataSet("a/b", split="test"))]),
        ("hub:a/b:c:d", [Part("hub:a/b:c:d", DataSet("a/b", "c", "d"))]),
    ],
)
def test_what_calib_names(spelling: str, expected: list[Part]) -> None:
    assert list(mixture.parse(spelling)) == expected


@pytest.mark.parametrize("spelling", ["0*a.txt", "a.txt + ", "hub:", "hub:a:b:c:d", ""])
def test_what_names_nothing_is_refused(spelling: str) -> None:
    with pytest.raises(UsageError):
        mixture.parse(spelling)


def test_a_file_counts_before_a_data_set_and_before_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert mixture.parse("c4")[0].data_set == DataSet(
        "allenai/c4", files="en/c4-train.00000-of-01024.json.gz"
    )
    assert mixture.parse("wikitext", held_out=True)[0].data_set is not None
    for name in ("c4", "2*a + b"):
        Path(name).write_text("x")
        assert mixture.parse(name) == (Part(name),)


def test_the_manifest_has_no_folders(tmp_path: Path) -> None:
    assert mixture.title(str(tmp_path / "a.txt")) == "a.txt"
    assert mixture.title(f"2*{tmp_path / 'a.txt'} + c4") == "2*a.txt + 1*c4"


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    st.integers(0, 300),
)
def test_shares_are_as_near_as_whole_numbers_can_be(weights: list[float], count: int) -> None:
    found = mixture.shares(weights, count)
    assert sum(found) == count
    for share, weight in zip(found, weights, strict=True):
        assert abs(share - count * weight / sum(weights)) < 1 + 1e-9
