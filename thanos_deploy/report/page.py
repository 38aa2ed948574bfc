"""The report as one HTML file that opens from disk and loads no other file.

Its content security policy allows one inline script, by its hash.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from thanos_deploy.bundle.layout import ONNX
from thanos_deploy.gpu.nvml import NOT_MEASURED
from thanos_deploy.measure.run import DENSE, Run
from thanos_deploy.pruning.budget import DECISION_COLUMNS, decision_cells, decision_rows
from thanos_deploy.report import charts, words
from thanos_deploy.report.figures import (
    CHECKPOINT,
    DIVERGENCE,
    PERPLEXITY,
    Figure,
    figures,
    metric_title,
    shown,
    shown_ratio,
    target_titles,
)
from thanos_deploy.report.model import ModelReport, Report
from thanos_deploy.report.runs import quoted, quoted_times
from thanos_deploy.report.sources import Sources


def render(report: Report, bundles: Sequence[Sources]) -> str:
    """Return the HTML page of a report.

    Args:
        report: the report that `build.build` made from `bundles`.
        bundles: sources of the raw samples, in the order of `report.models`.
    """
    environment = Environment(
        loader=PackageLoader("thanos_deploy.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(shown=shown, ratio=shown_ratio, metric_title=metric_title)
    script = _file("page.js")
    views = [
        _view(model, sources, f"model-{number}")
        for number, (model, sources) in enumerate(zip(report.models, bundles, strict=True), start=1)
    ]
    # The policy allows only the script with this hash, so that no name can inject another one.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        report=report,
        views=views,
        columns=_columns(report),
        rows=_rows(report),
        pareto=charts.pareto(report.pareto) if report.pareto else None,
        choice_heads=DECISION_COLUMNS,
        no_gpu=NOT_MEASURED,
        style=Markup(_file("page.css")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


@dataclass(frozen=True, slots=True)
class _Tile:
    """One key figure at the top of a model's section.

    Attributes:
        name: name of the figure.
        times: ratio to the dense model, such as "0.55x".
        note: smaller text below the ratio.
        status: status of the benchmark run that the figure is from.
    """

    name: str
    times: str
    note: str
    status: str


@dataclass(frozen=True, slots=True)
class _View:
    """Everything that the template needs for one model.

    Attributes:
        model: the model's part of the report.
        id: HTML id of its section.
        on_gpu: sentences about its speed on a GPU.
        figures: all figures, for the table.
        tiles: the key figures.
        runs: the benchmark runs, each with its charts and their captions.
        map: chart of the error and the removed fraction of every layer.
        sizes: chart of the checkpoint's bytes by part; None if they are not known.
        choices: rows of the table of layers that stay dense under a budget; empty without a
            budget.
        machine: the machine that pruned the model, as names and values.
    """

    model: ModelReport
    id: str
    on_gpu: str
    figures: Sequence[Figure]
    tiles: Sequence[_Tile]
    runs: Sequence[tuple[Run, Sequence[tuple[Markup, str]]]]
    map: Markup
    sizes: Markup | None
    choices: Sequence[Sequence[str]]
    machine: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Cell:
    """One cell of the comparison table.

    Attributes:
        value: the value to sort by; None if it was not measured.
        text: the text that the cell shows.
        note: smaller text below it.
    """

    value: float | None
    text: str
    note: str | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of the comparison table.

    Attributes:
        label: label of the model.
        id: HTML id of the model's section; None for the dense model, which has none.
        cells: one cell for each column.
        mark: a remark on the model, such as "dominated".
    """

    label: str
    id: str | None
    cells: Sequence[_Cell]
    mark: str | None


def _view(model: ModelReport, sources: Sources, identifier: str) -> _View:
    environment = model.environment
    return _View(
        model=model,
        id=identifier,
        on_gpu=words.on_gpu(model),
        figures=list(figures(model)),
        tiles=_tiles(model),
        runs=[
            (run, _pictures(with_samples))
            for run, with_samples in zip(model.bench, sources.runs.values(), strict=True)
        ],
        map=charts.layer_maps(model.layer_map),
        sizes=charts.sizes(model.parts) if model.parts else None,
        choices=[decision_cells(row) for row in decision_rows(model.choices)]
        if model.choices
        else [],
        machine={
            "processor": f"{environment.processor}, {environment.cores} cores",
            "memory": f"{environment.memory_bytes / 1e9:.1f} GB",
            "platform": environment.platform,
            "thanos-deploy": environment.thanos_deploy,
            "Python": environment.python,
            "libraries": ", ".join(f"{n} {v}" for n, v in environment.libraries.items()),
        },
    )


def _pictures(run: Run) -> list[tuple[Markup, str]]:
    pictures = []
    if run.baseline == DENSE and any(run.ratios):
        caption = (
            "Time as a fraction of the dense model's, with its confidence interval. Filled: the "
            "interval leaves 1 out, so there is a difference."
        )
        pictures.append((charts.ratios(run), caption))
    if run.scenarios:
        caption = "Every raw sample: the share that took at most a given number of milliseconds."
        pictures.append((charts.distributions(run), caption))
    return pictures


def _tiles(model: ModelReport) -> list[_Tile]:
    """Return the key figures: perplexity, times of prefill and decode, size, peak memory."""
    wanted = (
        PERPLEXITY,
        *(name for name, _ in quoted_times(quoted(model))),
        target_titles()[ONNX] if ONNX in model.bytes.targets else CHECKPOINT,
        "peak memory",
    )
    by_name = {figure.name: figure for figure in figures(model)}
    return [
        _Tile(
            name=figure.title if figure.unit != "s" else f"{name}, time",
            times=f"{figure.ratio:.2f}x",
            note=_note(figure),
            status=figure.status,
        )
        for name in wanted
        if (figure := by_name.get(name)) and figure.ratio is not None
    ]


def _note(figure: Figure) -> str:
    if figure.low is None:
        return f"{shown(figure.dense, figure.unit)} to {shown(figure.pruned, figure.unit)}"
    span = f"{figure.low:.2f} to {figure.high:.2f}"
    return span if figure.status == "VALID" else f"{span}, {figure.status}"


def _columns(report: Report) -> list[str]:
    return [
        f"{figure.name}, of dense" if figure.unit == "s" else figure.title
        for figure in _compared(report).values()
    ]


def _compared(report: Report) -> dict[str, Figure]:
    """Return the compared figures by name, each taken from the first model that has it."""
    found: dict[str, Figure] = {}
    files = (CHECKPOINT, *target_titles().values())
    for model in report.models:
        quality = (PERPLEXITY, DIVERGENCE, *(asked.kind for asked in model.answers))
        times = [name for name, _ in quoted_times(quoted(model))]
        for figure in figures(model):
            if figure.name in (*quality, *files, "peak memory", *times):
                found.setdefault(figure.name, figure)
    return found


def _rows(report: Report) -> list[_Row]:
    """Return a row for the dense model, then one for each pruned model."""
    compared = _compared(report)
    points = [point for plot in report.pareto for point in plot.points]
    better = {point.label for point in points if not point.dominated_by}
    beaten = {point.label for point in points} - better
    rows: list[tuple[str, str | None, list[_Cell]]] = [
        (DENSE, None, [_dense_cell(figure) for figure in compared.values()])
    ]
    for number, model in enumerate(report.models, start=1):
        own = {figure.name: figure for figure in figures(model)}
        rows.append((model.label, f"model-{number}", [_cell(own.get(name)) for name in compared]))
    return [
        _Row(label, place, cells, "dominated" if label in beaten else None)
        for label, place, cells in rows
    ]


def _dense_cell(figure: Figure) -> _Cell:
    if figure.unit == "s":
        return _Cell(1.0, "1")
    return _Cell(figure.dense, shown(figure.dense, figure.unit))


def _cell(figure: Figure | None) -> _Cell:
    """Return the cell of a figure: its value with the ratio to the dense model.

    Times show the ratio only, because milliseconds cannot be compared between runs.
    """
    if figure is None:
        return _Cell(None, "not measured")
    if figure.unit != "s":
        note = None if figure.ratio is None else f"{figure.ratio:.3f}x"
        return _Cell(figure.pruned, shown(figure.pruned, figure.unit), note)
    span = f"{figure.low:.3f} to {figure.high:.3f}"
    note = span if figure.status == "VALID" else f"{span}, {figure.status}"
    return _Cell(figure.ratio, f"{figure.ratio:.3f}", note)


def _file(name: str) -> str:
    return resources.files("thanos_deploy.report").joinpath(name).read_text(encoding="utf-8")
