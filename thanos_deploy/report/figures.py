"""The figures of a report as rows of a table."""

from collections.abc import Iterator
from dataclasses import dataclass

from exporters import targets
from thanos_deploy.measure.run import DENSE, PRUNED, ScenarioTimes
from thanos_deploy.report.model import ModelReport
from thanos_deploy.report.runs import quoted

# Unit in the report -> factor to the displayed unit, displayed unit, decimals.
_SCALES = {
    "s": (1e3, "ms", 1),
    "B": (1e-6, "MB", 1),
    "1/s": (1.0, "tokens/s", 1),
    "score": (1.0, "", 3),
    "nats": (1.0, "nats/token", 3),
    "": (1.0, "", 2),
}

_METRICS = {
    "ttft": "first token",
    "inter_token": "between tokens",
    "total": "whole answer",
    "tokens_per_second": "tokens per second",
    "request": "request",
}

_MEMORY = {
    "load_peak_bytes": "memory while loading",
    "steady_bytes": "memory after the run",
    "peak_bytes": "peak memory",
    "gpu_peak_bytes": "GPU memory",
}

CHECKPOINT = "checkpoint"
PERPLEXITY = "perplexity"
DIVERGENCE = "divergence from the dense model"
AGREEMENT = "same most likely token as the dense model"


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity that was measured for the dense and for the pruned model.

    Attributes:
        name: name of the quantity.
        unit: "s", "B", "1/s", "nats", "score" (a share, or a score in a task), or "" for a plain
            number.
        dense, pruned: the values; `dense` is None if it was not measured.
        ratio: pruned / dense; None if `dense` is None or 0.
        low, high: confidence interval of the ratio; None if there is none.
        status: status of the benchmark run that measured a time; only VALID times count.
    """

    name: str
    unit: str
    dense: float | None
    pruned: float
    ratio: float | None
    low: float | None = None
    high: float | None = None
    status: str = "VALID"

    @property
    def title(self) -> str:
        """The name with the displayed unit."""
        unit = _SCALES[self.unit][1]
        return f"{self.name}, {unit}" if unit and self.unit != "1/s" else self.name


def figures(model: ModelReport) -> Iterator[Figure]:
    """Yield quality, sizes, times and memory of a model, in this order."""
    if quality := model.quality:
        yield _figure(PERPLEXITY, "", quality.dense, quality.pruned)
    if graph := model.graph_quality:
        yield _figure("perplexity of the ONNX graph", "", graph.dense, graph.pruned)
    if near := model.fidelity:
        if near.divergence is not None:
            yield _figure(DIVERGENCE, "nats", 0.0, near.divergence)
        yield _figure(AGREEMENT, "score", 1.0, near.agreement)
        written = f"tokens generated as by the dense model, of {near.tokens}"
        yield _figure(written, "", float(near.tokens), near.continued)
    for asked in model.answers:
        yield _figure(asked.kind, "score", asked.dense.estimate, asked.pruned.estimate)
    for score in model.tasks:
        where = ", ONNX graph" if score.runtime == "onnx" else ""
        yield _figure(f"{score.task}, {score.metric}{where}", "score", score.dense, score.pruned)
    yield _figure(CHECKPOINT, "B", model.bytes.model.dense, model.bytes.model.pruned)
    titles = target_titles()
    for name, size in model.bytes.targets.items():
        yield _figure(titles.get(name, name), "B", size.dense, size.pruned)
    run = quoted(model)
    if run is None:
        return
    for scenario, metric, ratio in run.ratios:
        dense, pruned = (scenario.results[who].metrics[metric] for who in (DENSE, PRUNED))
        yield Figure(
            metric_title(scenario, metric),
            pruned.unit,
            dense.median,
            pruned.median,
            ratio.estimate,
            ratio.low,
            ratio.high,
            run.status,
        )
    for name, title in _MEMORY.items():
        before, after = (getattr(run.subjects[who], name) for who in (DENSE, PRUNED))
        if after is not None:
            yield _figure(title, "B", before, after)


def target_titles() -> dict[str, str]:
    """Return the row titles of the targets whose sizes are compared, by name of the target."""
    return {target.name: target.size.title for target in targets.every() if target.size}


def metric_title(scenario: ScenarioTimes, metric: str) -> str:
    """Return the title of a metric that was timed in a scenario."""
    if metric == scenario.kind:
        return scenario.name
    return f"{scenario.name}, {_METRICS.get(metric, metric.replace('_', ' '))}"


def shown(value: float | None, unit: str) -> str:
    """Format a value in the displayed unit, without the unit."""
    if value is None:
        return "not measured"
    factor, _, digits = _SCALES[unit]
    return f"{value * factor:,.{digits}f}"


def shown_ratio(figure: Figure) -> str:
    """Format a ratio with its confidence interval, and the status of a run that is not VALID."""
    if figure.ratio is None:
        return ""
    span = "" if figure.low is None else f" ({figure.low:.3f} to {figure.high:.3f})"
    doubt = "" if figure.status == "VALID" else f", {figure.status}"
    return f"{figure.ratio:.3f}{span}{doubt}"


def _figure(name: str, unit: str, dense: float | None, pruned: float) -> Figure:
    return Figure(name, unit, dense, pruned, pruned / dense if dense else None)
