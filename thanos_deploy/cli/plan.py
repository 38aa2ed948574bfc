"""`thanos-deploy plan`: forecast a model on a GPU, dense and pruned, before renting the GPU."""

from pathlib import Path
from typing import Any

import click

import thanos_deploy as td
from thanos_deploy.cli._options import (
    emit,
    given,
    model_argument,
    progress_callback,
    revision_option,
    session,
    session_options,
)
from thanos_deploy.cli._types import PatternType
from thanos_deploy.forecast import datasheets
from thanos_deploy.pattern import parse


class Integers(click.ParamType[tuple[int, ...]]):
    """A list of positive integers, separated by commas."""

    name = "integers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Parse the numbers; anything else is a usage error."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(number) for number in value.split(","))
        except ValueError:
            numbers = (0,)
        if min(numbers) < 1:
            self.fail(f"{value!r} is not a list of positive whole numbers such as 1,8", param, ctx)
        return numbers


@click.command("plan")
@model_argument
@click.option(
    "--gpu",
    required=True,
    metavar="NAME",
    help=f"GPU to forecast for: {', '.join(gpu.name for gpu in datasheets.GPUS)}.",
)
@click.option(
    "--pattern",
    type=PatternType(),
    multiple=True,
    default=(parse("2:4"), parse("structured:0.25")),
    show_default="2:4 and structured:0.25",
    help="Pattern to compare with the dense model; may be repeated.",
)
@click.option("--batch", type=Integers(), default="1,8", show_default=True, help="Batch sizes.")
@click.option(
    "--prompt",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Tokens in each prompt.",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens to generate after the prompt.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp16", "int8", "fp8"]),
    default="bf16",
    show_default=True,
    help="dtype of the blocks' linear layers.",
)
@click.option(
    "--measured",
    type=click.Path(path_type=Path),
    help="File with times of matrix products that were measured on that GPU, written by "
    "`gpu-check`, by `python -m benchmarks.semi_structured`, or from "
    "benchmarks/results/gpu. If a product of similar size was measured, its time is used "
    "instead of the roofline.  [default: the measurements published with this project, if "
    "they include that GPU]",
)
@click.option(
    "--prune",
    is_flag=True,
    help="Also forecast the time and memory that pruning to 2:4 takes on that GPU, for each "
    "preset.",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="With --prune: number of GPUs that prune together.",
)
@click.option(
    "--nsamples",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="With --prune: number of calibration segments.",
)
@click.option(
    "--seqlen",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="With --prune: tokens in each calibration segment.",
)
@click.option("--layers", is_flag=True, help="Show every layer.")
@revision_option
@session_options
def command(model: str, layers: bool, **options: Any) -> None:
    """Forecast the speed of MODEL on a GPU from the GPU's published figures; no GPU is needed.

    Only the configuration of the model is read; the weights are not needed.

    \b
    thanos-deploy plan MODEL --gpu H100 --pattern 2:4 --pattern structured:0.25
    """  # noqa: D301 - click wants the control character
    with session(options) as announce:
        from thanos_deploy.cli._forecast import show_forecast

        found = td.plan(model, **given(options), progress=progress_callback(announce))
    emit(options, found, lambda value: show_forecast(value, layers=layers))
