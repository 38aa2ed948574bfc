"""What subcommands share: options, the requests made from them, and the frame that they run in.

The options of pruning are in `thanos_deploy.cli._pruning`.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from thanos_deploy.bundle.codec import encode
from thanos_deploy.calibration.data import Data
from thanos_deploy.cli import _progress
from thanos_deploy.cli._types import CountsType, F, several, with_default
from thanos_deploy.stages.request import PruneRequest

if TYPE_CHECKING:
    from thanos_deploy.measure.options import BenchRequest, EvalRequest
    from thanos_deploy.progress import Announce

Shown = TypeVar("Shown")

model_argument = click.argument("model")
bundle_argument = click.argument("out", type=click.Path(path_type=Path))
out_option = click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the bundle."
)
session_options = several(
    click.option("--offline", is_flag=True, help="Use no network: models from the local cache."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
    click.option("-q", "--quiet", is_flag=True, help="No progress."),
    click.option("-v", "--verbose", is_flag=True, help="Log every block."),
)
common_options = several(
    click.option(
        "--overwrite/--resume",
        default=False,
        help="Redo the stages that were made with other options, or keep what is finished "
        "and refuse other options.  [default: resume]",
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
    help="Check everything and say what would be done, and what time, memory and disk it takes.",
)
text_field_option = with_default(Data, "text_field")
device_option = with_default(PruneRequest, "device")


def evaluation_options(*, short: bool = False) -> Callable[[F], F]:
    """The text of an evaluation and how much of it; with short names too where nothing has them."""

    def names(name: str) -> list[str]:
        return [f"--eval-{name}", *([f"--{name}"] if short else []), f"eval_{name}"]

    return several(
        click.option(
            *names("text"),
            default="builtin",
            show_default=True,
            help="Text for perplexity: a file, or the part of the built-in text that calibration "
            "never sees.",
        ),
        click.option(
            *names("segments"), default=12, show_default=True, help="Segments of evaluation text."
        ),
        click.option(*names("seqlen"), default=1024, show_default=True, help="Tokens of each."),
    )


benchmark_options = several(
    click.option(
        "--batch",
        "batches",
        type=CountsType(),
        multiple=True,
        help="Sequences at once: 1,8.  [default: 1]",
    ),
    click.option(
        "--prompt",
        "prompts",
        type=CountsType(),
        multiple=True,
        help="Tokens of each timed prompt: 32,128.  [default: 128; of bench: 32,128]",
    ),
    click.option(
        "--past",
        "pasts",
        type=CountsType(),
        multiple=True,
        help="Tokens before the timed steps of decode: 128,1024.  [default: those of --prompt if "
        "given, else 128; of bench: 128,512]",
    ),
    click.option(
        "--new-tokens",
        type=click.IntRange(min=2),
        help="Steps of decode, tokens of an answer.  [default: 16]",
    ),
    click.option(
        "--rounds",
        type=click.IntRange(min=2),
        help="Timed rounds of each model.  [default: 20; of bench: 10]",
    ),
    click.option(
        "--sample-prompt",
        help="Prompt of the sample text.  [default: The capital of France is]",
    ),
)


def eval_request(options: dict[str, Any]) -> "EvalRequest":
    """What `evaluation_options` ask for."""
    from thanos_deploy.measure.options import EvalRequest

    return EvalRequest(
        text=options["eval_text"],
        text_field=options["text_field"],
        segments=options["eval_segments"],
        seqlen=options["eval_seqlen"],
        device=options["device"],
    )


def bench_request(options: dict[str, Any], **defaults: Any) -> "BenchRequest":
    """What `benchmark_options` ask for, and options of `bench` that are called like its fields.

    Args:
        options: of the command; what was not given is None or empty.
        defaults: where they differ from the request's own.
    """
    from thanos_deploy.measure.options import BenchRequest

    grids = ("batches", "prompts", "pasts")
    given = {
        field.name: options[field.name]
        for field in fields(BenchRequest)
        if options.get(field.name) not in (None, ())
    }
    flat: dict[str, Any] = {name: tuple(chain(*given[name])) for name in grids if name in given}
    if "prompts" in flat:
        flat = {"pasts": None, **flat}
    return BenchRequest(**{**defaults, **given, **flat})


@contextmanager
def session(options: dict[str, Any]) -> "Iterator[Announce]":
    """What every command that works needs: quiet libraries, logging, progress."""
    if options["offline"]:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("thanos_deploy").setLevel(
        logging.INFO if options["verbose"] else logging.WARNING
    )
    _progress.quiet_libraries()
    with _progress.announcer(quiet=options["quiet"]) as announce:
        yield announce


def emit(options: dict[str, Any], value: Shown, show: "Callable[[Shown], None]") -> None:
    """Print a record, or what is JSON already, for people or as JSON."""
    if options["as_json"]:
        click.echo(json.dumps(encode(value), indent=2, allow_nan=False))
    else:
        show(value)
