import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sharers import divided, solve_together
from thanos_deploy.solver import mask as masks
from thanos_deploy.solver.division import Division
from thanos_deploy.solver.threshold import Threshold, kth_smallest, threshold

# Small matrices with many equal scores, and how many of those are removed.
WITH_TIES = {
    "rows": st.integers(1, 9),
    "cols": st.integers(1, 12),
    "fraction": st.floats(0.0, 1.0),
    "levels": st.integers(1, 50),
    "seed": st.integers(0, 2**31),
}


@settings(deadline=None, max_examples=40)
@given(**WITH_TIES)
def test_the_first_columns_are_marked_as_they_are_in_the_whole_matrix(
    rows: int, cols: int, fraction: float, levels: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (rows, cols), generator=g).float() / 10
    count = masks.removed_count(fraction, rows * cols)
    found = threshold(scores, count)
    if count:
        assert found.value == scores.flatten().sort().values[count - 1]
    whole = masks.smallest_in_matrix(scores, count)
    for columns in range(cols + 1):
        assert torch.equal(found.mark(scores[:, :columns]), whole[:, :columns])


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
    found = kth_smallest(scores, torch.tensor(count))
    assert found.dtype == dtype
    assert found.item() == np.partition(scores.numpy(), count - 1)[count - 1]


@settings(deadline=None, max_examples=40)
@given(**WITH_TIES)
def test_a_gpu_marks_what_a_processor_marks(
    rows: int, cols: int, fraction: float, levels: int, seed: int
) -> None:
    scores = torch.randint(levels, (rows, cols), generator=torch.Generator().manual_seed(seed)) / 10
    count = masks.removed_count(fraction, rows * cols)
    value = kth_smallest(scores, count)
    ties = torch.tensor(count) - torch.count_nonzero(scores < value)
    found = Threshold(value, ties, Division.whole(rows)).mark(scores)
    assert torch.equal(found, masks.smallest_in_matrix(scores, count))


@settings(deadline=None, max_examples=60)
@given(**WITH_TIES, runs=st.integers(1, 5), members=st.integers(1, 4))
def test_those_who_share_the_rows_mark_what_one_marks(
    rows: int, cols: int, fraction: float, levels: int, seed: int, runs: int, members: int
) -> None:
    scores = torch.randint(levels, (rows, cols), generator=torch.Generator().manual_seed(seed)) / 10
    count = masks.removed_count(fraction, rows * cols)
    first = cols // 2  # of the first columns
    wanted = threshold(scores, count).mark(scores[:, :first])

    def mark(own: torch.Tensor, division: Division) -> tuple[torch.Tensor, int]:
        found = threshold(own, torch.tensor(count), division)
        mask, gone = found.mark_and_count(own[:, :first])
        return mask, int(gone)

    shares = divided(rows, runs, members)
    for share, (mask, gone) in zip(shares, solve_together(scores, shares, mark), strict=True):
        assert torch.equal(mask, torch.cat([wanted[one] for one in share]))
        assert gone == int(wanted.sum())
