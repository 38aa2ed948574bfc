"""The figures of a report as rows, for whoever prints a table of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from exporters import targets
from thanos_deploy.measure.run import DENSE, PRUNED, ScenarioTimes
from thanos_deploy.report.model import ModelReport
from thanos_deploy.report.runs import quoted

# Unit in the report -> factor, unit for people, digits.
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
    "steady_bytes": "memory when loaded",
    "peak_bytes": "peak memory",
    "gpu_peak_bytes": "GPU memory",
}

CHECKPOINT = "checkpoint"
PERPLEXITY = "perplexity"
DIVERGENCE = "divergence from the dense model"
AGREEMENT = "same most likely token as the dense model"


@dataclass(frozen=True, slots=True)
class Figure:
    """Something measured of the dense and of the pruned model.

    Attributes:
        name: what.
        unit: "s", "B", "1/s", "nats", "score" for a share or in a task, or "" for a plain number.
        dense, pruned: the values; None if the dense model's was not measured.
        ratio: pruned / dense.
        low, high: confidence interval of the ratio, where there is one.
        status: of the run that a time is from; only what is VALID counts.
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
        """The name with the unit for people."""
        unit = _SCALES[self.unit][1]
        return f"{self.name}, {unit}" if unit and self.unit != "1/s" else self.name


def figures(model: ModelReport) -> Iterator[Figure]:
    """Quality, sizes, times and memory of a model of a report, in this order."""
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
    """What the files of each target are called, of those whose bytes are compared."""
    return {target.name: target.size.title for target in targets.every() if target.size}


def metric_title(scenario: ScenarioTimes, metric: str) -> str:
    """A scenario and what was timed in it."""
    if metric == scenario.kind:
        return scenario.name
    return f"{scenario.name}, {_METRICS.get(metric, metric.replace('_', ' '))}"


def shown(value: float | None, unit: str) -> str:
    """A value as people read it, without its unit."""
    if value is None:
        return "not measured"
    factor, _, digits = _SCALES[unit]
    return f"{value * factor:,.{digits}f}"


def shown_ratio(figure: Figure) -> str:
    """A ratio with its interval where there is one, and with what speaks against it."""
    if figure.ratio is None:
        return ""
    span = "" if figure.low is None else f" ({figure.low:.3f} to {figure.high:.3f})"
    doubt = "" if figure.status == "VALID" else f", {figure.status}"
    return f"{figure.ratio:.3f}{span}{doubt}"


def _figure(name: str, unit: str, dense: float | None, pruned: float) -> Figure:
    return Figure(name, unit, dense, pruned, pruned / dense if dense else None)
