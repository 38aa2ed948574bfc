"""Pareto dominance between models: perplexity against cost.

A cost is known exactly (bytes) or with a confidence interval (a ratio of times). Model A dominates
model B in two cases: A has the better perplexity and B is not shown to cost less, or both have the
same perplexity and A is shown to cost less. A model is shown to cost less if its interval lies
below that of the other one without overlap, so noise alone cannot put a model on the front.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from exporters import targets
from exporters.target import Size
from thanos_deploy.bundle.layout import ONNX
from thanos_deploy.measure.run import DENSE
from thanos_deploy.report.model import ModelReport, Pair, Plot, PlotPoint, Quality
from thanos_deploy.report.runs import quoted


def dominates(one: PlotPoint, other: PlotPoint) -> bool:
    """Whether the model `one` dominates the model `other`."""
    if one.perplexity < other.perplexity:
        return not other.high < one.low
    return one.perplexity == other.perplexity and one.high < other.low


def front(points: Sequence[PlotPoint]) -> list[PlotPoint]:
    """Return the points that no other point dominates, best perplexity first."""
    best = [one for one in points if not any(dominates(other, one) for other in points)]
    return sorted(best, key=lambda point: (point.perplexity, point.cost))


def plots(models: Sequence[ModelReport]) -> list[Plot]:
    """Return a plot of perplexity against each cost, for the models that can be compared.

    Costs of a graph are plotted against the perplexity of the graph itself if its weights are
    rounded, and against that of the checkpoint otherwise. A plot leaves out the models whose
    perplexity is not known or was measured on another text than that of most models, and the
    models without this cost.
    """
    made = []
    for of, of_kind in ((_of_graph, _graph_costs), (_of_checkpoint, _checkpoint_costs)):
        comparable = _comparable(models, of)
        for name, unit, dtype, dense, costs in of_kind(comparable):
            points = [
                *(
                    PlotPoint(DENSE, perplexity, dense, dense, dense)
                    for perplexity in _dense_perplexity(comparable, dtype)
                ),
                *(
                    PlotPoint(model.label, quality.pruned, *costs[model.label])
                    for model in comparable
                    if model.label in costs and (quality := of(model))
                ),
            ]
            judged = tuple(
                replace(
                    point,
                    dominated_by=tuple(other.label for other in points if dominates(other, point)),
                )
                for point in points
            )
            left_out = tuple(model.label for model in models if model.label not in costs)
            made.append(Plot(name, unit, judged, left_out))
    return made


# Estimate, low, high, and whether the run that measured it is VALID.
_Cost = tuple[float, float, float, bool]
# Name of the cost, its unit, dtype and cost of the dense model, and costs of the models by label.
_Costs = tuple[str, str, str, float, dict[str, _Cost]]

# A graph in one of these dtypes is taken to have the perplexity of its checkpoint.
_FLOATS = ("fp32", "fp16")


def _of_graph(model: ModelReport) -> Quality | None:
    """Return the graph's own perplexity if its weights are rounded, else the checkpoint's."""
    rounded = model.export is not None and model.export.dtype not in _FLOATS
    return model.graph_quality if rounded else model.quality


def _of_checkpoint(model: ModelReport) -> Quality | None:
    return model.quality


def _comparable(
    models: Sequence[ModelReport], of: Callable[[ModelReport], Quality | None]
) -> list[ModelReport]:
    """Return the models whose perplexity was measured as that of most models was."""
    texts = Counter(quality.measured_on for model in models if (quality := of(model)))
    common = texts.most_common(1)[0][0] if texts else None
    return [model for model in models if (quality := of(model)) and quality.measured_on == common]


def _dense_perplexity(models: Sequence[ModelReport], dtype: str) -> list[float]:
    """Return the perplexity of the dense model in a dtype; empty if it was not measured."""
    if dtype in _FLOATS:
        return [one.quality.dense for one in models if one.quality][:1]
    return [
        one.graph_quality.dense
        for one in models
        if one.graph_quality and one.export and one.export.dtype == dtype
    ][:1]


def _graph_costs(models: Sequence[ModelReport]) -> Iterator[_Costs]:
    yield from _times(models)
    # The dense graph of the ONNX plot is the largest one that any run has timed.
    graphs = [
        run.subjects[DENSE] for model in models for run in model.bench if DENSE in run.subjects
    ]
    largest = max(graphs, key=lambda subject: subject.file_bytes, default=None)
    sizes = {model.label: model.bytes.targets.get(ONNX) for model in models}
    yield from _size("ONNX file", largest.dtype if largest else "fp32", sizes)


def _checkpoint_costs(models: Sequence[ModelReport]) -> Iterator[_Costs]:
    """Yield the sizes of the checkpoints, of the packed ones where there are any."""
    beside = [target.name for target in targets.every() if _is_checkpoint(target.size)]
    yield from _size(
        "checkpoint", "fp32", {model.label: _checkpoint(model, beside) for model in models}
    )


def _times(models: Sequence[ModelReport]) -> Iterator[_Costs]:
    """Yield the times of prefill and of decode.

    Each is for the scenario and the dtype of the dense graph that most models share.
    """
    found: dict[tuple[str, str, str], dict[str, _Cost]] = {}
    for model in models:
        run = quoted(model)
        if run is None:
            continue
        for scenario, metric, ratio in run.ratios:
            if metric == scenario.headline:
                key = (scenario.kind, scenario.name, run.subjects[DENSE].dtype)
                cost = (ratio.estimate, ratio.low, ratio.high, run.status == "VALID")
                found.setdefault(key, {})[model.label] = cost
    for kind in ("prefill", "decode"):
        of_kind = [(key, costs) for key, costs in found.items() if key[0] == kind]
        if of_kind:
            (_, scenario_name, dtype), costs = max(of_kind, key=lambda item: len(item[1]))
            yield f"{scenario_name} time", "of the dense model's", dtype, 1.0, costs


def _checkpoint(model: ModelReport, beside: Sequence[str]) -> Pair:
    """Return the size of the first exported form of the checkpoint, or of the checkpoint itself."""
    found = (model.bytes.targets[name] for name in beside if name in model.bytes.targets)
    return next(found, model.bytes.model)


def _size(name: str, dtype: str, sizes: Mapping[str, Pair | None]) -> Iterator[_Costs]:
    known = {label: size for label, size in sizes.items() if size is not None}
    dense = max((size.dense or 0 for size in known.values()), default=0)
    if dense:
        costs = {label: (*(float(size.pruned),) * 3, True) for label, size in known.items()}
        yield name, "B", dtype, float(dense), costs


def _is_checkpoint(size: Size | None) -> bool:
    return size is not None and size.beside == "checkpoint"
