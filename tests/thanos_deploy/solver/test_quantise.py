"""Quantisation of one layer, against brute force in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thanos_deploy.errors import HessianError, UsageError
from thanos_deploy.solver.codes import Quantised, fit, holdable, round_to
from thanos_deploy.solver.damping import Damping
from thanos_deploy.solver.descent import descend
from thanos_deploy.solver.grid import GROUPS, Grid, parse
from thanos_deploy.solver.hessian import factor
from thanos_deploy.solver.layer import LayerProblem, output_energy, relative_error
from thanos_deploy.solver.quantise import QuantisedLayer, compensate, quantise

GRIDS = [
    parse(spelling) for spelling in ("int8", "int8:row", "int4:16", "int4:16:asym", "int8:64:asym")
]


def layer(seed: int, rows: int = 24, cols: int = 80, *, sparsity: float = 0.0) -> LayerProblem:
    """Correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = normal(3 * cols, cols) @ normal(cols, cols) * normal(cols).exp()
    weight = normal(rows, cols)
    weight[torch.rand(rows, cols, generator=generator) < sparsity] = 0.0
    return LayerProblem(weight, inputs.T @ inputs, "layer")


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_are_on_the_grid_and_zeros_stay_zero(grid: Grid) -> None:
    problem = layer(0, sparsity=0.5)
    for found in (
        quantise(problem, grid).quantised,
        round_to(problem.weight, grid),
    ):
        assert found.codes.min() >= grid.lowest
        assert found.codes.max() <= grid.highest
        assert found.scale.shape == found.zero.shape == (24, grid.groups(80))
        assert (found.scale != 0).all()
        assert (found.scale > 0).all() or (str(grid).startswith("int4") and grid.symmetric)
        for dtype in (torch.float16, torch.bfloat16):
            assert found.scale.equal(found.scale.to(dtype).double())
        if grid.bits == 4:
            offset = found.scale * found.zero
            assert offset.equal(offset.half().double())
        assert not found.weight[problem.weight == 0].any()
        if grid.symmetric:
            assert not found.zero.any()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_is_half_a_step_off_at_most(grid: Grid) -> None:
    weight = layer(1).weight
    found = round_to(weight, grid)
    step = found.scale.abs().repeat_interleave(grid.width(80), dim=1)[:, :80]
    slack = 0.0 if grid.symmetric else 0.5  # the zero point is rounded too, and moves the range
    assert ((found.weight - weight).abs() <= step * (0.5 + slack + 1e-9)).all()


def by_elimination(weight: Tensor, kept: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """GPTQ by its definition: after each column, its input leaves the inverse Hessian.

    Columns of large inputs come first, and the scales are chosen beforehand. A weight that is not
    kept is quantised to zero.
    """
    order = hessian.diagonal().argsort(descending=True).tolist()
    prices = torch.empty(len(hessian), dtype=weight.dtype)
    for place, j in enumerate(order):
        left = torch.tensor(order[place:])
        prices[j] = 1 / torch.linalg.inv(hessian[left][:, left])[0, 0]
    scales, zeros = fit(torch.where(kept, weight, 0.0), prices, grid)
    W, inverse = weight.clone(), torch.linalg.inv(hessian)
    result = torch.zeros_like(W)
    for j in order:
        scale, zero = (each[:, j // grid.width(len(order))] for each in (scales, zeros))
        code = (W[:, j] / scale).round() + zero
        value = (code.clamp(grid.lowest, grid.highest) - zero) * scale
        value = torch.where(kept[:, j], value, 0.0)
        error = (W[:, j] - value) / inverse[j, j]
        W -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j] / inverse[j, j]
        result[:, j] = value
    return result


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("moved", [0.0, 0.3])
def test_it_is_gptq_by_its_definition(grid: Grid, sparsity: float, moved: float) -> None:
    """The weight may also ask for values where it has to be zero, as a target can."""
    problem = layer(2, rows=6, cols=40, sparsity=sparsity)
    hessian = problem.hessian + 0.01 * problem.hessian.diagonal().mean() * torch.eye(40)
    order = hessian.diagonal().argsort(descending=True)
    turned = LayerProblem(problem.weight[:, order], problem.hessian[order][:, order], "layer")
    weight, kept = problem.weight + moved * layer(9, rows=6, cols=40).weight, problem.weight != 0
    found = compensate(weight, kept, factor(turned, Damping()).V, order, grid).weight
    torch.testing.assert_close(found, by_elimination(weight, kept, hessian, grid))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_layer_takes_back_errors_of_the_layers_before_it(grid: Grid, sparsity: float) -> None:
    """Its output is nearer to the one that is sought; judged on the inputs, not on statistics."""
    generator, fraction = torch.Generator().manual_seed(0), 0.8
    clean = torch.randn(400, 80, generator=generator, dtype=torch.float64)
    clean = clean @ torch.randn(80, 80, generator=generator, dtype=torch.float64)
    seen = 0.9 * clean + 0.1 * clean.roll(1, dims=1)
    weight = layer(10, sparsity=sparsity).weight
    problem = LayerProblem(weight, seen.T @ seen, "layer")
    sought = ((1 - fraction) * seen + fraction * clean) @ weight.T

    def missed(found: QuantisedLayer) -> float:
        assert not found.quantised.weight[weight == 0].any()
        return (seen @ found.quantised.weight.T - sought).square().sum().item()

    own = quantise(problem, grid)
    aimed = quantise(problem, grid, cross=clean.T @ seen, fraction=fraction)
    assert missed(aimed) < 0.75 * missed(own)
    assert aimed.relative_error <= aimed.rounding_error
    assert quantise(problem, grid, cross=clean.T @ seen).quantised.codes.equal(own.quantised.codes)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_scales_of_a_group_cost_no_more_than_those_that_clip_nothing(grid: Grid) -> None:
    weight = layer(7, sparsity=0.3).weight
    prices = torch.rand(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()

    def costs(scale: Tensor, zero: Tensor) -> Tensor:
        columns = (each.repeat_interleave(grid.width(80), dim=1)[:, :80] for each in (scale, zero))
        step, offset = columns
        codes = ((weight / step).round() + offset).clamp(grid.lowest, grid.highest)
        priced = (weight - (codes - offset) * step).square() * prices
        return torch.stack([part.sum(dim=1) for part in priced.split(grid.width(80), dim=1)], dim=1)

    rounded = round_to(weight, grid)
    found, most = costs(*fit(weight, prices, grid)), costs(rounded.scale, rounded.zero)
    assert (found <= most * (1 + 1e-9)).all()
    assert found.sum() < 0.95 * most.sum() or grid.bits == 8


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_after_the_descent_no_single_step_is_better(grid: Grid, sparsity: float) -> None:
    """Neither another code nor another scale; by what each loses, in brute force."""
    problem = layer(8, rows=3, cols=40, sparsity=sparsity)
    weight, hessian = problem.weight, problem.hessian
    start = round_to(weight, grid)
    found = descend(weight, weight != 0, hessian, start, passes=40)
    loss = output_energy(weight - found.weight, hessian)
    assert (loss <= output_energy(weight - start.weight, hessian) * (1 + 1e-9)).all()
    assert not found.weight[weight == 0].any()
    for dtype in (torch.float16, torch.bfloat16):
        assert found.scale.equal(found.scale.to(dtype).double())

    def no_better(codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        other = Quantised(grid, codes, scale, zero)
        assert (output_energy(weight - other.weight, hessian) >= loss * (1 - 1e-9)).all()

    for column, step in itertools.product(range(40), (-1, 1)):
        codes = found.codes.clone()
        moved = (codes[:, column] + step).clamp(grid.lowest, grid.highest)
        codes[:, column] = torch.where(weight[:, column] != 0, moved, codes[:, column])
        no_better(codes, found.scale, found.zero)
    for group, factor_ in itertools.product(range(grid.groups(40)), (1 - 2**-6, 1 + 2**-6)):
        scale = found.scale.clone()
        scale[:, group] = holdable(scale[:, group] * factor_, grid)
        no_better(found.codes, scale, found.zero)


def test_no_codes_at_all_are_much_better_on_a_small_layer() -> None:
    """Of all 8^4 codes in reach, the best ones are found, or some that are nearly as good."""
    problem = layer(3, rows=8, cols=4)
    grid = Grid(4, 16)
    found = quantise(problem, grid)
    scale = found.quantised.scale
    for row in range(8):
        tried = torch.tensor(list(itertools.product(range(-8, 8), repeat=4)), dtype=torch.float64)
        off = problem.weight[row] - tried * scale[row]
        losses = ((off @ problem.hessian) * off).sum(dim=1)
        own = problem.weight[row] - found.quantised.weight[row]
        assert own @ problem.hessian @ own <= 4 * losses.min() + 1e-9


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), spelling=st.sampled_from(["int8", "int4", "int4:16:asym"]))
def test_no_row_is_worse_than_rounded(seed: int, spelling: str) -> None:
    grid, problem = parse(spelling), layer(seed, rows=12, cols=48, sparsity=0.3)
    found, rounded = quantise(problem, grid), round_to(problem.weight, grid)
    for row in range(12):
        errors = [
            relative_error(problem.weight[row : row + 1], weight[row : row + 1], problem.hessian)
            for weight in (found.quantised.weight, rounded.weight)
        ]
        assert errors[0] <= errors[1] * (1 + 1e-9)
    assert found.relative_error <= found.rounding_error
    assert found.relative_error == pytest.approx(
        relative_error(problem.weight, found.quantised.weight, problem.hessian), rel=1e-6
    )
    assert found.rounding_error == pytest.approx(
        relative_error(problem.weight, rounded.weight, problem.hessian), rel=1e-6
    )


@pytest.mark.parametrize("grid", [parse("int4"), parse("int4:128"), parse("int8")], ids=str)
def test_compensation_halves_the_error_of_correlated_inputs(grid: Grid) -> None:
    found = quantise(layer(4, rows=64, cols=256), grid)
    assert found.relative_error < 0.5 * found.rounding_error
    assert found.compensated > 0.9


def test_a_group_of_zeros_and_a_dead_input_are_no_trouble() -> None:
    problem = layer(5)
    problem.weight[:, :32] = 0.0
    problem.hessian[40] = problem.hessian[:, 40] = 0.0
    found = quantise(problem, parse("int4")).quantised
    assert not found.codes[:, :32].any()
    assert found.weight.isfinite().all()


def test_statistics_that_are_not_finite_are_refused() -> None:
    problem = layer(6)
    problem.hessian[3, 3] = torch.nan
    with pytest.raises(HessianError):
        quantise(problem, parse("int4"))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [*GROUPS, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_grid_is_spelled_as_it_is_read(bits: int, group: int | None, symmetric: bool) -> None:
    grid = Grid(bits, group, symmetric)
    assert parse(str(grid)) == grid


@pytest.mark.parametrize("wrong", ["int3", "int4:", "int4:48", "4", "int4:32:sym", "int8:0"])
def test_another_spelling_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong):
        parse(wrong)
