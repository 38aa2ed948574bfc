"""Options that are declared by fields."""

from dataclasses import dataclass
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from thanos_deploy.cli._types import if_given
from thanos_deploy.errors import UsageError
from thanos_deploy.option import Options, chosen, keywords, missing, option, options_of


@dataclass(frozen=True, slots=True)
class Example(Options):
    """One option of each kind."""

    count: int = option(4, "--count", "How many.", least=1, most=8)
    share: float | None = option(None, "--a-share", "What part.", above=0.0, below=1.0)
    colour: Literal["red", "blue"] = option("red", "--colour", "Which colour.")
    bold: bool = option(False, "--bold", "In bold.", off="--plain")
    names: tuple[str, ...] = option((), "--name", "A name.", metavar="NAME")


@dataclass(frozen=True)
class Unfinished(Options):
    """Neither of these can be set from a command line."""

    first: int
    second: int = 2


def test_fields_are_found_by_the_keywords_of_their_flags() -> None:
    assert keywords(Example) == {"count", "a_share", "colour", "bold", "name"}
    assert chosen(Example, {"a_share": 0.5, "other": 1}) == {"share": 0.5}
    assert missing(Example) == []
    assert missing(Unfinished) == ["first", "second"]


@pytest.mark.parametrize(
    ("given", "message", "fix"),
    [
        ({"count": 0}, "--count 0 is out of range", "of at least 1 and of at most 8"),
        ({"count": 9}, "--count 9 is out of range", "of at least 1 and of at most 8"),
        ({"share": 0.0}, "--a-share 0 is out of range", "above 0 and below 1"),
        ({"share": 1.0}, "--a-share 1 is out of range", "above 0 and below 1"),
        ({"share": float("nan")}, "--a-share nan is out of range", "above 0 and below 1"),
        ({"colour": "green"}, "--colour 'green' is not one of the possible values", "red, blue"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused(given: dict[str, Any], message: str, fix: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Example(**given)
    assert fix in caught.value.fix


def parsed(*arguments: str) -> tuple[dict[str, Any], str]:
    """What a command with these options gets, and what it prints."""
    got: dict[str, Any] = {}
    command = click.command()(if_given(Example)(lambda **options: got.update(options)))
    return got, CliRunner().invoke(command, arguments).output


def test_the_command_line_reads_what_the_dataclass_takes() -> None:
    got, _ = parsed("--count", "2", "--a-share", "0.5", "--plain", "--name", "a", "--name", "b")
    given = {name: value for name, value in got.items() if value is not None}
    assert Example(**chosen(Example, given)) == Example(2, 0.5, "red", False, ("a", "b"))
    got, _ = parsed()
    assert got == {"count": None, "a_share": None, "colour": None, "bold": None, "name": ()}


@pytest.mark.parametrize(
    "arguments", [("--count", "9"), ("--a-share", "1"), ("--colour", "green")], ids=str
)
def test_the_command_line_refuses_what_the_dataclass_refuses(arguments: tuple[str, ...]) -> None:
    got, output = parsed(*arguments)
    assert not got
    assert f"Invalid value for '{arguments[0]}'" in output


def test_the_help_shows_defaults_and_ranges() -> None:
    words = " ".join(parsed("--help")[1].split())
    assert "How many. [default: 4] [1<=x<=8]" in words
    assert "What part. [0.0<x<1.0]" in words
    assert "--colour [red|blue] Which colour. [default: red]" in words
    assert "--bold / --plain" in words


def test_options_come_in_the_order_of_their_fields() -> None:
    assert [one.name for one in options_of(Example)] == [
        "count",
        "share",
        "colour",
        "bold",
        "names",
    ]
