"""The report as one HTML file: works from disk, loads nothing, runs one script that it names."""

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
from thanos_deploy.pruning.budget import HEADS, bought, cells
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
    """The page of a report.

    Args:
        report: what `build.build` made of the bundles.
        bundles: for the raw samples.
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
    # The policy allows this very script, so that nothing else runs whatever a name contains.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        report=report,
        views=views,
        columns=_columns(report),
        rows=_rows(report),
        pareto=charts.pareto(report.pareto) if report.pareto else None,
        choice_heads=HEADS,
        no_gpu=NOT_MEASURED,
        style=Markup(_file("page.css")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


@dataclass(frozen=True, slots=True)
class _Tile:
    """A figure to look at first: its name, its ratio, what stands below, and its run's status."""

    name: str
    times: str
    note: str
    status: str


@dataclass(frozen=True, slots=True)
class _View:
    """A model with its pictures.

    Attributes:
        model: what is known of it.
        id: of its place on the page.
        on_gpu: what is known of it on a GPU, in sentences.
        figures: all of them.
        tiles: those to look at first.
        runs: each with its pictures and their captions.
        map: the picture of the layers.
        sizes: that of the parts; None where they are not known.
        choices: what each kind of choice bought, row by row; none where there was no budget.
        machine: what it was pruned on, as rows.
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
    """A cell of the comparison: what it is sorted by, what it shows, and what stands below."""

    value: float | None
    text: str
    note: str | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the comparison: a model, its place on the page, its cells, what is said of it."""

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
        choices=[cells(row) for row in bought(model.choices)] if model.choices else [],
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
    """The few figures to look at first: quality, both speeds, size, memory."""
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
    """The figures to put side by side, by name, as the first model that has them shows them."""
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
    """The dense model and the others, with a cell for each column."""
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
    """A value with its ratio; of a time the ratio alone, as milliseconds differ between runs."""
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
