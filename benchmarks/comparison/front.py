"""Which models are the fastest or the smallest for their perplexity, and sentences about it.

Costs are known up to an interval, so `pareto.dominates` decides: a model that is worse in
perplexity is on the front if it is shown to cost less than every better one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from benchmarks.comparison.record import Row
from thanos_deploy.report import pareto
from thanos_deploy.report.model import PlotPoint

Cost = Literal["decode", "prefill", "size"]
COSTS: tuple[Cost, ...] = ("decode", "prefill", "size")

_MOST = {"decode": "fastest in decode", "prefill": "fastest in prefill", "size": "smallest"}


@dataclass(frozen=True, slots=True)
class Span:
    """Accepted perplexities at which models of one kind are best.

    Attributes:
        low: the least of them.
        high: where it ends; None where it does not.
        rows: the models, better perplexities first.
    """

    low: float
    high: float | None
    rows: tuple[Row, ...]

    @property
    def pruned(self) -> bool:
        """The models are pruned."""
        return self.rows[0].pruned

    def __str__(self) -> str:
        end = "or more" if self.high is None else f"to {self.high:.2f}"
        return f"{self.low:.2f} {end}"


def point(row: Row, cost: Cost, baseline: Row) -> PlotPoint:
    """A row as a pair of perplexity and cost: milliseconds, or megabytes.

    The interval of a time is that of its ratio to the baseline, times the baseline's median.
    """
    if cost == "size":
        size = row.bytes / 1e6
        return PlotPoint(row.name, row.perplexity, size, size, size)
    times, unit = getattr(row, cost), getattr(baseline, cost).median * 1e3
    middle, ratio = times.median * 1e3, times.ratio
    low, high = (middle, middle) if ratio is None else (ratio.low * unit, ratio.high * unit)
    return PlotPoint(row.name, row.perplexity, middle, low, high)


def points(rows: Sequence[Row], cost: Cost) -> list[PlotPoint]:
    """All rows; the first one is the baseline."""
    return [point(row, cost, rows[0]) for row in rows]


def front(rows: Sequence[Row], cost: Cost) -> list[Row]:
    """The rows that no other dominates, better perplexities first."""
    by_name = {row.name: row for row in rows}
    return [by_name[one.label] for one in pareto.front(points(rows, cost))]


def spans(best: Sequence[Row]) -> list[Span]:
    """A front as ranges of accepted perplexities, by whether the best is pruned."""
    groups = [tuple(group) for _, group in groupby(best, key=lambda row: row.pruned)]
    ends = [group[0].perplexity for group in groups[1:]]
    return [
        Span(group[0].perplexity, end, group)
        for group, end in zip(groups, [*ends, None], strict=True)
    ]


def sentence(rows: Sequence[Row], cost: Cost) -> str:
    """What a front says, to somebody who knows neither the runtimes nor this project."""
    found = spans(front(rows, cost))
    most = _MOST[cost]
    pruned, dense = ([span for span in found if span.pruned is one] for one in (True, False))
    if not dense:
        return (
            f"Whatever perplexity is accepted, the {most} is a pruned model: "
            f"{_listed(pruned, cost)}."
        )
    if not pruned:
        return (
            f"No pruned model is shown to be the {most}: for each there is a better one that is "
            f"not shown to cost more. On the front are {_listed(dense, cost)}."
        )
    return (
        f"Where a perplexity of {_ranges(pruned)} is accepted, the {most} is a pruned model: "
        f"{_listed(pruned, cost)}. Where {_ranges(dense)} is accepted, it is a dense model: "
        f"{_listed(dense, cost)}."
    )


def shown(row: Row, cost: Cost) -> str:
    """A cost with its unit."""
    if cost == "size":
        return f"{row.bytes / 1e6:.0f} MB"
    return f"{getattr(row, cost).median * 1e3:.1f} ms"


def _ranges(found: Sequence[Span]) -> str:
    return " or ".join(map(str, found))


def _listed(found: Sequence[Span], cost: Cost) -> str:
    return "; ".join(_each(found, cost))


def _each(found: Sequence[Span], cost: Cost) -> Iterator[str]:
    for row in (row for span in found for row in span.rows):
        yield f"{row.name} (perplexity {row.perplexity:.2f}, {shown(row, cost)})"
