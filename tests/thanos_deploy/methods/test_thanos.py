"""Thanos against its definition, solved by brute force in float64.

Every pattern and option has an oracle here, so this file is longer than others.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.golden import damped, golden_problem, loss, random_problem
from thanos_deploy.errors import DeployError, HessianError, ModelError, UsageError
from thanos_deploy.methods import thanos
from thanos_deploy.pattern import SemiStructured, Structured, Unstructured
from thanos_deploy.solver.elimination import Elimination
from thanos_deploy.solver.hessian import factor
from thanos_deploy.solver.layer import LayerProblem
from thanos_deploy.solver.mask import smallest_columns, smallest_in_groups
from thanos_deploy.solver.masked import solve_masked

TWO_FOUR = SemiStructured(2, 4)


def naive_thanos(problem: LayerProblem, masks: dict[int, Tensor], block: int) -> Tensor:
    """The paper's update row by row, with an explicit inverse of every trailing Hessian."""
    W = problem.weight.clone()
    H = damped(problem.hessian)
    for start, mask in masks.items():
        A = torch.linalg.inv(H[start:, start:])
        for row in range(len(W)):
            P = mask[row].nonzero().flatten()
            if len(P):
                multipliers = torch.linalg.solve(A[P][:, P].T, W[row, start + P])
                W[row, start:] -= multipliers @ A[P]
        W[:, start : start + block][mask] = 0.0
    return W


@pytest.mark.parametrize(
    ("pattern", "block", "expected"),
    [
        (TWO_FOUR, 16, 8611.915409),
        (TWO_FOUR, 64, 8839.277603),
        (SemiStructured(4, 8), 16, 7712.734801),
        (SemiStructured(4, 8), 64, 7815.154499),
        (Unstructured(0.5), 8, 5819.850242),
        (Unstructured(0.5), 16, 5910.771620),
        (Unstructured(0.5), 32, 5486.256199),
        (Unstructured(0.5), 64, 5247.764982),
    ],
    ids=str,
)
def test_golden_losses(pattern: SemiStructured | Unstructured, block: int, expected: float) -> None:
    problem = golden_problem()
    result = thanos.prune(problem, pattern, thanos.Options(block_columns=block))
    assert loss(problem, result.weight) == pytest.approx(expected, rel=1e-9)
    assert int(result.mask.sum()) == 512


@pytest.mark.parametrize(
    ("block", "expected"),
    [(1, 9873.538042), (4, 7522.254598), (16, 6927.994657), (64, 5989.421619)],
)
def test_golden_losses_of_a_fixed_mask(block: int, expected: float) -> None:
    problem = golden_problem()
    scores = problem.weight.abs() * problem.hessian.diagonal().sqrt()
    order = scores.sort(dim=1, stable=True).indices[:, :32]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
    H = factor(problem)
    W = problem.weight.clone()
    for start in range(0, 64, block):
        stop = start + block
        U_block = H.upper(slice(start, stop))
        change = solve_masked(W[:, start:stop], mask[:, start:stop], U_block @ U_block.T)
        W[:, stop:] += change @ U_block @ H.V[start:stop, stop:]
        W[:, start:stop] = torch.where(mask[:, start:stop], 0.0, W[:, start:stop] + change)
    assert loss(problem, W) == pytest.approx(expected, rel=1e-9)


def test_one_block_for_all_columns_is_the_exact_masked_least_squares() -> None:
    problem = golden_problem()
    result = thanos.prune(problem, TWO_FOUR, thanos.Options(block_columns=64))
    H = damped(problem.hessian)
    for row in range(16):
        keep = ~result.mask[row]
        exact = torch.linalg.solve(H[keep][:, keep], H[keep] @ problem.weight[row])
        torch.testing.assert_close(result.weight[row, keep], exact, rtol=1e-8, atol=1e-10)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    block=st.sampled_from([1, 3, 4, 5, 8, 16]),
    sparsity=st.sampled_from([0.1, 0.5, 0.8, 1.0]),
)
def test_equals_the_row_by_row_update_with_explicit_inverses(
    seed: int, block: int, sparsity: float
) -> None:
    problem = random_problem(seed)
    result = thanos.prune(problem, Unstructured(sparsity), thanos.Options(block_columns=block))
    masks = {start: result.mask[:, start : start + block] for start in range(0, 16, block)}
    expected = naive_thanos(problem, masks, block)
    torch.testing.assert_close(result.weight, expected, rtol=1e-6, atol=1e-7)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31))
def test_losses_of_the_blocks_add_up(seed: int) -> None:
    problem = random_problem(seed)
    H = factor(problem)
    W, total = problem.weight.clone(), 0.0
    for start in range(0, 16, 4):
        stop = start + 4
        mask = smallest_in_groups(W[:, start:stop].abs(), 2, 4)
        U_block = H.upper(slice(start, stop))
        change = solve_masked(W[:, start:stop], mask, U_block @ U_block.T)
        total += 0.5 * (change @ U_block).square().sum().item()
        W[:, stop:] += change @ U_block @ H.V[start:stop, stop:]
        W[:, start:stop] += change
    assert total == pytest.approx(loss(problem, W), rel=1e-9)


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2)])
def test_every_group_of_every_row_loses_exactly_its_share(kept: int, group: int) -> None:
    problem = random_problem(1, cols=32)
    result = thanos.prune(problem, SemiStructured(kept, group), thanos.Options(block_columns=16))
    removed = result.mask.reshape(-1, group).sum(dim=1)
    assert (removed == group - kept).all()
    assert torch.equal(result.weight == 0, result.mask)
    assert not torch.signbit(result.weight[result.mask]).any()


def test_outlier_rows_stay_bit_identical_and_the_others_are_exact() -> None:
    problem = random_problem(2, rows=10)
    result = thanos.prune(problem, TWO_FOUR, thanos.Options(block_columns=8, outlier_rows=0.25))
    dense = ~result.mask.any(dim=1)
    assert int(dense.sum()) == 2
    assert torch.equal(result.weight[dense], problem.weight[dense])
    energy = ((problem.weight @ problem.hessian) * problem.weight).sum(dim=1)
    assert energy[dense].min() > energy[~dense].max()
    assert (result.mask[~dense].reshape(-1, 4).sum(dim=1) == 2).all()


def test_nothing_to_remove_returns_the_weights_bit_for_bit() -> None:
    problem = random_problem(3)
    result = thanos.prune(problem, Unstructured(0.0), thanos.Options())
    assert torch.equal(result.weight, problem.weight)
    assert result.relative_error == 0.0


@pytest.mark.parametrize("scale", [0.25, 64.0])
def test_scaling_the_hessian_changes_nothing(scale: float) -> None:
    problem = random_problem(4)
    scaled = LayerProblem(problem.weight, problem.hessian * scale, "scaled")
    one, two = (
        thanos.prune(p, TWO_FOUR, thanos.Options(block_columns=8)) for p in (problem, scaled)
    )
    assert torch.equal(one.mask, two.mask)
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-9, atol=1e-12)


def test_permuting_rows_permutes_the_result() -> None:
    problem = random_problem(5)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    permuted = LayerProblem(problem.weight[order], problem.hessian, "permuted")
    one, two = (
        thanos.prune(p, TWO_FOUR, thanos.Options(block_columns=8)) for p in (problem, permuted)
    )
    torch.testing.assert_close(one.weight[order], two.weight, rtol=1e-9, atol=1e-12)


def test_dead_inputs_are_removed_first_and_leave_no_nan() -> None:
    problem = random_problem(6)
    problem.hessian[3] = problem.hessian[:, 3] = 0.0
    result = thanos.prune(problem, TWO_FOUR, thanos.Options(block_columns=8))
    assert result.mask[:, 3].all()
    assert result.weight.isfinite().all()


def test_an_all_zero_layer_and_an_all_dead_input_are_pruned_without_loss() -> None:
    zeros = LayerProblem(torch.zeros(4, 8), torch.eye(8), "zeros")
    dead = LayerProblem(torch.ones(4, 8), torch.zeros(8, 8), "dead")
    for problem in (zeros, dead):
        result = thanos.prune(problem, TWO_FOUR, thanos.Options())
        assert result.relative_error == 0.0
        assert (result.mask.reshape(-1, 4).sum(dim=1) == 2).all()


def test_fewer_tokens_than_inputs_and_duplicate_columns_work() -> None:
    problem = random_problem(7, tokens=4)
    problem.hessian[1], problem.hessian[:, 1] = problem.hessian[0], problem.hessian[:, 0]
    result = thanos.prune(problem, TWO_FOUR, thanos.Options())
    assert result.weight.isfinite().all()
    assert 0.0 <= result.relative_error < 1.0


def test_an_indefinite_hessian_is_damped_harder_and_the_result_says_so() -> None:
    problem = random_problem(8)
    shifted = problem.hessian - 0.05 * problem.hessian.diagonal().mean() * torch.eye(16)
    result = thanos.prune(
        LayerProblem(problem.weight, shifted, "indefinite"), Unstructured(0.5), thanos.Options()
    )
    assert result.damping == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("outlier_rows", "columns", "zeros", "expected"),
    [(0.0, 20, 320, 8601.529830), (0.125, 22, 308, 8254.663897)],
)
def test_golden_losses_of_whole_columns(
    outlier_rows: float, columns: int, zeros: int, expected: float
) -> None:
    problem = golden_problem()
    result = thanos.prune(problem, Structured(0.3), thanos.Options(outlier_rows=outlier_rows))
    assert loss(problem, result.weight) == pytest.approx(expected, rel=1e-9)
    assert int(result.mask.sum()) == zeros
    outliers = (~result.mask.any(dim=1)).nonzero().flatten().tolist()
    assert outliers == ([3, 7] if outlier_rows else [])
    removed = result.mask[0].nonzero().flatten().tolist()
    assert len(removed) == columns
    if not outlier_rows:
        assert removed == [
            2,
            4,
            5,
            9,
            14,
            15,
            16,
            17,
            18,
            23,
            25,
            30,
            32,
            34,
            37,
            42,
            46,
            48,
            52,
            57,
        ]


def test_whole_columns_are_the_exact_least_squares_on_the_kept_ones() -> None:
    problem = random_problem(15)
    result = thanos.prune(problem, Structured(0.5), thanos.Options())
    H, keep = damped(problem.hessian), ~result.mask[0]
    exact = torch.linalg.solve(H[keep][:, keep], H[keep] @ problem.weight.T).T
    torch.testing.assert_close(result.weight[:, keep], exact, rtol=1e-9, atol=1e-10)


def test_the_obs_score_of_columns_is_the_loss_of_removing_each_alone() -> None:
    problem = random_problem(16)
    one = thanos.prune(problem, Structured(1 / 16), thanos.Options(score="obs"))
    losses = []
    for column in range(16):
        keep = torch.arange(16) != column
        H = damped(problem.hessian)
        exact = torch.zeros_like(problem.weight)
        exact[:, keep] = torch.linalg.solve(H[keep][:, keep], H[keep] @ problem.weight.T).T
        losses.append(loss(problem, exact))
    assert one.mask[0].nonzero().item() == int(torch.tensor(losses).argmin())


def test_a_refit_is_the_exact_least_squares_of_the_final_mask() -> None:
    problem = golden_problem()
    result = thanos.prune(problem, TWO_FOUR, thanos.Options(block_columns=16, refit_steps=200))
    H = damped(problem.hessian)
    for row in range(16):
        keep = ~result.mask[row]
        exact = torch.linalg.solve(H[keep][:, keep], H[keep] @ problem.weight[row])
        torch.testing.assert_close(result.weight[row, keep], exact, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("pattern", [TWO_FOUR, Unstructured(0.5), Unstructured(0.7)], ids=str)
def test_refit_steps_only_lower_the_loss_and_keep_the_mask(
    pattern: SemiStructured | Unstructured,
) -> None:
    problem = golden_problem()
    results = [
        thanos.prune(problem, pattern, thanos.Options(block_columns=16, refit_steps=n))
        for n in (0, 1, 3, 10)
    ]
    losses = [loss(problem, result.weight) for result in results]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(result.mask, results[0].mask) for result in results)


def test_a_float32_refit_is_as_good_as_a_float64_one() -> None:
    problem = random_problem(18, rows=64, cols=128, tokens=512)
    options = thanos.Options(block_columns=32, refit_steps=12)
    exact = thanos.prune(problem, TWO_FOUR, options)
    single = LayerProblem(problem.weight.float(), problem.hessian.float(), "single")
    result = thanos.prune(single, TWO_FOUR, options)
    assert loss(problem, result.weight.double()) < 1.0001 * loss(problem, exact.weight)


def test_a_refit_with_rounded_products_is_nearly_as_good_and_keeps_what_is_exact() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(96, 96, generator=g) @ torch.randn(96, 400, generator=g)
    weight = torch.randn(48, 96, generator=g)
    results = {
        products: thanos.prune(
            LayerProblem(weight, x @ x.T, "layer", products=products),
            TWO_FOUR,
            thanos.Options(score="obs", block_columns=16, refit_steps=20),
        )
        for products in (torch.float32, torch.bfloat16)
    }
    exact, rounded = results.values()
    assert torch.equal(exact.mask, rounded.mask)
    assert bool((rounded.weight[rounded.mask] == 0).all())
    assert rounded.relative_error == pytest.approx(exact.relative_error, rel=0.01)
    # Where blocks have solved everything there is nothing left to round.
    problem = LayerProblem(weight, x @ x.T, "layer", products=torch.bfloat16)
    columns, refitted = (
        thanos.prune(problem, Structured(0.3), thanos.Options(score="obs", refit_steps=steps))
        for steps in (0, 8)
    )
    assert torch.equal(columns.weight, refitted.weight)


def test_a_solved_row_stays_as_it_is_whatever_the_others_need() -> None:
    problem = random_problem(3, rows=8, cols=32)
    weight = problem.weight.float()
    mask = smallest_in_groups(weight.abs(), 2, 4)
    S = damped(problem.hessian).float()
    together = solve_masked(weight, mask, S, tolerance=0.1)
    for row in range(len(weight)):
        alone = solve_masked(weight[[row]], mask[[row]], S, tolerance=0.1)
        torch.testing.assert_close(together[[row]], alone, rtol=1e-4, atol=1e-5)


def test_columns_go_by_what_they_lose_and_not_by_what_the_damping_says() -> None:
    """Few inputs that are much larger than the others make the damping large, as in a first block.

    Damped prices then keep small inputs with large weights, of which the output needs little.
    """
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 500, generator=generator, dtype=torch.float64)
    x = torch.randn(64, 64, generator=generator, dtype=torch.float64) @ x
    x[0] *= 60.0
    x[1:25] *= 0.02
    weight = torch.randn(24, 64, generator=generator, dtype=torch.float64)
    weight[:, 1:25] *= 20.0
    problem = LayerProblem(weight, x @ x.T, "first block")

    def lost(new: Tensor) -> float:
        return ((new - weight) @ x).square().sum().item()

    def eliminated(*, by_score: bool) -> float:
        fitted = Elimination(weight, factor(problem))
        if by_score:
            scores = weight.square().sum(dim=0) * problem.hessian.diagonal()
            fitted.remove(scores.sort().indices[:20])
        else:
            for part in (3, 2, 3, 2, 3, 2, 3, 2):
                fitted.remove(fitted.costs().sort().indices[:part])
        return lost(fitted.weight)

    of_score, of_prices = eliminated(by_score=True), eliminated(by_score=False)
    assert of_prices > 1.5 * of_score
    result = thanos.prune(problem, Structured(0.3), thanos.Options(score="obs"))
    assert lost(result.weight) == pytest.approx(of_score, rel=1e-9)
    # Elsewhere the prices are better.
    usual = random_problem(5, rows=8, cols=32)
    by_price, by_score = (
        thanos.prune(usual, Structured(0.3), thanos.Options(score=score)).relative_error
        for score in ("obs", "wanda")
    )
    assert by_price < by_score


def test_columns_that_go_in_rounds_cost_less_than_all_at_once() -> None:
    at_once, in_rounds = 0.0, 0.0
    for seed in range(20):
        problem = random_problem(seed, cols=32)
        result = thanos.prune(problem, Structured(0.3), thanos.Options(score="obs"))
        in_rounds += loss(problem, result.weight)
        elimination = Elimination(problem.weight, factor(problem))
        count = int(result.mask[0].sum())
        elimination.remove(smallest_columns(elimination.costs(), count).nonzero().flatten())
        at_once += elimination.loss / 2
    assert in_rounds < 0.9 * at_once


def test_layers_that_share_factors_are_pruned_as_if_alone() -> None:
    problem = random_problem(19, rows=8, cols=32)
    factors: dict[Any, Any] = {}
    for part in problem.weight.split(4):
        alone = thanos.prune(
            LayerProblem(part, problem.hessian, "alone"), TWO_FOUR, thanos.Options()
        )
        shared = thanos.prune(
            LayerProblem(part, problem.hessian, "shared", factors), TWO_FOUR, thanos.Options()
        )
        assert torch.equal(alone.weight, shared.weight)
    assert len(factors) == 1


def test_the_obs_score_of_a_weight_is_the_loss_of_removing_it_alone() -> None:
    problem = random_problem(17)
    one = thanos.prune(problem, Unstructured(1 / 96), thanos.Options(score="obs"))
    losses = torch.full((6, 16), torch.inf)
    H = damped(problem.hessian)
    for row in range(6):
        for column in range(16):
            keep = torch.arange(16) != column
            exact = problem.weight.clone()
            exact[row, column] = 0.0
            exact[row, keep] = torch.linalg.solve(H[keep][:, keep], H[keep] @ problem.weight[row])
            losses[row, column] = loss(problem, exact)
    assert one.mask.sum() == 1
    assert int(one.mask.flatten().nonzero()) == int(losses.argmin())


def test_two_runs_are_bit_identical() -> None:
    problem = random_problem(9, rows=64, cols=128, tokens=512)
    problem = LayerProblem(problem.weight.float(), problem.hessian.float(), "twice")
    one, two = (thanos.prune(problem, TWO_FOUR, thanos.Options(block_columns=32)) for _ in range(2))
    assert torch.equal(one.weight, two.weight)


def test_float32_follows_float64() -> None:
    problem = random_problem(10, rows=64, cols=128, tokens=512)
    single = LayerProblem(problem.weight.float(), problem.hessian.float(), "single")
    one = thanos.prune(problem, TWO_FOUR, thanos.Options(block_columns=32))
    two = thanos.prune(single, TWO_FOUR, thanos.Options(block_columns=32))
    assert (one.mask != two.mask).float().mean() < 1e-3
    assert two.relative_error == pytest.approx(one.relative_error, rel=1e-3)


def test_on_average_better_than_the_same_pattern_without_an_update() -> None:
    updated, masked = 0.0, 0.0
    for seed in range(20):
        problem = random_problem(seed, cols=32, tokens=128)
        scores = problem.weight.abs() * problem.hessian.diagonal().sqrt()
        wanda = torch.where(smallest_in_groups(scores, 2, 4), 0.0, problem.weight)
        masked += loss(problem, wanda)
        updated += loss(
            problem, thanos.prune(problem, TWO_FOUR, thanos.Options(block_columns=8)).weight
        )
    assert updated < masked


def test_nan_statistics_are_refused_with_the_layer_named() -> None:
    problem = random_problem(11)
    problem.hessian[0, 0] = float("nan")
    with pytest.raises(HessianError, match="random 11: 1 of 256 entries of the Hessian"):
        thanos.prune(problem, TWO_FOUR, thanos.Options())


def test_a_hopeless_hessian_is_an_error_and_not_another_method() -> None:
    problem = random_problem(12)
    hopeless = LayerProblem(problem.weight, -1e6 * problem.hessian + torch.eye(16), "hopeless")
    with pytest.raises(HessianError, match="not positive definite"):
        thanos.prune(hopeless, Unstructured(0.5), thanos.Options())


def test_a_solution_that_overflows_is_an_error() -> None:
    problem = random_problem(14)
    huge = LayerProblem(problem.weight.float() * 1e37, problem.hessian.float(), "huge")
    with pytest.raises(HessianError, match="huge: the solution overflows"):
        thanos.prune(huge, TWO_FOUR, thanos.Options())


@pytest.mark.parametrize(
    ("pattern", "options", "error"),
    [
        (SemiStructured(2, 5), {"block_columns": 10}, ModelError),
        (SemiStructured(2, 4), {"block_columns": 6}, UsageError),
        (Unstructured(0.5), {"outlier_rows": 0.1}, UsageError),
        (Structured(0.5), {"outlier_rows": 0.6}, UsageError),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    pattern: SemiStructured | Unstructured | Structured,
    options: dict[str, Any],
    error: type[DeployError],
) -> None:
    with pytest.raises(error, match="random 13"):
        thanos.prune(random_problem(13), pattern, thanos.Options(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_columns": 0}, "--block-size 0 is out of range"),
        ({"damping": 0.0}, "--damp 0 is out of range"),
        ({"damping_mode": "mode"}, "--damp-mode 'mode' is not one of the possible values"),
        ({"outlier_rows": 1.0}, "--outlier-rows 1 is out of range"),
        ({"refit_steps": -1}, "--refit-steps -1 is out of range"),
        ({"score": "guess"}, "--score 'guess' is not one of the possible values"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        thanos.Options(**options)
