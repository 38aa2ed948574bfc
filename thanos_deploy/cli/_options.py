"""Shared by the subcommands: options, their conversion to arguments of the API, and the session.

The options of pruning are in `thanos_deploy.cli._pruning`.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from thanos_deploy.bundle.codec import encode
from thanos_deploy.calibration.data import Data
from thanos_deploy.cli import _progress
from thanos_deploy.cli._processes import may_print, run_in_processes
from thanos_deploy.cli._types import CountsType, F, several, with_default
from thanos_deploy.stages.request import PruneRequest

if TYPE_CHECKING:
    from thanos_deploy.api.options import Progress
    from thanos_deploy.progress import Announce, OnProgress

Shown = TypeVar("Shown")

model_argument = click.argument("model")
bundle_argument = click.argument("out", type=click.Path(path_type=Path))
out_option = click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the bundle."
)
session_options = several(
    click.option(
        "--offline", is_flag=True, help="Do not use the network; take models from the local cache."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
    click.option("-q", "--quiet", is_flag=True, help="Show no progress."),
    click.option(
        "-v", "--verbose", is_flag=True, help="Also log details, such as the error of every block."
    ),
)
# Options that concern the terminal or the process, and not the Python API.
_SESSION = ("offline", "as_json", "quiet", "verbose", "processes")

common_options = several(
    click.option(
        "--overwrite/--resume",
        default=False,
        help="What to do with stages that were made with other options: run them again, or "
        "keep them and stop with an error.  [default: resume]",
    ),
    session_options,
)
dense_option = click.option(
    "--dense", metavar="MODEL", required=True, help="The dense model that OUT was made from."
)
revision_option = click.option("--revision", help="Branch, tag or commit of a hub model.")
dry_run_option = click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything, and print what would be done and the time, memory and disk it takes.",
)
text_field_option = with_default(Data, "text_field")
device_option = with_default(PruneRequest, "device")


def evaluation_options(*, short: bool = False) -> Callable[[F], F]:
    """Return the options for the evaluation text and its length.

    Args:
        short: add short names, such as --text for --eval-text.
    """

    def names(name: str) -> list[str]:
        return [f"--eval-{name}", *([f"--{name}", name] if short else [])]

    return several(
        click.option(
            *names("text"),
            default="builtin",
            show_default=True,
            help="Text to measure quality on: a file, or the part of the built-in text that "
            "calibration never sees.",
        ),
        click.option(
            *names("segments"), default=12, show_default=True, help="Segments of evaluation text."
        ),
        click.option(
            *names("seqlen"), default=1024, show_default=True, help="Tokens in each segment."
        ),
        click.option(
            *names("questions"),
            type=click.IntRange(min=0),
            default=100,
            show_default=True,
            help="Largest number of multiple-choice questions to make from these segments; 0 "
            "for none.",
        ),
    )


benchmark_options = several(
    click.option(
        "--batch",
        type=CountsType(),
        multiple=True,
        help="Batch sizes, such as 1,8.  [default: 1]",
    ),
    click.option(
        "--prompt",
        type=CountsType(),
        multiple=True,
        help="Tokens in each timed prompt, such as 32,128.  [default: 128; bench: 32,128]",
    ),
    click.option(
        "--past",
        type=CountsType(),
        multiple=True,
        help="Tokens in the KV cache before the timed decode steps, such as 128,1024.  "
        "[default: those of --prompt if given, else 128; bench: 128,512]",
    ),
    click.option(
        "--new-tokens",
        type=click.IntRange(min=2),
        help="Number of decode steps, and of tokens in each answer.  [default: 16]",
    ),
    click.option(
        "--rounds",
        type=click.IntRange(min=2),
        help="Timed rounds of each model.  [default: 20; bench: 10]",
    ),
    click.option(
        "--sample-prompt",
        help="Prompt of the sample text.  [default: The capital of France is]",
    ),
)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given as keyword arguments for the Python API.

    Args:
        options: all options of the command, by the names of the API's arguments; an option that
            was not given is None or empty.
    """
    return {
        name: _flat(value)
        for name, value in options.items()
        if name not in _SESSION and value not in (None, ())
    }


def _flat(value: Any) -> Any:
    """Join the values of an option that takes a list of numbers and may be repeated."""
    if isinstance(value, tuple) and isinstance(value[0], tuple):
        return tuple(chain(*value))
    return value


@contextmanager
def session(options: dict[str, Any]) -> "Iterator[Announce]":
    """Set up offline mode, processes, logging and progress for the work of a command."""
    if options["offline"]:
        os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported
    run_in_processes(options.get("processes"))
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    level = logging.INFO if options["verbose"] else logging.WARNING
    logging.getLogger("thanos_deploy").setLevel(level if may_print() else logging.ERROR)
    _progress.quiet_libraries()
    with _progress.announcer(quiet=options["quiet"] or not may_print()) as announce:
        yield announce


def progress_callback(announce: "Announce") -> "Progress":
    """Return a progress callback for the Python API that shows progress through `announce`."""
    under_way: dict[str, OnProgress] = {}

    def progress(title: str, done: int, total: int) -> None:
        if done == 0 or title not in under_way:
            under_way[title] = announce(title)
        under_way[title](done, total)

    return progress


def emit(options: dict[str, Any], value: Shown, show: "Callable[[Shown], None]") -> None:
    """Print a result with `show`, or as JSON if --json was given."""
    if options["as_json"]:
        click.echo(json.dumps(encode(value), indent=2, allow_nan=False))
    else:
        show(value)
