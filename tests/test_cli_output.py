"""Where the standard output goes: a pipe that nobody reads, and encodings that lack characters."""

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from thanos_deploy import cli


@pytest.fixture
def _spam(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command that prints for ever, or until nobody reads."""

    @click.command("spam")
    def spam() -> None:
        while True:
            click.echo("more")

    cli.cli.add_command(spam)
    monkeypatch.setattr(sys, "argv", ["thanos-deploy", "spam"])
    yield
    del cli.cli.commands["spam"]


@pytest.mark.usefixtures("_spam")
def test_a_pipe_that_nobody_reads_ends_the_command_quietly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert cli._run() == 141
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("_spam")
def test_another_pipe_that_breaks_is_not_taken_for_the_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lose(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(click, "echo", lose)
    with open(os.devnull, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert cli._run() == 1


def test_what_an_encoding_lacks_is_escaped(
    monkeypatch: pytest.MonkeyPatch, exported_llama: Path
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    monkeypatch.setattr(sys, "argv", ["thanos-deploy", "generate", str(exported_llama), "a"])
    monkeypatch.setattr("thanos_deploy.api.bundle.Bundle.generate", say)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    sys.stdout.flush()
    assert ended.value.code == 0
    assert raw.getvalue() == b"na\xefve \\u2603\n"


def say(_: object, prompt: str, on_text: object = None, **options: object) -> str:
    assert callable(on_text)
    on_text("na\xefve \u2603")
    return ""
