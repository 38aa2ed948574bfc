"""Gradients and codes of a quantised layer that is tuned, beside PyTorch's own and float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thanos_deploy.pruning.straight_through import QuantisedWeight
from thanos_deploy.solver.codes import Quantised, holdable, round_to
from thanos_deploy.solver.grid import Grid, parse

GRIDS = ("int4:16", "int4:row", "int8:16", "int4:16:asym", "int8:16:asym")
ROWS, COLS = 5, 40  # the last group has fewer inputs


def layer(seed: int, kept: float = 0.7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLS, generator=generator)
    return weight * (torch.rand(ROWS, COLS, generator=generator) < kept)


def learner(weight: Tensor, grid: Grid) -> QuantisedWeight:
    return QuantisedWeight(nn.Linear(COLS, ROWS, bias=False), weight, round_to(weight, grid))


def step(one: QuantisedWeight, seed: int, rate: float = 1.0) -> None:
    """A step that nothing bounds."""
    generator = torch.Generator().manual_seed(seed)
    for learned in one.learned:
        noise = torch.randn(learned.values.shape, generator=generator)
        learned.values.add_(rate * noise * (0.2 if learned is one.learned[1] else 1.0))


@pytest.mark.parametrize("spelling", GRIDS)
@given(seed=st.integers(0, 2**20))
def test_it_begins_as_it_was_quantised(spelling: str, seed: int) -> None:
    weight, grid = layer(seed), parse(spelling)
    start, found = round_to(weight, grid), learner(weight, grid).quantised
    for name in ("codes", "scale", "zero"):
        assert getattr(found, name).equal(getattr(start, name))


@pytest.mark.parametrize("spelling", GRIDS)
@given(seed=st.integers(0, 2**20))
def test_whatever_is_learned_is_on_the_grid_and_zeros_stay_zero(spelling: str, seed: int) -> None:
    weight, grid = layer(seed), parse(spelling)
    one = learner(weight, grid)
    step(one, seed)
    found = one.quantised
    assert found.codes.min() >= grid.lowest
    assert found.codes.max() <= grid.highest
    assert holdable(found.scale, grid).equal(found.scale)
    assert (found.scale != 0).all()
    assert found.weight.equal(one.weight(torch.float32))
    assert (found.weight[weight == 0] == 0).all()


class Rounded(torch.autograd.Function):
    """Rounds; going back it is not there."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


@pytest.mark.parametrize("spelling", GRIDS)
@given(seed=st.integers(0, 2**20))
def test_gradients_are_those_of_a_float64_layer_in_which_rounding_is_not_there(
    spelling: str, seed: int
) -> None:
    grid, weight = parse(spelling), layer(seed)
    one = learner(weight, grid)
    step(one, seed, rate=0.5)
    start = round_to(weight, grid)
    places = torch.arange(COLS) // grid.width(COLS)
    positions, factors = (
        learned.values.double().clone().requires_grad_() for learned in one.learned
    )
    free = (factors * start.scale.double())[:, places]
    held = one.quantised.scale.double()[:, places]
    scales = free + (held - free).detach()  # what is held, with the gradient of what is not
    codes = Rounded.apply(positions).clamp(grid.lowest, grid.highest)
    codes = torch.where(weight != 0, codes, start.zero.double()[:, places])
    made = (codes - start.zero.double()[:, places]) * scales
    torch.testing.assert_close(one.weight(torch.float64), made.detach(), rtol=1e-6, atol=0)
    generator = torch.Generator().manual_seed(seed)
    inputs, wanted = (
        torch.randn(7, size, dtype=torch.float64, generator=generator) for size in (COLS, ROWS)
    )
    loss = (inputs @ made.T - wanted).square().sum()
    by_weight, by_position, by_factor = torch.autograd.grad(loss, [made, positions, factors])
    one.pull(by_weight.float())
    for learned, expected in zip(one.learned, (by_position, by_factor), strict=True):
        assert learned.values.grad is not None
        torch.testing.assert_close(learned.values.grad, expected.float(), rtol=1e-4, atol=1e-3)


def test_the_gradient_of_one_group_by_hand() -> None:
    grid = Grid(4, 16)
    weight = torch.zeros(1, 16)
    weight[0, :4] = torch.tensor([-8.0, 3.0, 0.4, 1.0])
    codes = torch.zeros(1, 16, dtype=torch.int16)
    codes[0, :4] = torch.tensor([-8, 3, 0, 1])
    start = Quantised(grid, codes, torch.full((1, 1), 0.5), torch.zeros(1, 1))
    one = QuantisedWeight(nn.Linear(16, 1, bias=False), weight, start)
    # weight / scale is -16, 6, 0.8 and 2; each within 0.49 of its code
    positions, factors = (learned.values for learned in one.learned)
    torch.testing.assert_close(positions[0, :4], torch.tensor([-8.49, 3.49, 0.49, 1.49]))
    positions[0, 0] = -9.0  # beyond the codes
    gradient = torch.arange(16.0)[None] + 1
    one.pull(gradient)
    assert positions.grad is not None
    assert factors.grad is not None
    assert positions.grad[0].tolist() == [0.0, 1.0, 1.5, 2.0, *[0.0] * 12]
    # (1 * -8 + 2 * 3 + 3 * 0 + 4 * 1) times the scale
    assert factors.grad.tolist() == [[1.0]]


def test_a_layer_that_is_stored_the_other_way_round() -> None:
    weight, grid = layer(3), parse("int4:16")
    plain, other = (
        QuantisedWeight(one, its, round_to(weight, grid))
        for one, its in (
            (nn.Linear(COLS, ROWS, bias=False), weight),
            (Conv1D(ROWS, COLS), weight.T.contiguous().T),
        )
    )
    gradient = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0))
    plain.receive(gradient.reshape(-1))
    other.receive(gradient.T.reshape(-1))
    for one, same in zip(plain.learned, other.learned, strict=True):
        assert one.values.grad is not None
        assert same.values.grad is not None
        assert one.values.grad.equal(same.values.grad)
        # as Adam's fused step goes by memory
        assert same.values.stride() == same.values.grad.stride() == one.values.stride()
