"""What every method promises, whatever it does inside; a new file in methods/ is tested by this."""

from itertools import product

import pytest
import torch

from tests.golden import golden_problem, loss, random_problem
from thanos_deploy import methods
from thanos_deploy.errors import HessianError, ModelError
from thanos_deploy.methods import thanos
from thanos_deploy.model.verdict import judge
from thanos_deploy.option import options_of
from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured
from thanos_deploy.solver.layer import LayerProblem, LayerResult, relative_error

PATTERNS: tuple[Pattern, ...] = (
    *(SemiStructured(2, 4), SemiStructured(4, 8), SemiStructured(1, 4)),
    *(Unstructured(0.0), Unstructured(0.3), Unstructured(1.0)),
    *(Structured(0.0), Structured(0.25), Structured(1.0)),
)
every = pytest.mark.parametrize("name", methods.names())


def pruned(name: str, problem: LayerProblem, pattern: Pattern) -> LayerResult:
    """By the method's defaults."""
    method = methods.load(name)
    return method.prune(problem, pattern, method.options())


@pytest.mark.parametrize(("name", "pattern"), list(product(methods.names(), PATTERNS)), ids=str)
def test_the_result_holds_the_pattern_and_is_described_truly(name: str, pattern: Pattern) -> None:
    problem = random_problem(0, rows=8, cols=32)
    before = (problem.weight.clone(), problem.hessian.clone())
    result = pruned(name, problem, pattern)
    again = pruned(name, problem, pattern)
    assert torch.equal(problem.weight, before[0])
    assert torch.equal(problem.hessian, before[1])
    assert torch.equal(result.weight, again.weight)
    assert judge((result.weight != 0).numpy(), pattern).holds
    assert (result.weight[result.mask] == 0).all()
    assert not torch.signbit(result.weight[result.mask]).any()
    assert result.weight.isfinite().all()
    expected = relative_error(problem.weight, result.weight, problem.hessian)
    assert result.relative_error == pytest.approx(expected)
    if pattern.sparsity == 0.0:
        assert torch.equal(result.weight, problem.weight)
    if pattern.sparsity == 1.0:
        assert result.mask.all()
        assert result.relative_error == pytest.approx(1.0)


@every
def test_permuting_rows_permutes_the_result(name: str) -> None:
    problem = random_problem(1, rows=8, cols=32)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    permuted = LayerProblem(problem.weight[order], problem.hessian, "permuted")
    for pattern in (SemiStructured(2, 4), Unstructured(0.4), Structured(0.25)):
        one = pruned(name, problem, pattern)
        two = pruned(name, permuted, pattern)
        assert torch.equal(one.mask[order], two.mask)
        torch.testing.assert_close(one.weight[order], two.weight, rtol=1e-9, atol=1e-10)


@every
def test_the_scale_of_the_statistics_changes_nothing(name: str) -> None:
    problem = random_problem(2, rows=8, cols=32)
    scaled = LayerProblem(problem.weight, problem.hessian / 64.0, "scaled")
    for pattern in (SemiStructured(2, 4), Unstructured(0.4), Structured(0.25)):
        one, two = (pruned(name, p, pattern) for p in (problem, scaled))
        assert torch.equal(one.mask, two.mask)
        torch.testing.assert_close(one.weight, two.weight, rtol=1e-9, atol=1e-10)


@every
def test_layers_without_signal_are_no_trouble(name: str) -> None:
    for problem in (
        LayerProblem(torch.zeros(4, 8), torch.eye(8), "zeros"),
        LayerProblem(torch.ones(4, 8), torch.zeros(8, 8), "dead"),
        LayerProblem(torch.ones(1, 8), torch.ones(8, 8), "one row, all inputs alike"),
    ):
        for pattern in (SemiStructured(2, 4), Unstructured(0.5), Structured(0.5)):
            result = pruned(name, problem, pattern)
            assert int(result.mask.sum()) == problem.weight.numel() // 2
            assert result.weight.isfinite().all()


@every
def test_statistics_that_are_not_finite_are_refused(name: str) -> None:
    problem = random_problem(3)
    problem.hessian[2, 2] = float("inf")
    with pytest.raises(HessianError, match="random 3: 1 of 256 entries of the Hessian"):
        pruned(name, problem, SemiStructured(2, 4))


@every
def test_a_width_that_the_group_does_not_divide_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="16 inputs do not divide into the groups of 5"):
        pruned(name, random_problem(4), SemiStructured(2, 5))


@every
def test_presets_can_be_used(name: str) -> None:
    method = methods.load(name)
    for which in methods.PRESET_NAMES:
        method.check("layer", 512, SemiStructured(2, 4), method.preset(which).options)
    assert method.preset("paper").walk == methods.Walk()


@every
def test_every_option_has_a_flag_a_help_text_and_a_value_in_its_own_range(name: str) -> None:
    method = methods.load(name)
    for one in options_of(method.options):
        assert one.declared.flag.startswith("--")
        assert one.declared.help.endswith(".")
        one.check(one.default)


def test_methods_without_an_update_aim_at_nothing_else_by_default() -> None:
    for name in ("magnitude", "wanda", "sparsegpt"):
        method = methods.load(name)
        assert len({repr(method.preset(which)) for which in methods.PRESET_NAMES}) == 1


@pytest.mark.parametrize("pattern", [SemiStructured(2, 4), Unstructured(0.5)], ids=str)
def test_the_order_that_the_papers_report(pattern: Pattern) -> None:
    """Mean loss over seeds: a refit helps Thanos, which beats SparseGPT, which beats no update."""
    chosen = {
        name: (methods.load(name), methods.load(name).options())
        for name in ("thanos", "sparsegpt", "wanda", "magnitude")
    }
    chosen["refit"] = methods.load("thanos"), thanos.Options(block_columns=8, refit_steps=50)
    totals = dict.fromkeys(chosen, 0.0)
    for seed in range(20):
        problem = random_problem(seed, cols=32, tokens=128)
        for name, (method, options) in chosen.items():
            totals[name] += loss(problem, method.prune(problem, pattern, options).weight)
    assert totals["refit"] < totals["thanos"] < totals["sparsegpt"]
    assert totals["sparsegpt"] < min(totals["wanda"], totals["magnitude"])


def test_golden_losses_without_an_update() -> None:
    problem = golden_problem()
    result = pruned("wanda", problem, Unstructured(0.5))
    assert loss(problem, result.weight) == pytest.approx(16825.126154, rel=1e-9)
