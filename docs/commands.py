"""The reference of commands, generated from the click commands."""

import inspect
import re
from collections.abc import Iterator

import click

from thanos_deploy.cli import cli

NAME = "thanos-deploy"
_VERBATIM = "\b\n"  # click's marker for a paragraph that it must not rewrap

_HEAD = f"""# Commands

This page is written by `python -m docs.generate` from the same text as `{NAME} COMMAND --help`.
"""


def page() -> str:
    """Return the text of reference/commands.md."""
    commands = [(name, cli.commands[name]) for name in sorted(cli.commands)]
    table = ["| command | what it does |", "|---|---|"]
    for name, command in commands:
        table.append(f"| [`{name}`](#{NAME}-{name}) | {_plain(command.get_short_help_str(200))} |")
    parts = [_HEAD, *_help(cli), "\n".join(table) + "\n"]
    for name, command in commands:
        parts += section(name, command)
    return "\n".join(parts)


def section(name: str, command: click.Command) -> Iterator[str]:
    """Yield heading, usage, help and options of one command."""
    context = click.Context(command, info_name=f"{NAME} {name}")
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"## {NAME} {name}\n"
    yield f"```text\n{NAME} {name} {usage}\n```\n"
    yield from _help(command)
    options = [one for one in command.params if isinstance(one, click.Option)]
    records = [record for one in options if (record := one.get_help_record(context))]
    yield "\n".join(f"- `{names}`: {_plain(text)}" for names, text in records) + "\n"


def paragraphs(command: click.Command) -> list[tuple[bool, str]]:
    """Return the paragraphs of a command's help: whether to keep the line breaks, and the text."""
    found = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(command.help or "")):
        verbatim = paragraph.startswith(_VERBATIM)
        text = paragraph.removeprefix(_VERBATIM) if verbatim else " ".join(paragraph.split())
        found.append((verbatim, text))
    return found


def _help(command: click.Command) -> Iterator[str]:
    for verbatim, text in paragraphs(command):
        yield f"```text\n{text}\n```\n" if verbatim else f"{_plain(text)}\n"


def _plain(text: str) -> str:
    """Escape a text for Markdown, except for code between backticks."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(
        part if part.startswith("`") else re.sub(r"([*<|])", r"\\\1", part) for part in parts
    )
