import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from thanos_deploy.model.verdict import judge
from thanos_deploy.pattern import SemiStructured, Structured, Unstructured


@given(arrays(np.bool_, (3, 16)), st.integers(1, 3))
def test_n_of_m_is_judged_as_counting_every_group_would(nonzero: np.ndarray, kept: int) -> None:
    expected = all(
        row[start : start + 4].sum() <= kept for row in nonzero for start in range(0, 16, 4)
    )
    assert judge(nonzero, SemiStructured(kept, 4)).holds == expected


def test_a_width_that_the_group_does_not_divide_does_not_hold() -> None:
    assert not judge(np.zeros((2, 6), dtype=bool), SemiStructured(2, 4)).holds


@pytest.mark.parametrize(("zeros", "holds"), [(39, False), (41, True), (50, True), (51, True)])
def test_unstructured_needs_the_full_count_rounded_down_in_each_row(
    zeros: int, holds: bool
) -> None:
    nonzero = np.ones(100, dtype=bool)
    nonzero[:zeros] = False
    verdict = judge(nonzero.reshape(10, 10), Unstructured(0.5))
    assert verdict.holds == holds
    assert verdict.sparsity == zeros / 100


def test_structured_counts_columns_that_are_zero_throughout() -> None:
    nonzero = np.ones((4, 10), dtype=bool)
    nonzero[:, :3] = False
    assert judge(nonzero, Structured(0.3)).holds
    assert not judge(nonzero, Structured(0.4)).holds
