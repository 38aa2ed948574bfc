"""The report as one HTML file: works from disk, loads nothing, runs one script that it names."""

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from thanos_deploy.bundle.files import Json
from thanos_deploy.bundle.layout import ONNX
from thanos_deploy.gpu.nvml import NOT_MEASURED
from thanos_deploy.report import charts, words
from thanos_deploy.report.figures import (
    Figure,
    figures,
    file_titles,
    metric_title,
    shown,
    shown_ratio,
)
from thanos_deploy.report.runs import DENSE, measured, quoted, quoted_times
from thanos_deploy.report.sources import Sources


def render(report: Json, bundles: Sequence[Sources]) -> str:
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
    models = [
        _view(model, sources, f"model-{number}")
        for number, (model, sources) in enumerate(
            zip(report["models"], bundles, strict=True), start=1
        )
    ]
    # The policy allows this very script, so that nothing else runs whatever a name contains.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        report=report,
        models=models,
        columns=_columns(report),
        rows=_rows(report),
        pareto=charts.pareto(report["pareto"]) if report["pareto"] else None,
        no_gpu=NOT_MEASURED,
        style=Markup(_file("page.css")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def _view(model: Json, sources: Sources, identifier: str) -> Json:
    """A model with its pictures."""
    environment = model["environment"]
    return {
        **model,
        "id": identifier,
        "on_gpu": words.on_gpu(model),
        "figures": list(figures(model)),
        "tiles": _tiles(model),
        "runs": [
            (run, _pictures(with_samples))
            for run, with_samples in zip(model["bench"], sources.runs.values(), strict=True)
        ],
        "map": charts.layer_maps(model["layer_map"]),
        "sizes": charts.sizes(model["parts"]) if model["parts"] else None,
        "machine": {
            "processor": f"{environment['processor']}, {environment['cores']} cores",
            "memory": f"{environment['memory_bytes'] / 1e9:.1f} GB",
            "platform": environment["platform"],
            "thanos-deploy": environment["thanos-deploy"],
            "Python": environment["python"],
            "libraries": ", ".join(f"{n} {v}" for n, v in environment["libraries"].items()),
        },
    }


def _pictures(run: Json) -> list[tuple[Markup, str]]:
    pictures = []
    if run["baseline"] == DENSE and any(measured(run)):
        caption = (
            "Time as a fraction of the dense model's, with its confidence interval. Filled: the "
            "interval leaves 1 out, so there is a difference."
        )
        pictures.append((charts.ratios(run), caption))
    if run["scenarios"]:
        caption = "Every raw sample: the share that took at most so many milliseconds."
        pictures.append((charts.distributions(run), caption))
    return pictures


def _tiles(model: Json) -> list[Json]:
    """The few figures to look at first: quality, both speeds, size, memory."""
    wanted = (
        "perplexity",
        *(name for name, _ in quoted_times(quoted(model))),
        file_titles()[ONNX if ONNX in model["bytes"] else "model"],
        "peak memory",
    )
    by_name = {figure.name: figure for figure in figures(model)}
    return [
        {
            "name": by_name[name].title if by_name[name].unit != "s" else f"{name}, time",
            "times": f"{by_name[name].ratio:.2f}x",
            "note": _note(by_name[name]),
            "status": by_name[name].status,
        }
        for name in wanted
        if name in by_name and by_name[name].ratio is not None
    ]


def _note(figure: Figure) -> str:
    if figure.low is None:
        return f"{shown(figure.dense, figure.unit)} to {shown(figure.pruned, figure.unit)}"
    span = f"{figure.low:.2f} to {figure.high:.2f}"
    return span if figure.status == "VALID" else f"{span}, {figure.status}"


def _columns(report: Json) -> list[str]:
    return [
        f"{figure.name}, of dense" if figure.unit == "s" else figure.title
        for figure in _compared(report).values()
    ]


def _compared(report: Json) -> dict[str, Figure]:
    """The figures to put side by side, by name, as the first model that has them shows them."""
    found: dict[str, Figure] = {}
    files = file_titles().values()
    for model in report["models"]:
        times = [name for name, _ in quoted_times(quoted(model))]
        for figure in figures(model):
            if figure.name in ("perplexity", *files, "peak memory", *times):
                found.setdefault(figure.name, figure)
    return found


def _rows(report: Json) -> list[Json]:
    """The dense model and the others, with a cell for each column."""
    compared = _compared(report)
    points = [point for plot in report["pareto"] for point in plot["points"]]
    better = {point["label"] for point in points if not point["dominated_by"]}
    beaten = {point["label"] for point in points} - better
    rows: list[Json] = [
        {"label": DENSE, "id": None, "cells": [_dense_cell(f) for f in compared.values()]}
    ]
    for number, model in enumerate(report["models"], start=1):
        own = {figure.name: figure for figure in figures(model)}
        cells = [_cell(own.get(name)) for name in compared]
        rows.append({"label": model["label"], "id": f"model-{number}", "cells": cells})
    return [{**row, "mark": "dominated" if row["label"] in beaten else None} for row in rows]


def _dense_cell(figure: Figure) -> Json:
    if figure.unit == "s":
        return {"value": 1.0, "text": "1", "note": None}
    return {"value": figure.dense, "text": shown(figure.dense, figure.unit), "note": None}


def _cell(figure: Figure | None) -> Json:
    """A value with its ratio; of a time the ratio alone, as milliseconds differ between runs."""
    if figure is None:
        return {"value": None, "text": "not measured", "note": None}
    if figure.unit != "s":
        note = None if figure.ratio is None else f"{figure.ratio:.3f}x"
        return {"value": figure.pruned, "text": shown(figure.pruned, figure.unit), "note": note}
    span = f"{figure.low:.3f} to {figure.high:.3f}"
    note = span if figure.status == "VALID" else f"{span}, {figure.status}"
    return {"value": figure.ratio, "text": f"{figure.ratio:.3f}", "note": note}


def _file(name: str) -> str:
    return resources.files("thanos_deploy.report").joinpath(name).read_text(encoding="utf-8")
