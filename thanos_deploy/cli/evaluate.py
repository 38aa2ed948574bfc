"""`thanos-deploy eval`: measure perplexity or task scores of a checkpoint or an exported graph."""

from contextlib import nullcontext, redirect_stderr
from io import StringIO
from typing import TYPE_CHECKING, Any

import click

import thanos_deploy as td
from thanos_deploy.cli._options import (
    common_options,
    device_option,
    emit,
    evaluation_options,
    given,
    progress_callback,
    revision_option,
    session,
    text_field_option,
)
from thanos_deploy.cli._types import several

if TYPE_CHECKING:
    from thanos_deploy.measure.quality import Compared, TaskQuality, TextQuality

_evaluated_options = several(
    click.argument("model"),
    click.option(
        "--dense",
        metavar="MODEL",
        help="The dense model that the bundle was made from. It is measured too, and both results "
        "are kept in the bundle.",
    ),
    click.option(
        "--runtime",
        type=click.Choice(["torch", "onnx", "vllm"]),
        default="torch",
        show_default=True,
        help="torch runs the checkpoint in PyTorch; onnx runs the exported graph in ONNX "
        "Runtime, in the dtype of the export; vllm measures the model that the server at "
        "--url runs.",
    ),
    click.option(
        "--url",
        help="vllm: address of a running `vllm serve` that has the model, such as "
        "http://127.0.0.1:8000.",
    ),
    revision_option,
    device_option,
    text_field_option,
    evaluation_options(short=True),
    click.option(
        "--tasks",
        metavar="NAME[,NAME...]",
        help="Tasks of lm-evaluation-harness to run zero-shot, instead of measuring "
        "perplexity; most tasks download their data from a hub.",
    ),
    click.option(
        "--task-folder",
        metavar="DIR",
        help="Folder with task files of your own. A task file can name Python code, and that code "
        "is run.",
    ),
    click.option(
        "--limit",
        type=click.IntRange(min=1),
        help="Largest number of examples of each task.  [default: all]",
    ),
)


@click.command("eval")
@_evaluated_options
@common_options
def command(
    model: str, dense: str | None, tasks: str | None, overwrite: bool, **options: Any
) -> None:
    """Measure the quality of MODEL, which may be a bundle.

    A bundle keeps one evaluation of each kind (perplexity or tasks, of the checkpoint or of the
    graph), together with the dense model's. --overwrite replaces it when the text or tasks change.
    """
    # The harness offers no switch for its progress bars.
    hushed = redirect_stderr(StringIO()) if tasks and options["quiet"] else nullcontext()
    with session(options) as announce, hushed:
        from thanos_deploy.cli._tables import show_quality

        asked: dict[str, Any] = {**given(options), "progress": progress_callback(announce)}
        if tasks is not None:
            asked["tasks"] = tasks.split(",")
        result: TextQuality | TaskQuality | Compared[TextQuality] | Compared[TaskQuality]
        if dense is None:
            result = td.evaluate(model, **asked)
        elif options["runtime"] == "vllm":
            raise td.UsageError(
                "--dense with --runtime vllm: a server runs only one model",
                fix="measure the two models one after the other, each without --dense",
            )
        else:
            result = td.Bundle(model).evaluate(dense, overwrite=overwrite, **asked)
    emit(options, result, show_quality)
