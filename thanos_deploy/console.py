"""What a person at a terminal sees: progress, tables, errors. Standard error, except for tables."""

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from thanos_deploy.artifact import Json
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.report.figures import figures, shown, shown_ratio

# Without a terminal, a line at most so often.
_SECONDS_BETWEEN_LINES = 10.0

_errors = Console(stderr=True)


def quiet_libraries() -> None:
    """Keep the libraries' own bars, notes and warnings off the user's terminal."""
    import torch  # noqa: F401 - importing it sets up its loggers, so it has to come first
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


class Announcer:
    """Shows the pieces of work one after the other, each with a bar and the time it still takes."""

    def __init__(self, bars: Progress | None, *, quiet: bool) -> None:
        self._bars = bars
        self._quiet = quiet

    def __call__(self, title: str) -> OnProgress:
        """Start a piece of work; see `pipeline.Announce`."""
        if self._quiet:
            return silent
        return self._lines(title) if self._bars is None else self._bar(self._bars, title)

    def _bar(self, bars: Progress, title: str) -> OnProgress:
        task = bars.add_task(title, total=None)

        def on_progress(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        return on_progress

    def _lines(self, title: str) -> OnProgress:
        started = last = time.monotonic()

        def on_progress(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if 0 < done < total and now - last < _SECONDS_BETWEEN_LINES:
                return
            last = now
            spent = now - started
            left = f", {spent / done * (total - done):.0f} s left" if 0 < done < total else ""
            print(f"{title}: {done}/{total}, {spent:.0f} s{left}", file=sys.stderr, flush=True)

        return on_progress


@contextmanager
def announcer(*, quiet: bool) -> Iterator[Announcer]:
    """Progress on standard error: bars on a terminal, else a line now and then."""
    if quiet or not _errors.is_terminal:
        yield Announcer(None, quiet=quiet)
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=_errors,
    ) as bars:
        yield Announcer(bars, quiet=False)


def show_report(report: Json) -> None:
    """Print a report's figures; of one model its verdict and texts too, of several the headline."""
    console = Console()
    for model in report["models"]:
        table = Table(title=f"{model['source']['name']}, {model['label']} with {model['method']}")
        table.add_column("")
        for name in ("dense", "pruned", "pruned / dense"):
            table.add_column(name, justify="right")
        for figure in figures(model):
            table.add_row(
                figure.title,
                shown(figure.dense, figure.unit),
                shown(figure.pruned, figure.unit),
                shown_ratio(figure),
            )
        if widths := model["widths"]:
            before, after = (widths[f"block_parameters_{when}"] for when in ("before", "after"))
            table.add_row(
                "parameters of the blocks, M",
                *(f"{number / 1e6:.1f}" for number in (before, after)),
                f"{after / before:.3f}",
            )
        else:
            table.add_row("zeros in linear layers", "", f"{model['linear_layers']['sparsity']:.2%}")
        if export := model["export"]:
            table.add_row("ONNX against PyTorch", "", f"{export['parity']['worst']:.1e}")
        console.print(table)
    for notice in report["notices"]:
        console.print(notice, style="bold red", highlight=False, markup=False)
    if len(report["models"]) > 1:
        console.print(report["headline"], highlight=False, markup=False)
        return
    (model,) = report["models"]
    for sentence in model["verdict"]:
        console.print(f"• {sentence}", highlight=False, markup=False)
    missing = "; ".join(f"{entry['what']}: {entry['why']}" for entry in model["not_measured"])
    console.print(f"Not measured: {missing}.", style="dim", highlight=False, markup=False)
    sample = model["sample"] or {}
    for who, text in sample.items():
        if who != "prompt":
            console.print(f"\n[{who}] {sample['prompt']}{text}", highlight=False, markup=False)


def show_parity(result: Json) -> None:
    """Print how far ONNX Runtime and PyTorch are apart."""
    table = Table(title=f"ONNX Runtime against PyTorch, limit {result['parity_limit']:g}")
    for name in ("case", "batch", "past", "sequence", "logits", "kv cache"):
        table.add_column(name)
    for case in result["parity"]:
        table.add_row(
            case["name"],
            *(str(case[name]) for name in ("batch", "past", "sequence")),
            *(f"{case[name]:.1e}" for name in ("logits_error", "cache_error")),
        )
    Console().print(table)


def show_values(values: Json) -> None:
    """Print a flat JSON value as a two-column table."""
    table = Table(show_header=False)
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items() if entry != "")
        table.add_row(
            name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)
        )
    Console().print(table)


def show_plan(plan: Json) -> None:
    """Print what is or would be pruned; for a shrunk model with the widths of its blocks."""
    values = dict(plan)
    widths = values.pop("widths", None)
    if widths is not None:
        table = Table(title="What stays of each block")
        for name in ("block", "heads", "kv heads", "channels", "parameters", "predicted loss"):
            table.add_column(name, justify="right")
        for index, block in enumerate(widths["blocks"]):
            before, after = block["before"], block["after"]
            table.add_row(
                str(index),
                *(f"{after[part]} of {before[part]}" for part in ("heads", "kv_heads", "channels")),
                f"{block['parameters_after']:,} of {block['parameters_before']:,}",
                f"{block['predicted_loss']:.4f}",
            )
        Console().print(table)
        values["removed of the blocks"] = f"{widths['removed']:.2%}"
        values["loads with stock loaders"] = "yes" if widths["stock_config"] else "no, ONNX only"
    show_values(values)


def show_error(message: str) -> None:
    """Print an error."""
    print(f"Error: {message}", file=sys.stderr)
