"""What the mathematics of the update promises, whatever computes it."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.golden import damped, golden_problem, loss, random_problem
from thanos_deploy import methods
from thanos_deploy.methods import magnitude, sparsegpt, thanos
from thanos_deploy.pattern import SemiStructured, Structured, Unstructured
from thanos_deploy.solver.hessian import factor
from thanos_deploy.solver.layer import LayerProblem
from thanos_deploy.solver.mask import removed_count

TWO_FOUR = SemiStructured(2, 4)
seeds = given(seed=st.integers(0, 2**31))


def blockwise(problem: LayerProblem, mask: Tensor, block: int) -> Tensor:
    """The paper's update for a given mask, row by row, with explicit inverses."""
    W, H = problem.weight.clone(), damped(problem.hessian)
    for start in range(0, W.shape[1], block):
        A = torch.linalg.inv(H[start:, start:])
        for row in range(len(W)):
            P = mask[row, start : start + block].nonzero().flatten()
            if len(P):
                W[row, start:] -= torch.linalg.solve(A[P][:, P].T, W[row, start + P]) @ A[P]
        W[:, start : start + block][mask[:, start : start + block]] = 0.0
    return W


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), sparsity=st.sampled_from([0.1, 0.4, 0.5, 0.9]))
def test_the_lemma_of_one_row(seed: int, sparsity: float) -> None:
    """The update is the least-squares fit of what is kept, and costs 1/2 u R^-1 u^T."""
    problem = random_problem(seed, rows=1)
    result = thanos.prune(problem, Unstructured(sparsity), thanos.Options(block_columns=16))
    H, P = damped(problem.hessian), result.mask[0]
    fit = torch.linalg.solve(H[~P][:, ~P], H[~P] @ problem.weight[0])
    torch.testing.assert_close(result.weight[0, ~P], fit, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        blockwise(problem, result.mask, 16), result.weight, rtol=1e-9, atol=1e-9
    )
    u, R = problem.weight[0, P], torch.linalg.inv(H)[P][:, P]
    price = 0.5 * u @ torch.linalg.solve(R, u)
    assert loss(problem, result.weight) == pytest.approx(price.item(), rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), start=st.sampled_from([0, 4, 12]))
def test_the_rows_of_a_block_hold_all_that_its_trailing_inverse_is_needed_for(
    seed: int, start: int
) -> None:
    problem = random_problem(seed)
    factored, stop = factor(problem), start + 4
    A = torch.linalg.inv(damped(problem.hessian)[start:, start:])
    U, V = factored.upper(slice(start, stop)), factored.V[start:stop, start:]
    torch.testing.assert_close(V[:, :4].T @ V, A[:4], rtol=1e-8, atol=1e-10)
    inverse = torch.linalg.inv(A[:4, :4])
    torch.testing.assert_close(U @ U.T, inverse, rtol=1e-8, atol=1e-8)


@settings(deadline=None, max_examples=20)
@seeds
def test_one_block_for_all_columns_loses_least_of_all_with_its_mask(seed: int) -> None:
    problem = random_problem(seed)
    joint = thanos.prune(problem, TWO_FOUR, thanos.Options(block_columns=16))
    least = loss(problem, joint.weight)
    for block in (1, 4, 8):
        assert least <= loss(problem, blockwise(problem, joint.mask, block)) * (1 + 1e-12)
    masked = torch.where(joint.mask, 0.0, problem.weight)
    assert least <= loss(problem, masked) * (1 + 1e-12)


@settings(deadline=None, max_examples=20)
@seeds
def test_blocks_of_one_column_are_sparsegpt_with_the_same_mask(seed: int) -> None:
    problem = random_problem(seed)
    for pattern in (TWO_FOUR, Unstructured(0.5)):
        result = sparsegpt.prune(problem, pattern, sparsegpt.Options(block_columns=8))
        torch.testing.assert_close(
            blockwise(problem, result.mask, 1), result.weight, rtol=1e-7, atol=1e-8
        )


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), block=st.sampled_from([4, 8, 16]))
def test_nothing_more_is_to_be_had_from_what_the_last_block_keeps(seed: int, block: int) -> None:
    """The gradient vanishes there; with one block, on all that is kept."""
    problem = random_problem(seed)
    result = thanos.prune(problem, TWO_FOUR, thanos.Options(block_columns=block))
    gradient = (result.weight - problem.weight) @ damped(problem.hessian)
    last = (gradient * ~result.mask)[:, -block:]
    assert last.abs().max() <= 1e-9 * (problem.weight @ damped(problem.hessian)).abs().max()


def test_golden_counts_by_column() -> None:
    problem = golden_problem()
    for block, last in ((8, (54,)), (16, (54, 55)), (32, (54, 55)), (64, (54, 55))):
        mask = thanos.prune(problem, Unstructured(0.5), thanos.Options(block_columns=block)).mask
        assert int(mask[:, :8].sum()) == 67
        assert int(mask[:, 56:].sum()) in last


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", ["magnitude", "thanos"])
def test_counts_are_exact_though_weights_and_inputs_repeat(name: str, sparsity: float) -> None:
    """Weights of five values, two equal inputs, two dead ones; rows and columns of odd number."""
    problem = random_problem(0, rows=7, cols=19)
    g = torch.Generator().manual_seed(1)
    problem.weight[:] = torch.randint(-2, 3, (7, 19), generator=g)
    H = problem.hessian
    H[1], H[:, 1] = H[0].clone(), H[:, 0].clone()
    H[1, 1] = H[0, 0]
    H[[4, 9]] = 0.0
    H[:, [4, 9]] = 0.0
    method = methods.load(name)
    result = method.prune(problem, Unstructured(sparsity), method.options())
    assert int(result.mask.sum()) == removed_count(sparsity, 7 * 19)
    alive = torch.ones(19, dtype=torch.bool)
    alive[[4, 9]] = False
    zeros = (result.weight == 0) & ~result.mask
    assert not (zeros & (problem.weight != 0))[:, alive].any()
    if sparsity == 0.0:
        assert torch.equal(result.weight, problem.weight)


def test_equal_scores_go_column_by_column_and_row_by_row() -> None:
    problem = LayerProblem(torch.ones(3, 4), torch.eye(4), "alike")
    mask = magnitude.prune(problem, Unstructured(0.42), magnitude.Options()).mask
    assert mask.T.flatten().tolist() == [True] * 5 + [False] * 7


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), score=st.sampled_from(["wanda", "obs"]))
def test_rows_know_nothing_of_each_other_where_the_pattern_does_not_join_them(
    seed: int, score: Literal["wanda", "obs"]
) -> None:
    problem = random_problem(seed, rows=8)
    options = thanos.Options(block_columns=8, score=score, refit_steps=3)
    together = thanos.prune(problem, TWO_FOUR, options)
    for part in (slice(0, 1), slice(1, 5), slice(5, 8)):
        some = LayerProblem(problem.weight[part], problem.hessian, "part")
        alone = thanos.prune(some, TWO_FOUR, options)
        assert torch.equal(alone.mask, together.mask[part])
        torch.testing.assert_close(alone.weight, together.weight[part], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", [TWO_FOUR, Unstructured(0.5), Structured(0.25)], ids=str)
@pytest.mark.parametrize("name", methods.names())
def test_float32_differs_from_float64_only_where_scores_are_all_but_equal(
    name: str, pattern: SemiStructured | Unstructured | Structured
) -> None:
    problem = random_problem(10, rows=32, cols=64, tokens=512)
    single = LayerProblem(problem.weight.float(), problem.hessian.float(), "single")
    method = methods.load(name)
    one, two = (method.prune(p, pattern, method.options()) for p in (problem, single))
    assert (one.mask != two.mask).float().mean() < 1e-3
    assert loss(problem, two.weight.double()) == pytest.approx(loss(problem, one.weight), rel=1e-4)
