"""The Pareto fronts of perplexity and cost, and sentences about them.

A cost is known only up to an interval. A model with a worse perplexity is therefore on the front
only if it is shown to cost less than every model with a better one; see `pareto.dominates`.
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

# Decimals of a perplexity, as it is shown and compared.
_DECIMALS = 2

_MOST = {"decode": "fastest in decode", "prefill": "fastest in prefill", "size": "smallest"}


@dataclass(frozen=True, slots=True)
class Span:
    """A range of accepted perplexities in which the best models are all pruned, or all dense.

    Attributes:
        low: lower end of the range.
        high: upper end of the range; None if there is none.
        rows: the models, in order of increasing perplexity.
    """

    low: float
    high: float | None
    rows: tuple[Row, ...]

    @property
    def pruned(self) -> bool:
        """Whether the models are pruned."""
        return self.rows[0].pruned

    def __str__(self) -> str:
        end = "or more" if self.high is None else f"to {self.high:.2f}"
        return f"{self.low:.2f} {end}"


def point(row: Row, cost: Cost, baseline: Row) -> PlotPoint:
    """Return a row as a point of perplexity and cost, in milliseconds or megabytes.

    The interval of a time is the interval of its ratio to the baseline times the baseline's median.
    Perplexities count as they are shown: the same weights differ between runtimes by rounding.
    """
    perplexity = round(row.perplexity, _DECIMALS)
    if cost == "size":
        size = row.bytes / 1e6
        return PlotPoint(row.name, perplexity, size, size, size)
    times, unit = getattr(row, cost), getattr(baseline, cost).median * 1e3
    middle, ratio = times.median * 1e3, times.ratio
    low, high = (middle, middle) if ratio is None else (ratio.low * unit, ratio.high * unit)
    return PlotPoint(row.name, perplexity, middle, low, high)


def points(rows: Sequence[Row], cost: Cost) -> list[PlotPoint]:
    """Return the points of all rows; the first row is the baseline."""
    return [point(row, cost, rows[0]) for row in rows]


def front(rows: Sequence[Row], cost: Cost) -> list[Row]:
    """Return the rows that no other row dominates, in order of increasing perplexity."""
    by_name = {row.name: row for row in rows}
    return [by_name[one.label] for one in pareto.front(points(rows, cost))]


def spans(best: Sequence[Row]) -> list[Span]:
    """Split a front into ranges in which all models are pruned, or all are dense."""
    groups = [tuple(group) for _, group in groupby(best, key=lambda row: row.pruned)]
    ends = [group[0].perplexity for group in groups[1:]]
    return [
        Span(group[0].perplexity, end, group)
        for group, end in zip(groups, [*ends, None], strict=True)
    ]


def sentence(rows: Sequence[Row], cost: Cost) -> str:
    """Say what a front shows, for readers who know neither the runtimes nor this project."""
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
    """Return a cost with its unit."""
    if cost == "size":
        return f"{row.bytes / 1e6:.0f} MB"
    return f"{getattr(row, cost).median * 1e3:.1f} ms"


def _ranges(found: Sequence[Span]) -> str:
    return " or ".join(map(str, found))


def _listed(found: Sequence[Span], cost: Cost) -> str:
    return "; ".join(_each(found, cost))


def _each(found: Sequence[Span], cost: Cost) -> Iterator[str]:
    for row in (row for span in found for row in span.rows):
        yield f"{row.name} (perplexity {row.perplexity:.{_DECIMALS}f}, {shown(row, cost)})"
