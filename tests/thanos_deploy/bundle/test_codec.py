"""Records as JSON and back: nothing lost, nothing accepted that was not meant."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thanos_deploy.bundle.codec import (
    LATER,
    OTHERS,
    UnknownFormatError,
    called,
    decode,
    decode_format,
    encode,
    loads,
)


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Whole:
    kind: Literal["a", "b"]
    on: bool
    count: int
    share: float
    place: Path
    parts: tuple[Part, ...]
    by_name: Mapping[str, Part | None]
    names: Sequence[str]
    by_number: Mapping[int, Mapping[int, float]]
    limit: int | float | str | None = None
    added: int | None = field(default=None, metadata=LATER)


texts = st.text(max_size=5)
parts = st.builds(Part, texts, st.tuples(st.integers(), st.integers()))
wholes = st.builds(
    Whole,
    st.sampled_from(("a", "b")),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.sampled_from((Path("a"), Path("a/b"), Path("/"))),
    st.lists(parts, max_size=3).map(tuple),
    st.dictionaries(texts, parts | st.none(), max_size=3),
    st.lists(texts, max_size=3).map(tuple),
    st.dictionaries(st.integers(), st.dictionaries(st.integers(), st.floats(allow_nan=False))),
    st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    st.none() | st.integers(),
)

WHOLE = Whole("a", True, 3, 0.5, Path("x"), (Part("p", (1, 2)),), {"k": None}, (), {})


@given(wholes)
def test_what_is_written_is_read_again(whole: Whole) -> None:
    text = json.dumps(encode(whole), allow_nan=False)
    again = decode(Whole, json.loads(text))
    assert again == whole
    assert type(again.limit) is type(whole.limit)


def test_a_field_that_came_later_is_not_written_while_it_has_its_default() -> None:
    assert "added" not in encode(WHOLE)
    assert "limit" in encode(WHOLE)
    assert encode(replace(WHOLE, added=3))["added"] == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": 1.5}, "count is '1.5'"),
        ({"count": True}, "count is 'True'"),
        ({"on": 1}, "on is '1'"),
        ({"kind": "c"}, "kind is 'c'"),
        ({"share": "0.5"}, "share is '0.5'"),
        ({"limit": []}, r"limit is '\[\]'"),
        ({"parts": [{"name": "p", "size": [1, 2, 3]}]}, r"parts\[0\].size is"),
        ({"parts": [{"name": "p"}]}, r"parts\[0\].size is missing"),
        ({"parts": [3]}, r"parts\[0\] is '3'"),
        (
            {"by_name": {"k": {"name": "p", "size": [1, 2], "x": 0}}},
            "by_name.k.x is not a known field",
        ),
        ({"names": ["a", 3]}, r"names\[1\] is '3'"),
        ({"by_number": {"3": {"1.5": 0.0}}}, "a key of by_number.3 is '1.5'"),
        ({"more": 1}, "more is not a known field"),
    ],
    ids=str,
)
def test_what_is_not_meant_is_refused_with_its_place(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decode(Whole, {**encode(WHOLE), **change})


def test_a_missing_field_and_what_is_no_record_are_refused() -> None:
    broken = encode(WHOLE)
    del broken["count"]
    with pytest.raises(ValueError, match="count is missing"):
        decode(Whole, broken)
    with pytest.raises(ValueError, match=r"the record is '\[\]'"):
        decode(Whole, [])


def test_numbers_that_json_lacks_are_written_by_name() -> None:
    written = encode(replace(WHOLE, share=float("-inf")))
    assert written["share"] == "-inf"
    assert decode(Whole, written).share == float("-inf")


def test_a_number_that_is_too_large_is_not_one() -> None:
    with pytest.raises(ValueError, match="share is '1000"):
        decode(Whole, {**encode(WHOLE), "share": 10**400})


@dataclass(frozen=True, slots=True)
class Open:
    name: str = field(metadata=called("full-name"))
    others: Mapping[str, int | str] = field(default_factory=dict, metadata=OTHERS)


def test_a_record_can_take_entries_that_it_does_not_name() -> None:
    value = {"full-name": "a", "b": 1, "c": "d"}
    read = decode(Open, value)
    assert read == Open("a", {"b": 1, "c": "d"})
    assert encode(read) == value
    with pytest.raises(ValueError, match=r"^b is"):
        decode(Open, {**value, "b": []})
    with pytest.raises(ValueError, match="full-name is missing"):
        decode(Open, {"name": "a"})


def test_a_mapping_of_records_is_read_and_written_as_one() -> None:
    parts = {"one": Part("p", (1, 2))}
    assert encode(parts) == {"one": {"name": "p", "size": [1, 2]}}
    assert decode(dict[str, Part], encode(parts)) == parts


@dataclass(frozen=True, slots=True)
class Versioned:
    format: int
    name: str


def test_a_record_of_another_format_is_told_from_a_damaged_one() -> None:
    assert decode_format(Versioned, {"format": 2, "name": "a"}, 2) == Versioned(2, "a")
    with pytest.raises(UnknownFormatError, match="format 3; this version reads 2"):
        decode_format(Versioned, {"format": 3, "renamed": "a"}, 2)
    with pytest.raises(UnknownFormatError, match="format None"):
        decode_format(Versioned, [], 2)
    with pytest.raises(ValueError, match="name is missing"):
        decode_format(Versioned, {"format": 2}, 2)


def test_json_that_is_nested_too_deeply_is_a_value_error() -> None:
    assert loads(b'{"a": [1]}') == {"a": [1]}
    for content in ("[" * 100_000, '{"a":' * 100_000 + "0" + "}" * 100_000, b"[" * 10_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            loads(content)


# They read what they, or a process of theirs, have written.
OWN = {
    "exporters/llama_cpp.py",
    "runtime/server/template_messages.py",
    "thanos_deploy/bundle/codec.py",
    "thanos_deploy/measure/messages.py",
    "thanos_deploy/ranks/group.py",
}


def test_nothing_else_reads_json_of_others() -> None:
    root = Path(__file__).parents[3]
    found = {
        path.relative_to(root).as_posix()
        for package in ("thanos_deploy", "exporters", "runtime")
        for path in (root / package).rglob("*.py")
        if "json.load" in path.read_text(encoding="utf-8")
    }
    assert found == OWN
