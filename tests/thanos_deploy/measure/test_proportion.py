import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from thanos_deploy.measure.proportion import change, share


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_share_has_the_interval_of_wilson(case: tuple[int, int]) -> None:
    right, count = case
    found, expected = share(right, count), binomtest(right, count).proportion_ci(method="wilson")
    assert found.estimate == right / count
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)
    assert found.estimate in found


def test_a_change_is_that_of_matched_pairs() -> None:
    before = [True] * 70 + [False] * 30
    after = [True] * 60 + [False] * 10 + [True] * 4 + [False] * 26
    found = change(before, after)
    assert found.estimate == pytest.approx(-0.06)
    # Agresti and Min: (4.5 - 10.5) / 102 and its standard error.
    middle, error = -6 / 102, ((4.5 + 10.5) - 36 / 102) ** 0.5 / 102
    assert found.low == pytest.approx(middle - 1.959964 * error)
    assert found.high == pytest.approx(middle + 1.959964 * error)


def test_the_interval_of_a_change_holds_the_true_one_as_often_as_it_says() -> None:
    draw = random.Random(0)
    held, rounds = 0, 1000
    for _ in range(rounds):
        # Right before and after, only before, only after, never; the true change is -0.1.
        kinds = draw.choices([(1, 1), (1, 0), (0, 1), (0, 0)], [0.4, 0.2, 0.1, 0.3], k=150)
        before, after = zip(*((bool(a), bool(b)) for a, b in kinds), strict=True)
        held += -0.1 in change(before, after)
    assert 0.93 < held / rounds < 0.97


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_a_change_the_other_way_round_is_the_opposite(pairs: list[tuple[bool, bool]]) -> None:
    before, after = zip(*pairs, strict=True)
    one, other = change(before, after), change(after, before)
    assert one.estimate == -other.estimate
    assert one.low == pytest.approx(-other.high)
