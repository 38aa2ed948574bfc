"""A layer whose rows several solve is the layer that one solves, to the last bit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.golden import random_problem
from tests.sharers import divided, solve_together
from thanos_deploy import methods
from thanos_deploy.errors import HessianError
from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured
from thanos_deploy.pruning.solution import aim, solve
from thanos_deploy.solver.division import Division
from thanos_deploy.solver.layer import LayerProblem, LayerResult, fraction_lost

RUNS = 5
PATTERNS: tuple[Pattern, ...] = (SemiStructured(2, 4), SemiStructured(4, 8), Unstructured(0.55))
SHARED = [
    (name, preset, pattern)
    for name in methods.names()
    for preset in methods.load(name).presets
    for pattern in PATTERNS
    if methods.load(name).divisible(pattern, methods.load(name).preset(preset).options)
]


def by(
    problem: LayerProblem, name: str, preset: str, pattern: Pattern, members: int
) -> LayerResult:
    """The layer as so many members make it."""
    method = methods.load(name)
    options = method.preset(preset).options

    def work(rows: Tensor, division: Division) -> LayerResult:
        own = replace(problem, weight=rows, divided=division)
        aimed, failures = aim(own, 0.9 * problem.hessian, 0.5, options)
        return solve(own, pattern, method, options, aimed=aimed, failures=failures).result

    shares = divided(len(problem.weight), RUNS, members)
    weight, mask = (
        torch.empty_like(problem.weight),
        torch.empty_like(problem.weight, dtype=torch.bool),
    )
    losses = {}
    for share, result in zip(shares, solve_together(problem.weight, shares, work), strict=True):
        pieces = zip(
            share,
            result.weight.split([one.stop - one.start for one in share]),
            result.mask.split([one.stop - one.start for one in share]),
            result.losses,
            strict=True,
        )
        for run, rows, marked, loss in pieces:
            weight[run], mask[run], losses[run.start] = rows, marked, loss
        damping = result.damping
    return LayerResult(weight, mask, tuple(losses[one] for one in sorted(losses)), damping)


@pytest.mark.parametrize(("name", "preset", "pattern"), SHARED, ids=str)
def test_the_number_of_those_who_solve_changes_nothing(
    name: str, preset: str, pattern: Pattern
) -> None:
    double = random_problem(0, rows=23, cols=64, tokens=512)
    problem = LayerProblem(double.weight.float(), double.hessian.float(), "shared")
    one, *others = (by(problem, name, preset, pattern, members) for members in (1, 2, 3))
    for other in others:
        assert torch.equal(other.weight, one.weight)
        assert torch.equal(other.mask, one.mask)
        assert other.losses == one.losses
    method = methods.load(name)
    options = method.preset(preset).options
    aimed, _ = aim(problem, 0.9 * problem.hessian, 0.5, options)
    whole = solve(problem, pattern, method, options, aimed=aimed).result
    assert torch.equal(one.mask, whole.mask)
    torch.testing.assert_close(one.weight, whole.weight, rtol=1e-4, atol=1e-5)
    assert one.relative_error == pytest.approx(whole.relative_error, rel=1e-4)
    assert fraction_lost(one.losses) == one.relative_error


def test_what_one_cannot_use_nobody_uses() -> None:
    """An infinite target in the rows of one member: all turn to the layer's own weight."""
    problem = random_problem(1, rows=20, cols=32, tokens=256)
    method, pattern = methods.load("thanos"), Unstructured(0.5)
    options = method.preset("best").options
    aimed = problem.weight.clone()
    aimed[3, 3] = torch.inf
    shares = divided(20, 4, 2)

    def work(rows: Tensor, division: Division) -> tuple[str, ...]:
        own = replace(problem, weight=rows, divided=division)
        target = rows.clone()
        if bool((rows == problem.weight[3]).all(dim=1).any()):
            target[0] = torch.inf
        return solve(own, pattern, method, options, aimed=target).failures

    said = solve_together(problem.weight, shares, work)
    assert said[0] == said[1]
    assert "32 of 640 entries of the weight are NaN or infinite" in said[0][0]

    def refused(rows: Tensor, division: Division) -> str:
        with pytest.raises(HessianError) as caught:
            solve(replace(problem, weight=rows, divided=division), pattern, method, options)
        return caught.value.message

    assert len(set(solve_together(aimed, shares, refused))) == 1


def test_columns_are_chosen_for_the_whole_layer() -> None:
    for name in methods.names():
        method = methods.load(name)
        assert not method.divisible(Structured(0.25), method.options())
