"""Which models dominate others: quality against cost.

A cost is known exactly (bytes) or up to an interval (a ratio of times). One model dominates another
if it is better in quality while the other is not shown to cost less, or as good while it is shown
to cost less. "Shown" means that the intervals do not overlap: noise puts nobody on the front.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from exporters import targets
from exporters.target import Size
from thanos_deploy.bundle.layout import ONNX
from thanos_deploy.measure.run import DENSE
from thanos_deploy.report.model import ModelReport, Pair, Plot, PlotPoint
from thanos_deploy.report.runs import quoted


def dominates(one: PlotPoint, other: PlotPoint) -> bool:
    """Whether one model dominates the other."""
    if one.perplexity < other.perplexity:
        return not other.high < one.low
    return one.perplexity == other.perplexity and one.high < other.low


def plots(models: Sequence[ModelReport]) -> list[Plot]:
    """Perplexity against time and against size, for the models that can be compared.

    Left out are models whose perplexity is of another text than that of most, or is not of the
    graph that was timed, and those without the cost in question.
    """
    texts = Counter(text for model in models if (text := _text(model)))
    if not texts:
        return []
    ((common, _),) = texts.most_common(1)
    comparable = [model for model in models if _text(model) == common]
    made = []
    for name, unit, dense, costs in (*_times(comparable), *_sizes(comparable)):
        points = [
            PlotPoint(DENSE, _perplexities(comparable[0])[0], dense, dense, dense),
            *(
                PlotPoint(model.label, _perplexities(model)[1], *costs[model.label])
                for model in comparable
                if model.label in costs
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
_Costs = tuple[str, str, float, dict[str, _Cost]]


def _text(model: ModelReport) -> tuple[str, int, int] | None:
    """What the perplexity is of; None where it is not known, or not that of the graph.

    It is the checkpoint's: not that of a graph of rounded weights.
    """
    quality = model.quality
    if quality is None or (model.export is not None and model.export.dtype == "int8"):
        return None
    return quality.text, quality.segments, quality.length


def _perplexities(model: ModelReport) -> tuple[float, float]:
    """Of the dense and the pruned model."""
    assert model.quality is not None
    return model.quality.dense, model.quality.pruned


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
            (_, scenario_name, _), costs = max(of_kind, key=lambda item: len(item[1]))
            yield f"{scenario_name} time", "of the dense model's", 1.0, costs


def _sizes(models: Sequence[ModelReport]) -> Iterator[_Costs]:
    """Bytes of the ONNX files and of the checkpoints, packed where they were."""
    beside = [target.name for target in targets.every() if _is_checkpoint(target.size)]
    for name, sizes in (
        ("ONNX file", {model.label: model.bytes.targets.get(ONNX) for model in models}),
        ("checkpoint", {model.label: _checkpoint(model, beside) for model in models}),
    ):
        yield from _size(name, {label: size for label, size in sizes.items() if size is not None})


def _checkpoint(model: ModelReport, beside: Sequence[str]) -> Pair:
    """Of the smallest form of the checkpoint that there is."""
    found = (model.bytes.targets[name] for name in beside if name in model.bytes.targets)
    return next(found, model.bytes.model)


def _size(name: str, sizes: dict[str, Pair]) -> Iterator[_Costs]:
    dense = max((size.dense or 0 for size in sizes.values()), default=0)
    if dense:
        costs = {label: (*(float(size.pruned),) * 3, True) for label, size in sizes.items()}
        yield name, "B", float(dense), costs


def _is_checkpoint(size: Size | None) -> bool:
    return size is not None and size.beside == "checkpoint"
