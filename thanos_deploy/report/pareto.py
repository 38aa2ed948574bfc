"""Which models another one beats: quality against what is paid for it.

A cost is known exactly (bytes) or up to an interval (a ratio of times). One model dominates another
if it is better in quality while the other is not shown to cost less, or as good while it is shown
to cost less. "Shown" means that the intervals do not overlap: noise puts nobody on the front.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from exporters import targets
from exporters.target import Size
from thanos_deploy.bundle.files import Json
from thanos_deploy.bundle.layout import ONNX
from thanos_deploy.report.runs import DENSE, measured, quoted


@dataclass(frozen=True, slots=True)
class Point:
    """A model as a pair of quality and cost, both the lower the better.

    Attributes:
        label: of the model.
        perplexity: its quality.
        cost, low, high: estimate and interval.
        valid: the run that the cost is from counts.
    """

    label: str
    perplexity: float
    cost: float
    low: float
    high: float
    valid: bool = True


def dominates(one: Point, other: Point) -> bool:
    """One model makes the other pointless."""
    if one.perplexity < other.perplexity:
        return not other.high < one.low
    return one.perplexity == other.perplexity and one.high < other.low


def plots(models: Sequence[Json]) -> list[Json]:
    """Perplexity against time and against size, for the models that can be compared.

    Left out are models whose perplexity is of another text than that of most, or is not of the
    graph that was timed, and those without the cost in question.

    Returns:
        for each cost its name, its unit, the points with the labels of those that dominate them,
        and the labels of the models that are left out.
    """
    texts = Counter(_text(model) for model in models if _has_quality(model))
    if not texts:
        return []
    ((common, _),) = texts.most_common(1)
    comparable = [model for model in models if _has_quality(model) and _text(model) == common]
    perplexity = {model["label"]: model["quality"]["pruned"] for model in comparable}
    made = []
    for name, unit, dense, costs in (*_times(comparable), *_sizes(comparable)):
        points = [
            Point(DENSE, comparable[0]["quality"]["dense"], dense, dense, dense),
            *(Point(label, perplexity[label], *cost) for label, cost in costs.items()),
        ]
        made.append(
            {
                "cost": name,
                "unit": unit,
                "points": [
                    {
                        **asdict(point),
                        "dominated_by": [
                            other.label for other in points if dominates(other, point)
                        ],
                    }
                    for point in points
                ],
                "left_out": [model["label"] for model in models if model["label"] not in costs],
            }
        )
    return made


# Estimate, low, high, and whether it is from a run that counts.
_Cost = tuple[float, float, float, bool]
_Costs = tuple[str, str, float, dict[str, _Cost]]


def _has_quality(model: Json) -> bool:
    """The perplexity is known. It is the checkpoint's: not that of a graph of rounded weights."""
    return model["quality"] is not None and (model["export"] or {}).get("dtype") != "int8"


def _text(model: Json) -> tuple[str, int, int]:
    quality = model["quality"]
    return quality["text"], quality["segments"], quality["length"]


def _times(models: Sequence[Json]) -> Iterator[_Costs]:
    """Time of prefill and of decode, in the scenario that most models share, beside one graph."""
    found: dict[tuple[str, str, str], dict[str, _Cost]] = {}
    for model in models:
        run = quoted(model)
        for scenario, metric, ratio in measured(run):
            if run and metric == scenario["headline"]:
                key = (scenario["kind"], scenario["name"], run["subjects"][DENSE]["dtype"])
                interval = (ratio["estimate"], ratio["low"], ratio["high"])
                found.setdefault(key, {})[model["label"]] = (*interval, run["status"] == "VALID")
    for kind in ("prefill", "decode"):
        of_kind = [(key, costs) for key, costs in found.items() if key[0] == kind]
        if of_kind:
            (_, scenario_name, _), costs = max(of_kind, key=lambda item: len(item[1]))
            yield f"{scenario_name} time", "of the dense model's", 1.0, costs


def _sizes(models: Sequence[Json]) -> Iterator[_Costs]:
    """Bytes of the ONNX files and of the checkpoints, packed where they were."""
    beside = [target.name for target in targets.every() if _is_checkpoint(target.size)]
    for name, kinds in (("ONNX file", (ONNX,)), ("checkpoint", (*beside, "model"))):
        costs, dense = {}, 0
        for model in models:
            kind = next((kind for kind in kinds if kind in model["bytes"]), None)
            if kind is None:
                continue
            size = model["bytes"][kind]
            dense = max(dense, size["dense"] or 0)
            costs[model["label"]] = (*(float(size["pruned"]),) * 3, True)
        if costs and dense:
            yield name, "B", float(dense), costs


def _is_checkpoint(size: Size | None) -> bool:
    return size is not None and size.beside == "checkpoint"
