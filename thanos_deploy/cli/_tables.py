"""Tables and sentences that show results in a terminal, on standard output.

This module imports numpy, so commands import it only when they have something to show.
"""

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from exporters import target
from thanos_deploy.bundle.codec import Json
from thanos_deploy.bundle.engine_record import LayerProof
from thanos_deploy.check import Check
from thanos_deploy.gpu.nvml import NOT_MEASURED
from thanos_deploy.measure.gates import JudgedRun
from thanos_deploy.measure.quality import Answers, Compared, Score, TaskQuality, TextQuality
from thanos_deploy.measure.run import Interval, Run, ScenarioTimes
from thanos_deploy.report.figures import figures, shown, shown_ratio
from thanos_deploy.report.model import ModelReport, Report

_STYLES = {"PASS": "green", "FAIL": "bold red", "SKIP": "dim"}


def show_report(report: Report) -> None:
    """Print the figures and notices of a report.

    A report on one model is printed with its verdict and sample texts, a report on several models
    with its headline.
    """
    console = Console()
    for model in report.models:
        console.print(_figures(model))
    for notice in report.notices:
        show_notice(notice)
    if len(report.models) > 1:
        console.print(report.headline, highlight=False, markup=False)
        return
    (model,) = report.models
    for sentence in model.verdict:
        console.print(f"• {sentence}", highlight=False, markup=False)
    missing = "; ".join(
        gap.what if gap.why == "not measured" else f"{gap.what}: {gap.why}"
        for gap in model.not_measured
    )
    console.print(f"Not measured: {missing}.", style="dim", highlight=False, markup=False)
    if sample := model.sample:
        for who, text in sample.texts.items():
            console.print(f"\n[{who}] {sample.prompt}{text}", highlight=False, markup=False)


def _figures(model: ModelReport) -> Table:
    table = Table(title=f"{model.source.name}, {model.label} with {model.method}")
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
    if widths := model.widths:
        before, after = widths.block_parameters_before, widths.block_parameters_after
        table.add_row(
            "parameters of the blocks, M",
            *(f"{number / 1e6:.1f}" for number in (before, after)),
            f"{after / before:.3f}",
        )
    else:
        table.add_row("zeros in linear layers", "", f"{model.linear_layers.sparsity:.2%}")
    if model.export:
        table.add_row("ONNX against PyTorch", "", f"{model.export.parity.worst:.1e}")
    return table


def show_bench(run: JudgedRun) -> None:
    """Print a benchmark run as a table, with its machine, its status and its gates."""
    console = Console()
    table = Table(
        title=f"run {run.run}: {run.rounds} rounds in turns, {run.provider}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    table.add_column("model", overflow="fold", min_width=6)
    for name in ("median", "p90", f"/ {run.baseline}", "ceiling"):
        table.add_column(name, justify="right", no_wrap=True)
    for scenario in run.scenarios:
        metrics = list(next(iter(scenario.results.values())).metrics)
        if len(metrics) > 1:
            table.add_row(scenario.name)
        for metric in metrics:
            _add_metric(table, scenario, metric, indent="  " if len(metrics) > 1 else "")
        table.add_section()
    for figure in ("file", "load peak", "steady", "peak", "gpu peak", "cache"):
        _add_memory(table, run, figure)
    console.print(table)
    for line in _circumstances(run):
        console.print(line, style="dim", highlight=False, markup=False)
    console.print(run.status, style="bold green" if run.status == "VALID" else "bold red")
    for line in (*run.reasons, *map(str, run.gates)):
        console.print(f"• {line}", highlight=False, markup=False)


def _add_metric(table: Table, scenario: ScenarioTimes, metric: str, *, indent: str) -> None:
    """Add a row for every model with its times in one metric."""
    for number, (label, times) in enumerate(scenario.results.items()):
        measured, ratio = times.metrics[metric], times.ratio.get(metric)
        in_seconds = measured.unit == "s"
        title = f"{indent or scenario.name}{metric if indent else ''}".replace("_", " ")
        of_ceiling = times.of_ceiling if metric == scenario.headline else None
        table.add_row(
            f"{title}, ms" * (number == 0) if in_seconds else title * (number == 0),
            label,
            *(
                f"{value * (1e3 if in_seconds else 1):.1f}"
                for value in (measured.median, measured.p90)
            ),
            f"{ratio.estimate:.3f} ({ratio.low:.3f}, {ratio.high:.3f})" if ratio else None,
            f"{of_ceiling:.0%}" if of_ceiling else None,
        )


def _add_memory(table: Table, run: Run, figure: str) -> None:
    """Add a row for every model with one of its sizes; none if a model lacks it."""
    per_token = figure == "cache"
    name = "cache_bytes_per_token" if per_token else f"{figure.replace(' ', '_')}_bytes"
    sizes = {label: getattr(subject, name) for label, subject in run.subjects.items()}
    if None in sizes.values():  # there is no GPU, or the system does not report it
        return
    title = "KV cache, kB/token" if per_token else f"{figure}, MB"
    for number, (label, size) in enumerate(sizes.items()):
        table.add_row(
            title * (number == 0),
            label,
            f"{size / (1e3 if per_token else 1e6):.1f}",
            None,
            f"{size / sizes[run.baseline]:.3f}" if number else None,
        )


def _circumstances(run: Run) -> Iterator[str]:
    """Yield lines about the machine of a run and about the peak rates behind its ceilings."""
    environment, machine = run.environment, run.machine
    yield (
        f"threads: {environment.threads} on {environment.cores} cores of "
        f"{environment.processor}; GPU: " + (run.gpu.name if run.gpu else NOT_MEASURED)
    )
    if run.gpu and (held := run.gpu.memory_of_all_models):
        counted = (
            "by process"
            if held.by == "process"
            else "as the growth of the memory used on the whole GPU, because the driver does "
            "not list these processes by their process ids here"
        )
        yield (f"GPU memory: {held.bytes / 1e9:.2f} GB for all models together, counted {counted}")
    if bandwidth := machine.memory_bandwidth_bytes_per_second:
        peaks = ", ".join(
            f"{flops / 1e9:.0f} GFLOP/s in {name}"
            for name, flops in machine.gemm_flops_per_second.items()
        )
        yield f"ceiling: memory read at {bandwidth / 1e9:.1f} GB/s, matrix product {peaks}"
    for scenario in run.scenarios:
        if not scenario.warmup.stable:
            yield (
                f"{scenario.name}: not yet stable after {scenario.warmup.rounds} rounds of warm-up"
            )
        if scenario.offered_per_second is not None:
            achieved = ", ".join(
                f"{label} {times.achieved_per_second:.2f}"
                for label, times in scenario.results.items()
            )
            yield (
                f"{scenario.name}: offered {scenario.offered_per_second:.2f} requests a second by "
                f"{scenario.driver}, answered {achieved}"
            )


def show_table(table: target.Table) -> None:
    """Print the table that a target makes of its export."""
    shown = Table(title=table.title or None, show_header=bool(table.columns))
    for name in table.columns:
        shown.add_column(name)
    for row in table.rows:
        shown.add_row(*row)
    Console().print(shown, markup=False)


def show_checks(checks: Sequence[Check]) -> None:
    """Print a table of checks, and below it how to fix those that failed or were skipped."""
    table = Table(show_edge=False)
    for name in ("", "check", "seen"):
        table.add_column(name, overflow="fold")
    for check in checks:
        table.add_row(check.outcome, check.name, check.detail, style=_STYLES[check.outcome])
    console = Console()
    console.print(table, markup=False)
    for check in checks:
        if check.fix:
            console.print(f"{check.name}: {check.fix}", highlight=False, markup=False)


def show_layers(engines: Mapping[str, Sequence[LayerProof]]) -> None:
    """Print the verdict on every linear layer in every engine."""
    for name, layers in engines.items():
        table = Table(title=name)
        for column in ("layer", "shape", "2:4", "verdict", "why", "in the engine"):
            table.add_column(column, overflow="fold")
        for layer in layers:
            table.add_row(
                layer.name,
                " x ".join(map(str, layer.shape)),
                "yes" if layer.pattern_holds else "no",
                layer.verdict,
                layer.reason,
                layer.engine_layer,
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
        if isinstance(value, bool):
            value = "yes" if value else "no"
        table.add_row(
            name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)
        )
    Console().print(table)


def show_quality(
    found: TextQuality | TaskQuality | Compared[TextQuality] | Compared[TaskQuality],
) -> None:
    """Print the quality of one model, or of the dense and the pruned one side by side."""
    match found:
        case TaskQuality():
            _show_scores({"": found.scores})
        case Compared(dense=TaskQuality() as dense, pruned=TaskQuality() as pruned):
            _show_scores({"dense": dense.scores, "pruned": pruned.scores})
        case TextQuality():
            _show_text({"": found})
        case Compared(dense=TextQuality() as dense, pruned=TextQuality() as pruned):
            _show_text({"dense": dense, "pruned": pruned})


def _show_text(columns: Mapping[str, TextQuality]) -> None:
    """Print a column for each model; comparisons are in the column of the pruned model only."""
    first = next(iter(columns.values()))
    where = f"{first.text}: {first.segments} segments of {first.length} tokens"
    table = Table("", *columns, title=where)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("perplexity", *(f"{one.value:.2f}" for one in columns.values()))
    for title, name in (("last words", "words"), ("multiple choice", "choices")):
        found: list[Answers | None] = [getattr(one, name) for one in columns.values()]
        if asked := found[0]:
            shares = (_share(one.accuracy) if one else "" for one in found)
            table.add_row(f"{title}, of {asked.questions}", *shares)
        if (last := found[-1]) and last.change:
            table.add_row("  change", *[""] * (len(found) - 1), _share(last.change, "+"))
    if near := list(columns.values())[-1].fidelity:
        blank = [""] * (len(columns) - 1)
        nats = "not measured" if near.divergence is None else f"{near.divergence:.3f}"
        table.add_row("divergence, nats per token", *blank, nats)
        table.add_row("same most likely token", *blank, f"{near.agreement:.1%}")
        table.add_row(
            f"of {near.tokens} tokens, as the dense model", *blank, f"{near.continued:.0f}"
        )
        table.add_row("  before the first different token", *blank, f"{near.before_first:.0f}")
    Console().print(table)


def _share(share: Interval, sign: str = "") -> str:
    low, high = share.low * 100, share.high * 100
    return f"{share.estimate * 100:{sign}.1f} % ({low:{sign}.1f} to {high:{sign}.1f})"


def _show_scores(columns: Mapping[str, Sequence[Score]]) -> None:
    table = Table()
    for name in ("task", "metric", "examples"):
        table.add_column(name, justify="left" if name != "examples" else "right")
    for name in columns:
        table.add_column(name, justify="right")
    for row in zip(*columns.values(), strict=True):
        first = row[0]
        table.add_row(first.task, first.metric, f"{first.samples:,}", *map(_score, row))
    Console().print(table)


def _score(score: Score) -> str:
    error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
    return f"{score.value:.4f}{error}"


def show_notice(text: str) -> None:
    """Print a sentence that must not be overlooked."""
    Console().print(text, style="bold red", highlight=False, markup=False)
