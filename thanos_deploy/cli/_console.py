"""What a person at a terminal sees: progress, tables, errors. Standard error, except for tables."""

import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich import box
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

from exporters import target as export
from thanos_deploy.bundle.files import Json
from thanos_deploy.gpu.nvml import NOT_MEASURED
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.report.figures import figures, shown, shown_ratio
from thanos_deploy.report.words import retried

# Without a terminal, a line at most so often.
_SECONDS_BETWEEN_LINES = 10.0

_STYLES = {"PASS": "green", "FAIL": "bold red", "SKIP": "dim"}

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
        """Start a piece of work; see `progress.Announce`."""
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
    missing = "; ".join(
        entry["what"] if entry["why"] == "not measured" else f"{entry['what']}: {entry['why']}"
        for entry in model["not_measured"]
    )
    console.print(f"Not measured: {missing}.", style="dim", highlight=False, markup=False)
    sample = model["sample"] or {}
    for who, text in sample.items():
        if who != "prompt":
            console.print(f"\n[{who}] {sample['prompt']}{text}", highlight=False, markup=False)


def show_bench(run: Json) -> None:
    """Print a run of bench as one table, what it was measured on, its status and its gates."""
    from thanos_deploy.measure.gates import Outcome  # brings numpy, which --help can do without

    console = Console()
    table = Table(
        title=f"run {run['run']}: {run['rounds']} rounds in turns, {run['provider']}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    table.add_column("model", overflow="fold", min_width=6)
    for name in ("median", "p90", f"/ {run['baseline']}", "ceiling"):
        table.add_column(name, justify="right", no_wrap=True)
    for scenario in run["scenarios"]:
        metrics = list(next(iter(scenario["results"].values()))["metrics"])
        if len(metrics) > 1:
            table.add_row(scenario["name"])
        for metric in metrics:
            _add_metric(table, scenario, metric, indent="  " if len(metrics) > 1 else "")
        table.add_section()
    for figure in ("file", "load peak", "steady", "peak", "gpu peak", "cache"):
        _add_memory(table, run, figure)
    console.print(table)
    for line in _circumstances(run):
        console.print(line, style="dim", highlight=False, markup=False)
    console.print(run["status"], style="bold green" if run["status"] == "VALID" else "bold red")
    for line in (*run["reasons"], *(str(Outcome(**gate)) for gate in run["gates"])):
        console.print(f"• {line}", highlight=False, markup=False)


def _add_metric(table: Table, scenario: Json, metric: str, *, indent: str) -> None:
    """A row for every model."""
    for number, (label, result) in enumerate(scenario["results"].items()):
        measured, ratio = result["metrics"][metric], result.get("ratio", {}).get(metric)
        in_seconds = measured["unit"] == "s"
        title = f"{indent or scenario['name']}{metric if indent else ''}".replace("_", " ")
        headline = metric == scenario["headline"] and result["of_ceiling"]
        table.add_row(
            f"{title}, ms" * (number == 0) if in_seconds else title * (number == 0),
            label,
            *(f"{measured[name] * (1e3 if in_seconds else 1):.1f}" for name in ("median", "p90")),
            ratio and f"{ratio['estimate']:.3f} ({ratio['low']:.3f}, {ratio['high']:.3f})",
            f"{result['of_ceiling']:.0%}" if headline else None,
        )


def _add_memory(table: Table, run: Json, figure: str) -> None:
    """A row for every model."""
    per_token = figure == "cache"
    name = "cache_bytes_per_token" if per_token else f"{figure.replace(' ', '_')}_bytes"
    sizes = {label: facts[name] for label, facts in run["subjects"].items()}
    if None in sizes.values():  # of a GPU that is not there, or a system that does not say
        return
    title = "kv cache, kB/token" if per_token else f"{figure}, MB"
    for number, (label, size) in enumerate(sizes.items()):
        baseline = sizes[run["baseline"]]
        table.add_row(
            title * (number == 0),
            label,
            f"{size / (1e3 if per_token else 1e6):.1f}",
            None,
            f"{size / baseline:.3f}" if number else None,
        )


def _circumstances(run: Json) -> Iterator[str]:
    """What a run was measured on, and what its ceilings are made from."""
    environment, machine = run["environment"], run["machine"]
    yield (
        f"threads: {environment['threads']} on {environment['cores']} cores of "
        f"{environment['processor']}; GPU: "
        + (NOT_MEASURED if run["gpu"] is None else str(run["gpu"]["name"]))
    )
    if run["gpu"] and (held := run["gpu"].get("memory_of_all_models")):
        counted = {
            "process": "by process",
            "device": "as what the whole GPU used beyond what it did before, because the driver "
            "does not list these processes by their numbers here",
        }
        yield (
            f"GPU memory: {held['bytes'] / 1e9:.2f} GB for all models together, counted "
            f"{counted[held['by']]}"
        )
    if bandwidth := machine["memory_bandwidth_bytes_per_second"]:
        peaks = ", ".join(
            f"{flops / 1e9:.0f} GFLOP/s in {name}"
            for name, flops in machine["gemm_flops_per_second"].items()
        )
        yield f"ceiling: memory read at {bandwidth / 1e9:.1f} GB/s, matrix product {peaks}"
    for scenario in run["scenarios"]:
        if not scenario["warmup"]["stable"]:
            yield (
                f"{scenario['name']}: not stable yet after {scenario['warmup']['rounds']} rounds "
                "of warm-up"
            )
        if "offered_per_second" in scenario:
            achieved = ", ".join(
                f"{label} {result['achieved_per_second']:.2f}"
                for label, result in scenario["results"].items()
            )
            yield (
                f"{scenario['name']}: offered {scenario['offered_per_second']:.2f} requests a "
                f"second by {scenario['driver']}, answered {achieved}"
            )


def show_table(table: export.Table) -> None:
    """Print what a target says of its export."""
    shown = Table(title=table.title or None, show_header=bool(table.columns))
    for name in table.columns:
        shown.add_column(name)
    for row in table.rows:
        shown.add_row(*row)
    Console().print(shown, markup=False)


def show_checks(checks: Sequence[Json]) -> None:
    """Print a check list, and below it what to do about what failed or was skipped."""
    table = Table(show_edge=False)
    for name in ("", "check", "seen"):
        table.add_column(name, overflow="fold")
    for check in checks:
        table.add_row(
            check["outcome"], check["name"], check["detail"], style=_STYLES[check["outcome"]]
        )
    console = Console()
    console.print(table, markup=False)
    for check in checks:
        if check["fix"]:
            console.print(f"{check['name']}: {check['fix']}", highlight=False, markup=False)


def show_layers(engines: Mapping[str, Sequence[Json]]) -> None:
    """Print what became of every linear layer in every engine."""
    for name, layers in engines.items():
        table = Table(title=name)
        for column in ("layer", "shape", "2:4", "verdict", "why", "in the engine"):
            table.add_column(column, overflow="fold")
        for layer in layers:
            table.add_row(
                layer["name"],
                " x ".join(map(str, layer["shape"])),
                "yes" if layer["pattern_holds"] else "no",
                layer["verdict"],
                layer["reason"],
                layer["engine_layer"],
            )
        Console().print(table, markup=False)


def show_values(values: Json) -> None:
    """Print a flat JSON value as a two-column table."""
    table = Table(show_header=False)
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items() if entry != "")
        if isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        table.add_row(
            name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)
        )
    Console().print(table)


def show_scores(values: Json) -> None:
    """Print the scores of one model in tasks, or of the dense and the pruned one side by side."""
    columns = {"": values} if "scores" in values else values
    table = Table()
    for name in ("task", "metric", "examples"):
        table.add_column(name, justify="left" if name != "examples" else "right")
    for name in columns:
        table.add_column(name, justify="right")
    for row in zip(*(column["scores"] for column in columns.values()), strict=True):
        table.add_row(
            *(row[0]["task"], row[0]["metric"], f"{row[0]['samples']:,}"),
            *(
                f"{score['value']:.4f}"
                + ("" if score["stderr"] is None else f" ± {score['stderr']:.4f}")
                for score in row
            ),
        )
    Console().print(table)


def show_plan(plan: Json) -> None:
    """Print what is or would be pruned; for a shrunk model with the widths of its blocks."""
    values = dict(plan)
    widths, retries = values.pop("widths", None), values.pop("retries", ())
    if estimate := values.pop("estimate", None):
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in estimate["seconds"].items())
        values["estimated seconds"] = f"{estimate['total_seconds']:.0f} ({parts})"
        values["not estimated"] = estimate["not_estimated"]
        values["estimated memory, MB"] = f"{estimate['memory_bytes'] / 1e6:.0f}"
        values["estimated from"] = estimate["basis"]
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
    for retry in retries:
        Console().print(f"{retried(retry)}.", style="bold red", highlight=False, markup=False)


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
    for sentence in (*forecast["verdict"], *forecast["measured"]):
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


def show_note(message: str) -> None:
    """Print what is worth knowing before the work begins."""
    print(f"Note: {message}", file=sys.stderr)


def show_error(message: str) -> None:
    """Print an error."""
    print(f"Error: {message}", file=sys.stderr)
