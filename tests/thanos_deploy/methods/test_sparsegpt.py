import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden import damped, golden_problem, loss, random_problem
from thanos_deploy.methods import sparsegpt, thanos
from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured
from thanos_deploy.solver.hessian import factor


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [(Unstructured(0.5), 8622.699225), (SemiStructured(2, 4), 13005.028720)],
    ids=str,
)
def test_golden_losses(pattern: Pattern, expected: float) -> None:
    problem = golden_problem()
    result = sparsegpt.prune(problem, pattern, sparsegpt.Options(block_columns=16))
    assert loss(problem, result.weight) == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), block=st.sampled_from([1, 3, 8, 16]))
def test_the_update_is_the_surgeons_column_by_column(seed: int, block: int) -> None:
    """Each removed weight in turn, with an explicit inverse of what is right of it."""
    problem = random_problem(seed)
    result = sparsegpt.prune(problem, Unstructured(0.5), sparsegpt.Options(block_columns=block))
    W, H = problem.weight.clone(), damped(problem.hessian)
    for column in range(16):
        A = torch.linalg.inv(H[column:, column:])
        for row in result.mask[:, column].nonzero().flatten():
            W[row, column:] -= W[row, column] / A[0, 0] * A[0]
            W[row, column] = 0.0
    torch.testing.assert_close(result.weight, W, rtol=1e-7, atol=1e-8)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_thanos_with_blocks_of_one_column_updates_alike(seed: int) -> None:
    """With the same mask: everything but the kept columns of one group is removed alike."""
    problem = random_problem(seed, cols=8)
    one = sparsegpt.prune(problem, Structured(1.0), sparsegpt.Options(block_columns=8))
    two = thanos.prune(problem, Unstructured(1.0), thanos.Options(block_columns=1))
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-9, atol=1e-9)
    U = factor(problem).upper(slice(None))
    assert loss(problem, one.weight) == pytest.approx(
        0.5 * (problem.weight @ U).square().sum().item(), rel=1e-9
    )


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_every_block_loses_exactly_its_share(sparsity: float) -> None:
    problem = random_problem(1, rows=10, cols=48)
    result = sparsegpt.prune(problem, Unstructured(sparsity), sparsegpt.Options(block_columns=16))
    counts = result.mask.reshape(10, 3, 16).sum(dim=(0, 2)).tolist()
    assert counts == [int(sparsity * 160 + 1e-6)] * 3


def test_groups_are_chosen_from_the_weights_as_they_are_when_reached() -> None:
    problem = random_problem(2)
    small = sparsegpt.prune(problem, SemiStructured(2, 4), sparsegpt.Options(block_columns=4))
    large = sparsegpt.prune(problem, SemiStructured(2, 4), sparsegpt.Options(block_columns=16))
    assert torch.equal(small.mask, large.mask)
    torch.testing.assert_close(small.weight, large.weight, rtol=1e-9, atol=1e-10)


def test_structured_removes_the_same_number_of_columns_from_every_block() -> None:
    problem = random_problem(3, cols=32)
    result = sparsegpt.prune(problem, Structured(0.3), sparsegpt.Options(block_columns=16))
    columns = result.mask.all(dim=0)
    assert torch.equal(columns, result.mask.any(dim=0))
    assert columns.reshape(2, 16).sum(dim=1).tolist() == [5, 5]
