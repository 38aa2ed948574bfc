"""Where the standard output goes: a pipe that nobody reads, and encodings that lack characters."""

import io
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import pytest

from tests.conftest import PRUNED
from thanos_deploy import cli
from thanos_deploy.cli._pruning_tables import show_pruned
from thanos_deploy.pruning.result import PartBytes, Recovery


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


def test_what_was_pruned_is_printed_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"embeddings": 3_000_000, "attention": 5_000_000, "head": 0}
    show_pruned(
        replace(
            PRUNED,
            patterns={"2:4": 13, "dense": 1},
            recovery=Recovery((0.5, 0.25), 2048, "bf16", 3.0),
            parts=PartBytes(sizes, sizes | {"attention": 2_500_000}),
            solve_seconds=1.5,
        )
    )
    said = " ".join(capsys.readouterr().out.split())
    for row in (
        "layers by pattern │ 2:4: 13, dense: 1",
        "pattern holds │ yes",
        "trained on │ 2,048 tokens in bf16, 3 s",
        "weights, MB │ 5.5 (dense: 8.0)",
        "attention, MB │ 2.5 (dense: 5.0)",
        "seconds │ solve 1.5",
    ):
        assert f"│ {row} │" in said
    assert not any(python in said for python in ("{", "None", "True", "head"))
