"""`thanos-deploy eval`: perplexity and tasks, dense and pruned, in PyTorch and as exported."""

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
    session,
    text_field_option,
    told,
)
from thanos_deploy.cli._types import several

if TYPE_CHECKING:
    from thanos_deploy.measure.quality import Compared, TaskQuality, TextQuality

_evaluated_options = several(
    click.argument("model"),
    click.option(
        "--dense",
        metavar="MODEL",
        help="The dense model that the bundle was made from: measured too, and both kept in the "
        "bundle.",
    ),
    click.option(
        "--runtime",
        type=click.Choice(["torch", "onnx"]),
        default="torch",
        show_default=True,
        help="What runs the model: PyTorch, or ONNX Runtime the exported graph, in the dtype that "
        "it was exported in.",
    ),
    device_option,
    text_field_option,
    evaluation_options(short=True),
    click.option(
        "--tasks",
        metavar="NAME[,NAME...]",
        help="Tasks of lm-evaluation-harness instead of perplexity, zero-shot; most fetch their "
        "data from a hub.",
    ),
    click.option(
        "--task-folder",
        metavar="DIR",
        help="Folder with task files that the harness does not have. They can name Python code "
        "that is run.",
    ),
    click.option(
        "--limit", type=click.IntRange(min=1), help="Examples of each task.  [default: all]"
    ),
)


@click.command("eval")
@_evaluated_options
@common_options
def command(
    model: str, dense: str | None, tasks: str | None, overwrite: bool, **options: Any
) -> None:
    """Measure the quality of MODEL, which may be a bundle.

    A bundle holds one evaluation of each kind (perplexity or tasks, of the checkpoint or of the
    graph), beside the dense model's; --overwrite replaces it by one on another text or other tasks.
    """
    # The harness offers no switch for its progress bars.
    hushed = redirect_stderr(StringIO()) if tasks and options["quiet"] else nullcontext()
    with session(options) as announce, hushed:
        from thanos_deploy.cli._tables import show_quality

        asked: dict[str, Any] = {**given(options), "progress": told(announce)}
        if tasks is not None:
            asked["tasks"] = tasks.split(",")
        result: TextQuality | TaskQuality | Compared[TextQuality] | Compared[TaskQuality]
        if dense is None:
            result = td.evaluate(model, **asked)
        else:
            result = td.Bundle(model).evaluate(dense, overwrite=overwrite, **asked)
    emit(options, result, show_quality)
