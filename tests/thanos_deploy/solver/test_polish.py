from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.golden import damped, golden_problem, loss, random_problem
from thanos_deploy.methods import thanos
from thanos_deploy.pattern import SemiStructured, Structured, Unstructured
from thanos_deploy.solver.hessian import factor
from thanos_deploy.solver.layer import LayerProblem
from thanos_deploy.solver.mask import smallest_in_groups
from thanos_deploy.solver.polish import few_masks, polish

TWO_FOUR, FOUR_EIGHT = SemiStructured(2, 4), SemiStructured(4, 8)


def pruned(problem: LayerProblem, pattern: SemiStructured) -> Tensor:
    """By magnitude, without an update."""
    mask = smallest_in_groups(problem.weight.abs(), pattern.kept, pattern.group)
    return torch.where(mask, 0.0, problem.weight)


def polished(
    problem: LayerProblem, start: Tensor, pattern: SemiStructured
) -> tuple[Tensor, Tensor]:
    diagonal = factor(problem).diagonal
    return polish(problem.weight, problem.hessian, diagonal, start, pattern)


def by_trying(problem: LayerProblem, start: Tensor, pattern: SemiStructured) -> np.ndarray:
    """Every group of every row in turn: all masks, each fitted with everything else fixed."""
    H, W, new = damped(problem.hessian).numpy(), problem.weight.numpy(), start.numpy().copy()
    for row in range(len(W)):
        for first in range(0, W.shape[1], pattern.group):
            found = []
            for kept in combinations(range(first, first + pattern.group), pattern.kept):
                trial = new[row].copy()
                trial[first : first + pattern.group] = 0.0
                error = trial - W[row]
                own = np.ix_(kept, kept)
                trial[list(kept)] = -np.linalg.solve(H[own], (H @ error)[list(kept)])
                error = trial - W[row]
                found.append((error @ H @ error, trial))
            new[row] = min(found, key=lambda one: one[0])[1]
    return new


@pytest.mark.parametrize("pattern", [TWO_FOUR, FOUR_EIGHT, SemiStructured(1, 4)], ids=str)
def test_each_group_gets_the_best_of_all_its_masks(pattern: SemiStructured) -> None:
    problem = random_problem(3, rows=5, cols=16)
    start = pruned(problem, pattern)
    weight, removed = polished(problem, start, pattern)
    expected = by_trying(problem, start, pattern)
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(removed, weight == 0.0)


@pytest.mark.slow
@given(seed=st.integers(0, 10_000))
def test_a_layer_of_one_group_gets_the_best_mask_there_is(seed: int) -> None:
    problem = random_problem(seed, rows=4, cols=4)
    weight, removed = polished(problem, pruned(problem, TWO_FOUR), TWO_FOUR)
    H = damped(problem.hessian)
    for row in range(4):
        losses = []
        for gone in combinations(range(4), 2):
            multipliers = torch.linalg.solve(
                torch.linalg.inv(H)[np.ix_(gone, gone)], problem.weight[row, list(gone)]
            )
            losses.append((multipliers @ problem.weight[row, list(gone)]).item())
        error = weight[row] - problem.weight[row]
        assert (error @ H @ error).item() == pytest.approx(min(losses), rel=1e-7, abs=1e-9)
    assert removed.sum(dim=1).tolist() == [2] * 4


@pytest.mark.slow
@given(seed=st.integers(0, 10_000), pattern=st.sampled_from([TWO_FOUR, FOUR_EIGHT]))
def test_no_pass_loses_more_than_there_was_before_it(seed: int, pattern: SemiStructured) -> None:
    problem = random_problem(seed, rows=3, cols=24)
    weight = pruned(problem, pattern)
    before = loss(problem, weight)
    for _ in range(3):
        weight, removed = polished(problem, weight, pattern)
        after = loss(problem, weight)
        assert after <= before * (1 + 1e-9) + 1e-12
        before = after
        groups = removed.unflatten(1, (-1, pattern.group)).sum(dim=2)
        assert (groups == pattern.group - pattern.kept).all()


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = golden_problem()
    start = pruned(problem, TWO_FOUR)
    whole, mask = polished(problem, start, TWO_FOUR)
    for width in (4, 10, 60):  # of which as many columns as are whole groups
        monkeypatch.setattr("thanos_deploy.solver.polish._BLOCK", width)
        weight, removed = polished(problem, start, TWO_FOUR)
        torch.testing.assert_close(weight, whole, rtol=1e-9, atol=1e-12)
        assert torch.equal(removed, mask)


def test_after_a_method_it_loses_less() -> None:
    problem = golden_problem()
    for pattern in (TWO_FOUR, FOUR_EIGHT):
        options = thanos.Options(block_columns=16, score="obs", refit_steps=64)
        without = thanos.prune(problem, pattern, options)
        options = thanos.Options(block_columns=16, score="obs", refit_steps=64, mask_passes=1)
        result = thanos.prune(problem, pattern, options)
        assert loss(problem, result.weight) < 0.99 * loss(problem, without.weight)
        assert torch.equal(result.mask, result.weight == 0.0)
        assert not torch.equal(result.mask, without.mask)


def test_all_masks_are_tried_only_where_they_are_few() -> None:
    assert few_masks(TWO_FOUR)
    assert few_masks(FOUR_EIGHT)
    assert not few_masks(SemiStructured(8, 16))
    assert not few_masks(Unstructured(0.5))
    assert not few_masks(Structured(0.5))
    problem = random_problem(1, cols=32)
    some = thanos.Options(block_columns=16, mask_passes=2)
    none = thanos.Options(block_columns=16)
    eight = SemiStructured(8, 16)
    first, second = (thanos.prune(problem, eight, one).weight for one in (some, none))
    assert torch.equal(first, second)
