import pytest
from hypothesis import given
from hypothesis import strategies as st

from thanos_deploy.report.model import PlotPoint
from thanos_deploy.report.pareto import dominates

VALUES = st.integers(1, 6).map(float)


@st.composite
def points(draw: st.DrawFn, exact: bool = False) -> PlotPoint:
    cost = draw(VALUES)
    half = 0.0 if exact else draw(st.integers(0, 3)) / 2
    return PlotPoint("", draw(VALUES), cost, cost - half, cost + half)


@given(points(exact=True), points(exact=True))
def test_with_exact_costs_it_is_the_textbook_relation(one: PlotPoint, other: PlotPoint) -> None:
    no_worse = one.perplexity <= other.perplexity and one.cost <= other.cost
    assert dominates(one, other) == (
        no_worse and (one.perplexity, one.cost) != (other.perplexity, other.cost)
    )


@given(points(), points())
def test_two_models_never_dominate_each_other(one: PlotPoint, other: PlotPoint) -> None:
    assert not (dominates(one, other) and dominates(other, one))
    assert not dominates(one, one)


@given(st.lists(points(), min_size=1, max_size=8))
def test_somebody_is_always_on_the_front(all_points: list[PlotPoint]) -> None:
    assert any(not any(dominates(other, point) for other in all_points) for point in all_points)


@pytest.mark.parametrize(("low", "on_the_front"), [(0.9, False), (1.0, False), (0.8, True)])
def test_noise_puts_nobody_on_the_front(low: float, on_the_front: bool) -> None:
    """Worse in quality, and cheaper than the dense model only if the interval says so."""
    dense = PlotPoint("dense", 10.0, 1.0, 1.0, 1.0)
    pruned = PlotPoint("2:4", 12.0, 0.9, low, 0.99 if on_the_front else 1.1)
    assert dominates(dense, pruned) != on_the_front
