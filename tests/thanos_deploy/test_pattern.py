import pytest
from hypothesis import given
from hypothesis import strategies as st

from thanos_deploy.errors import PatternError
from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured, parse

fractions = st.floats(0.0, 1.0)
patterns = st.one_of(
    st.builds(Unstructured, fractions),
    st.builds(Structured, fractions),
    st.integers(2, 64).flatmap(
        lambda group: st.builds(SemiStructured, st.integers(1, group - 1), st.just(group))
    ),
)


@given(patterns)
def test_parse_and_str_are_inverses(pattern: Pattern) -> None:
    assert parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", SemiStructured(2, 4)),
        ("1:4", SemiStructured(1, 4)),
        ("unstructured:0.5", Unstructured(0.5)),
        ("structured:.3", Structured(0.3)),
    ],
)
def test_spellings(text: str, pattern: Pattern) -> None:
    assert parse(text) == pattern


def test_one_of_four_keeps_one_and_removes_three() -> None:
    assert parse("1:4").sparsity == 0.75


@pytest.mark.parametrize(
    "text",
    [
        *("2:5x", "5:4", "0:4", "4:4", "2:0", "", ":", "2", "2:4:8", "-2:4", " 2:4", "2.0:4"),
        *("unstructured", "unstructured:", "unstructured:x", "unstructured:1.1"),
        *("structured:-0.1", "unstructured:nan", "dense", "99999999999999999999:4"),
    ],
)
def test_anything_else_is_an_error_that_says_what_to_write(text: str) -> None:
    with pytest.raises(PatternError) as caught:
        parse(text)
    assert caught.value.fix
    assert caught.value.exit_code == 2
