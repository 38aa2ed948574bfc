"""Which models dominate others: quality against cost.

A cost is known exactly (bytes) or up to an interval (a ratio of times). One model dominates another
if it is better in quality while the other is not shown to cost less, or as good while it is shown
to cost less. "Shown" means that the intervals do not overlap: noise puts nobody on the front.
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
    """Whether one model dominates the other."""
    if one.perplexity < other.perplexity:
        return not other.high < one.low
    return one.perplexity == other.perplexity and one.high < other.low


def front(points: Sequence[PlotPoint]) -> list[PlotPoint]:
    """The points that no other dominates, better perplexities first."""
    best = [one for one in points if not any(dominates(other, one) for other in points)]
    return sorted(best, key=lambda point: (point.perplexity, point.cost))


def plots(models: Sequence[ModelReport]) -> list[Plot]:
    """Perplexity against time and against size, for the models that can be compared.

    Against what a graph costs stands the graph's own perplexity where its weights are rounded.
    Left out are models whose perplexity is not known or is of another text than that of most, and
    those without the cost in question.
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


# Estimate, low, high, and whether it is from a run that counts.
_Cost = tuple[float, float, float, bool]
# Name, unit, dtype of the dense model, its cost, and the costs of the models by label.
_Costs = tuple[str, str, str, float, dict[str, _Cost]]

# A graph in one of these has the perplexity of its checkpoint.
_FLOATS = ("fp32", "fp16")


def _of_graph(model: ModelReport) -> Quality | None:
    """The quality of the graph, which is the checkpoint's unless its weights are rounded."""
    rounded = model.export is not None and model.export.dtype not in _FLOATS
    return model.graph_quality if rounded else model.quality


def _of_checkpoint(model: ModelReport) -> Quality | None:
    return model.quality


def _comparable(
    models: Sequence[ModelReport], of: Callable[[ModelReport], Quality | None]
) -> list[ModelReport]:
    """The models whose quality is of the text that most share."""
    texts = Counter(quality.measured_on for model in models if (quality := of(model)))
    common = texts.most_common(1)[0][0] if texts else None
    return [model for model in models if (quality := of(model)) and quality.measured_on == common]


def _dense_perplexity(models: Sequence[ModelReport], dtype: str) -> list[float]:
    """Of the dense model in that dtype; none where it was not measured."""
    if dtype in _FLOATS:
        return [one.quality.dense for one in models if one.quality][:1]
    return [
        one.graph_quality.dense
        for one in models
        if one.graph_quality and one.export and one.export.dtype == dtype
    ][:1]


def _graph_costs(models: Sequence[ModelReport]) -> Iterator[_Costs]:
    yield from _times(models)
    # Of the largest of the dense graphs that were seen.
    graphs = [
        run.subjects[DENSE] for model in models for run in model.bench if DENSE in run.subjects
    ]
    largest = max(graphs, key=lambda subject: subject.file_bytes, default=None)
    sizes = {model.label: model.bytes.targets.get(ONNX) for model in models}
    yield from _size("ONNX file", largest.dtype if largest else "fp32", sizes)


def _checkpoint_costs(models: Sequence[ModelReport]) -> Iterator[_Costs]:
    """Bytes of the checkpoints, packed where they were."""
    beside = [target.name for target in targets.every() if _is_checkpoint(target.size)]
    yield from _size(
        "checkpoint", "fp32", {model.label: _checkpoint(model, beside) for model in models}
    )


def _times(models: Sequence[ModelReport]) -> Iterator[_Costs]:
    """Time of prefill and of decode, in the scenario that most models share, beside one graph."""
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
    """Of the smallest form of the checkpoint that there is."""
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
