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
    """Print a report as a table, its verdict and the sample texts."""
    console = Console()
    quality, size, latency = report["quality"], report["bytes"], report["latency"]
    memory, sample = report["peak_memory_bytes"], report["sample"]
    table = Table(title=f"{report['source']['name']}, {report['pattern']} with {report['method']}")
    table.add_column("")
    for name in ("dense", "pruned", "pruned / dense"):
        table.add_column(name, justify="right")

    def row(title: str, dense: float, pruned: float, digits: int = 1) -> None:
        table.add_row(title, f"{dense:.{digits}f}", f"{pruned:.{digits}f}", f"{pruned / dense:.3f}")

    row("perplexity", quality["dense"], quality["pruned"], 2)
    for name, title in (
        ("model", "checkpoint, MB"),
        ("packed", "packed checkpoint, MB"),
        ("onnx", "ONNX, MB"),
    ):
        if name not in size:
            continue
        row(title, size[name]["dense"] / 1e6, size[name]["pruned"] / 1e6)
    for what, tokens in (("prefill", latency["prompt"]), ("decode", 1)):
        for figure in ("median", "p90", "p99"):
            row(
                f"{what} {latency['batch']}x{tokens} {figure}, ms",
                latency["dense"][what][figure] * 1e3,
                latency["pruned"][what][figure] * 1e3,
            )
    row("peak memory, MB", memory["dense"] / 1e6, memory["pruned"] / 1e6)
    if widths := report["widths"]:
        row(
            "parameters of the blocks, M",
            *(widths[f"block_parameters_{when}"] / 1e6 for when in ("before", "after")),
        )
    else:
        zeros = report["linear_layers"]["sparsity"]
        table.add_row("zeros in linear layers", "", f"{zeros:.2%}", "")
    table.add_row("ONNX against PyTorch", "", f"{report['parity']['worst']:.1e}", "")
    console.print(table)
    environment = report["environment"]
    console.print(
        f"Latency and memory: {latency['backend']}, {environment['cores']} cores of "
        f"{environment['processor']}; in turns, each model in a process of its own. "
        f"Perplexity: {quality['text']}. GPU: {latency['gpu']}.",
        style="dim",
        highlight=False,
    )
    for sentence in report["verdict"]:
        console.print(f"• {sentence}", highlight=False, markup=False)
    for who in ("dense", "pruned"):
        console.print(f"\n[{who}] {sample['prompt']}{sample[who]}", highlight=False, markup=False)


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


def show_forecast(forecast: Json, *, layers: bool) -> None:
    """Print a forecast and what it means; with every layer if asked for."""
    console = Console()
    names = list(forecast["block_parameters"])
    title = (
        f"{forecast['gpu']['product']}, {forecast['dtype']}, prompt {forecast['prompt']}, "
        f"{forecast['new_tokens']} new tokens: forecast, ms"
    )
    table = Table(title=title)
    for name in ("batch", "", *names):
        table.add_column(name, justify="right")
    for step in forecast["passes"]:
        for phase, times in step["seconds"].items():
            dense = times["dense"]["likely"]
            table.add_row(
                str(step["batch"]),
                "decode, a token" if phase == "decode" else phase,
                *(_forecast_cell(times[name], dense) for name in names),
            )
        memory = (
            f"{step['memory_bytes'][name] / 1e9:.1f}" + ("" if step["fits"][name] else " too much")
            for name in names
        )
        table.add_row(str(step["batch"]), "memory, GB", *memory, end_section=True)
    console.print(table)
    if layers:
        for step in forecast["passes"]:
            for phase, found in step["layers"].items():
                console.print(_layer_table(f"{phase}, batch {step['batch']}, ms", found))
    for sentence in forecast["verdict"]:
        console.print(f"• {sentence}", highlight=False, markup=False)
    origin = f"Roofline of the figures in {forecast['gpu']['source']}"
    if count := forecast["measured_products"]:
        origin += f"; {count} measured matrix products replace it where their sizes are similar"
    console.print(
        f"{origin}. 2:4 likely (at best); benchmarks/LOG.md says how far such forecasts were from "
        "published times.",
        style="dim",
        highlight=False,
    )


def _forecast_cell(time: Json, dense: float) -> str:
    cell = f"{time['likely'] * 1e3:.2f}"
    if time["likely"] != dense:
        cell += f", {dense / time['likely']:.2f}x"
    if time["best"] < time["likely"]:
        cell += f" ({dense / time['best']:.2f}x)"
    return cell


def _layer_table(title: str, found: Json) -> Table:
    names = list(found)
    table = Table(title=title)
    for name in ("layer", "of the dense: m x n x k", "bound by", *names):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for rows in zip(*found.values(), strict=True):
        first = rows[0]
        table.add_row(
            f"{first['name']} ({first['times']})",
            "" if first["shape"] is None else " x ".join(map(str, first["shape"])),
            f"{first['bound']}, measured" if first["measured"] else first["bound"],
            *(_forecast_cell(row, first["likely"]) for row in rows),
        )
    return table


def show_error(message: str) -> None:
    """Print an error."""
    print(f"Error: {message}", file=sys.stderr)
