from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden import damped, random_problem
from thanos_deploy.errors import HessianError
from thanos_deploy.solver.damping import Damping, DampingMode
from thanos_deploy.solver.hessian import factor, retarget
from thanos_deploy.solver.layer import LayerProblem


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), column=st.integers(0, 15))
def test_every_trailing_hessian_and_inverse_is_a_sub_block_of_the_factors(
    seed: int, column: int
) -> None:
    problem = random_problem(seed)
    H, factored = damped(problem.hessian), factor(problem)
    torch.testing.assert_close(factored.diagonal, H.diagonal(), rtol=1e-12, atol=0.0)
    assert torch.equal(factored.V, factored.V.triu())
    U, V = factored.upper(slice(column, None)), factored.V[column:, column:]
    torch.testing.assert_close(U @ U.T, H[column:, column:], rtol=1e-9, atol=1e-9)
    inverse = torch.linalg.inv(H[column:, column:])
    torch.testing.assert_close(V.T @ V, inverse, rtol=1e-7, atol=1e-9)
    for step in (1, 3, 16):
        if column % step == 0:
            diagonal = factored.trailing_inverse_diagonals(step)[column // step, column:]
            torch.testing.assert_close(diagonal, inverse.diagonal(), rtol=1e-7, atol=1e-9)


def test_one_huge_channel_moves_the_mean_but_not_the_median_or_the_others() -> None:
    problem = random_problem(0)
    problem.hessian[3] *= 300.0
    problem.hessian[:, 3] *= 300.0
    added = {
        mode: factor(problem, Damping(0.01, mode)).diagonal - problem.hessian.diagonal()
        for mode in get_args(DampingMode)
    }
    diagonal = problem.hessian.diagonal()
    others = torch.arange(16) != 3
    assert (added["mean"][others] > 10 * diagonal[others].median() * 0.01).all()
    assert (added["median"][others] < 2 * diagonal[others].median() * 0.01).all()
    torch.testing.assert_close(added["per-channel"], 0.01 * diagonal, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", get_args(DampingMode))
def test_dead_inputs_are_damped_in_every_mode(mode: DampingMode) -> None:
    problem = random_problem(1)
    problem.hessian[2] = problem.hessian[:, 2] = 0.0
    assert factor(problem, Damping(0.01, mode)).V.isfinite().all()
    dead = LayerProblem(problem.weight, torch.zeros_like(problem.hessian), "dead")
    assert factor(dead, Damping(0.01, mode)).V.isfinite().all()


def test_an_indefinite_hessian_is_damped_harder_and_says_so() -> None:
    problem = random_problem(8)
    shifted = problem.hessian - 0.05 * problem.hessian.diagonal().mean() * torch.eye(16)
    assert factor(LayerProblem(problem.weight, shifted, "")).damping == pytest.approx(0.1)


def test_a_hopeless_hessian_is_an_error() -> None:
    problem = random_problem(12)
    hopeless = LayerProblem(problem.weight, torch.eye(16) - 1e6 * problem.hessian, "hopeless")
    with pytest.raises(HessianError, match=r"hopeless: .* not positive definite"):
        factor(hopeless)


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_retargeting_is_the_ridge_regression_on_the_wanted_output(fraction: float) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, 64, generator=g, dtype=torch.float64)
    y = x + 0.3 * torch.randn(16, 64, generator=g, dtype=torch.float64)
    weight = torch.randn(6, 16, generator=g, dtype=torch.float64)
    problem = LayerProblem(weight, x @ x.T, "")
    # Ridge centred at the weight: minimise ||(W' - W) x - f W (y - x)||^2 + ||(W' - W) sqrt(D)||^2.
    ridge = (0.01 * problem.hessian.diagonal().mean()).sqrt() * torch.eye(16).double()
    inputs = torch.cat([x, ridge], dim=1)
    wanted = torch.cat([fraction * weight @ (y - x), torch.zeros(6, 16)], dim=1)
    change = torch.linalg.lstsq(inputs.T, wanted.T).solution.T
    actual = retarget(problem, y @ x.T, fraction)
    torch.testing.assert_close(actual, weight + change, rtol=1e-9, atol=1e-10)


def test_retargeting_to_the_same_inputs_changes_nothing() -> None:
    problem = random_problem(5)
    assert torch.equal(retarget(problem, problem.hessian, 1.0), problem.weight)
