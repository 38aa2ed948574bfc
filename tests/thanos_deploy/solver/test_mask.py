import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thanos_deploy.solver import mask as masks


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 12),
    sparsity=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]),
    levels=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_counts_are_exact_with_ties_and_ties_go_in_column_order(
    rows: int, cols: int, sparsity: float, levels: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (rows, cols), generator=g).float()
    count = masks.removed_count(sparsity, rows * cols)
    mask = masks.smallest_in_matrix(scores, count)
    by_rule = sorted((scores[r, c].item(), c, r) for r in range(rows) for c in range(cols))[:count]
    expected = torch.zeros_like(mask)
    for _, c, r in by_rule:
        expected[r, c] = True
    assert torch.equal(mask, expected)


# Small matrices with many equal scores, and how many of those are removed.
with_ties = given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 12),
    fraction=st.floats(0.0, 1.0),
    levels=st.integers(1, 50),
    seed=st.integers(0, 2**31),
)


@settings(deadline=None, max_examples=40)
@with_ties
def test_the_first_columns_are_marked_as_they_are_in_the_whole_matrix(
    rows: int, cols: int, fraction: float, levels: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (rows, cols), generator=g).float() / 10
    count = masks.removed_count(fraction, rows * cols)
    threshold = masks.threshold(scores, count)
    if count:
        assert threshold.value == scores.flatten().sort().values[count - 1]
    whole = masks.smallest_in_matrix(scores, count)
    for columns in range(cols + 1):
        assert torch.equal(threshold.mark(scores[:, :columns]), whole[:, :columns])


@pytest.mark.slow
def test_counts_above_two_to_the_24_are_exact() -> None:
    entries = (1 << 24) + 4097
    assert masks.removed_count(0.3, 10 * entries) == 3 * entries
    scores = torch.zeros(4097, 4096)
    scores[:, -1] = 1.0
    count = 4097 * 4095 + 5
    assert int(masks.smallest_in_matrix(scores, count).sum()) == count


def test_equal_scores_in_a_group_remove_the_lower_columns() -> None:
    mask = masks.smallest_in_groups(torch.ones(1, 8), 2, 4)
    assert mask.tolist() == [[True, True, False, False] * 2]


def test_smallest_columns_go_in_column_order_when_equal() -> None:
    assert masks.smallest_columns(torch.tensor([2.0, 1.0, 1.0, 1.0]), 2).tolist() == [
        *(False, True, True, False)
    ]


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(
        st.one_of(
            st.floats(0.0, width=32, allow_infinity=False),
            st.sampled_from([0.0, 1.0, 2.0**-149, 2.0**-126, 1.5]),
        ),
        min_size=1,
        max_size=40,
    ),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_the_kth_smallest_is_that_of_numpy(
    values: list[float], dtype: torch.dtype, data: st.DataObject
) -> None:
    scores = torch.tensor(values, dtype=dtype).abs()  # no -0.0
    count = data.draw(st.integers(1, len(values)))
    found = masks.kth_smallest(scores, torch.tensor(count))
    assert found.dtype == dtype
    assert found.item() == np.partition(scores.numpy(), count - 1)[count - 1]


@settings(deadline=None, max_examples=40)
@with_ties
def test_a_gpu_marks_what_a_processor_marks(
    rows: int, cols: int, fraction: float, levels: int, seed: int
) -> None:
    scores = torch.randint(levels, (rows, cols), generator=torch.Generator().manual_seed(seed)) / 10
    count = masks.removed_count(fraction, rows * cols)
    value = masks.kth_smallest(scores, count)
    ties = torch.tensor(count) - torch.count_nonzero(scores < value)
    found = masks.Threshold(value, ties).mark(scores)
    assert torch.equal(found, masks.smallest_in_matrix(scores, count))


def test_the_cheapest_are_the_smallest_columns() -> None:
    scores = torch.tensor([2.0, 1.0, 1.0, 0.5, 1.0])
    assert masks.cheapest(scores, 3).tolist() == [1, 2, 3]
    assert masks.cheapest(scores, 0).tolist() == []
