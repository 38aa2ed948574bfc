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


@pytest.mark.slow
def test_counts_above_two_to_the_24_are_exact() -> None:
    entries = (1 << 24) + 4097
    assert masks.removed_count(0.3, 10 * entries) == 3 * entries
    scores = torch.zeros(4097, 4096)
    scores[:, -1] = 1.0
    count = 4097 * 4095 + 5
    assert int(masks.smallest_in_matrix(scores, count).sum()) == count


@settings(deadline=None, max_examples=60)
@given(
    shape=st.sampled_from([(2, 4), (4, 8), (1, 4), (0, 2), (3, 3), (5, 12)]),
    groups=st.integers(1, 5),
    levels=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_a_group_loses_its_smallest_and_of_equal_ones_the_lower_columns(
    shape: tuple[int, int], groups: int, levels: int, seed: int
) -> None:
    kept, group = shape
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (3, groups * group), generator=g).float()
    expected = [
        sorted(range(group), key=lambda column: (one[column].item(), column))[: group - kept]
        for one in scores.reshape(-1, group)
    ]
    mask = masks.smallest_in_groups(scores, kept, group).reshape(-1, group)
    assert [one.nonzero().flatten().tolist() for one in mask] == [sorted(one) for one in expected]


def test_equal_scores_in_a_group_remove_the_lower_columns() -> None:
    mask = masks.smallest_in_groups(torch.ones(1, 8), 2, 4)
    assert mask.tolist() == [[True, True, False, False] * 2]


def test_smallest_columns_go_in_column_order_when_equal() -> None:
    assert masks.smallest_columns(torch.tensor([2.0, 1.0, 1.0, 1.0]), 2).tolist() == [
        *(False, True, True, False)
    ]


def test_the_cheapest_are_the_smallest_columns() -> None:
    scores = torch.tensor([2.0, 1.0, 1.0, 0.5, 1.0])
    assert masks.cheapest(scores, 3).tolist() == [1, 2, 3]
    assert masks.cheapest(scores, 0).tolist() == []
