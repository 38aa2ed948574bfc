import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden import damped, loss, random_problem
from thanos_deploy.errors import HessianError
from thanos_deploy.solver.damping import Damping
from thanos_deploy.solver.elimination import Elimination
from thanos_deploy.solver.hessian import factor
from thanos_deploy.solver.layer import LayerProblem


def refit(problem: LayerProblem, left: torch.Tensor) -> torch.Tensor:
    """The least-squares weight on some inputs, one row at a time, by NumPy."""
    H = damped(problem.hessian).numpy()
    W, kept = problem.weight.numpy(), left.numpy()
    new = np.zeros_like(W)
    for row, new_row in zip(W, new, strict=True):
        new_row[kept] = np.linalg.solve(H[np.ix_(kept, kept)], H[kept] @ row)
    return torch.from_numpy(new)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), data=st.data())
def test_what_is_left_is_the_least_squares_fit_whatever_the_order_of_leaving(
    seed: int, data: st.DataObject
) -> None:
    problem = random_problem(seed, rows=5, cols=12)
    elimination = Elimination(problem.weight, factor(problem))
    order = data.draw(st.permutations(range(12)))
    cuts = sorted(data.draw(st.sets(st.integers(0, 12), max_size=4)))
    gone = 0
    for cut in cuts:
        elimination.remove(torch.tensor(order[gone:cut], dtype=torch.long))
        gone = cut
    assert sorted((~elimination.left).nonzero().flatten().tolist()) == sorted(order[:gone])
    expected = refit(problem, elimination.left)
    torch.testing.assert_close(elimination.weight, expected, rtol=1e-8, atol=1e-8)
    change = loss(problem, elimination.weight)
    assert elimination.loss / 2 == pytest.approx(change, rel=1e-8, abs=1e-9)


def test_the_price_of_a_group_is_what_losing_it_costs() -> None:
    problem = random_problem(1, rows=6, cols=16)
    elimination = Elimination(problem.weight, factor(problem))
    elimination.remove(torch.tensor([3, 4]))
    singles = elimination.costs()
    assert singles[3] == singles[4] == float("inf")
    for columns in ([0], [7], [1, 2, 9], [8, 10, 11, 12]):
        price = elimination.cost(torch.tensor(columns))
        trial = Elimination(problem.weight, factor(problem))
        trial.remove(torch.tensor([3, 4, *columns]))
        assert elimination.loss + price == pytest.approx(trial.loss, rel=1e-9)
        if len(columns) == 1:
            assert singles[columns[0]] == pytest.approx(price, rel=1e-9)


def test_the_curve_of_losses_is_that_of_dropping_channels() -> None:
    problem = random_problem(2, rows=6, cols=16)
    factored = factor(problem)
    curve = Elimination(problem.weight, factored).channel_losses()
    assert len(curve) == 17
    assert curve[0] == 0.0
    for count in range(17):
        trial = Elimination(problem.weight, factored)
        trial.drop_channels(16 - count)
        assert int(trial.left.sum()) == 16 - count
        assert curve[count].item() == pytest.approx(trial.loss, rel=1e-9, abs=1e-9)


def test_the_curve_of_losses_of_inputs_that_depend_on_each_other_is_refused() -> None:
    problem = random_problem(2, rows=6, cols=16)
    elimination = Elimination(problem.weight, factor(problem))
    elimination._inverse[0], elimination._inverse[:, 0] = 0.0, 0.0
    with pytest.raises(HessianError, match="depend on each other so strongly"):
        elimination.channel_losses()


@pytest.mark.parametrize(
    ("there", "keep"),
    [
        *(((4, 2), keep) for keep in [(4, 2), (2, 1), (2, 2)]),
        *(((9, 3), keep) for keep in [(9, 3), (6, 3), (3, 3), (6, 2), (3, 1)]),
        *(((4, 4), (3, 3)), ((4, 1), (3, 1))),
    ],
)
def test_heads_go_so_that_groups_stay_equal_and_the_rest_is_refitted(
    there: tuple[int, int], keep: tuple[int, int]
) -> None:
    heads, kv_heads = there
    group, size = heads // kv_heads, 3
    problem = random_problem(3, rows=8, cols=heads * size)
    elimination = Elimination(problem.weight, factor(problem))
    kept = elimination.drop_heads(there, keep=keep)
    assert len(kept) == keep[0]
    per_group = torch.bincount(kept // group, minlength=kv_heads)
    assert sorted(per_group.tolist()) == [0] * (kv_heads - keep[1]) + [keep[0] // keep[1]] * keep[1]
    columns = (kept[:, None] * size + torch.arange(size)).flatten()
    assert torch.equal(elimination.left.nonzero().flatten(), columns)
    torch.testing.assert_close(
        elimination.weight, refit(problem, elimination.left), rtol=1e-8, atol=1e-8
    )


def test_heads_that_go_in_two_steps_are_those_that_go_in_one() -> None:
    problem = random_problem(7, rows=8, cols=36)
    factored = factor(problem)
    for steps in ([(8, 4), (4, 4)], [(9, 3), (6, 2), (3, 1)]):
        one, many = (Elimination(problem.weight, factored) for _ in range(2))
        there = (12, 4)
        for keep in steps:
            last = many.drop_heads(there, keep=keep)
        assert torch.equal(last, one.drop_heads(there, keep=steps[-1]))
        assert many.loss == pytest.approx(one.loss, rel=1e-9)


def test_losing_one_group_of_heads_is_the_best_choice_there_is() -> None:
    problem = random_problem(4, rows=8, cols=24)
    factored = factor(problem)
    elimination = Elimination(problem.weight, factored)
    elimination.drop_heads((8, 4), keep=(6, 3))
    losses = []
    for group in range(4):
        trial = Elimination(problem.weight, factored)
        trial.remove(torch.arange(6 * group, 6 * group + 6))
        losses.append(trial.loss)
    assert elimination.loss == pytest.approx(min(losses), rel=1e-9)


def test_an_input_that_another_one_repeats_goes_for_nothing() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    x[:, 4] = 2.0 * x[:, 1]
    weight = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    problem = LayerProblem(weight, x.T @ x, "repeated")
    elimination = Elimination(weight, factor(problem, Damping(1e-9)))
    elimination.drop_channels(5)
    assert not elimination.left[[1, 4]].all()
    torch.testing.assert_close(x @ elimination.weight.T, x @ weight.T, rtol=0, atol=1e-5)


def test_one_at_a_time_finds_what_brute_force_finds_on_independent_inputs() -> None:
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    scale = torch.tensor([3.0, 0.1, 2.0, 0.5, 1.0, 0.2], dtype=torch.float64)
    problem = LayerProblem(weight, torch.diag(scale), "independent")
    factored = factor(problem, Damping(1e-6))
    elimination = Elimination(weight, factored)
    elimination.drop_channels(3)
    best = min(
        itertools.combinations(range(6), 3),
        key=lambda columns: (weight.square().sum(dim=0) * scale)[list(columns)].sum().item(),
    )
    assert tuple((~elimination.left).nonzero().flatten().tolist()) == best
