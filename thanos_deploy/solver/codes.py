"""Weights as codes: the nearest ones, and the scales and zero points that suit them.

Codes from -8 to 7 reach farther below zero than above. A scale of theirs may be negative, so that
the side that reaches farther is the one that needs it: the step is then an eighth of the largest
weight of a group rather than a seventh. Symmetric codes of 8 bits reach as far on both sides.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from thanos_deploy.solver.grid import Grid

# Scales that are tried for a group, as fractions of the one that clips nothing.
_SHRINKS = tuple(1.0 - 0.025 * step for step in range(17))

# Relative; of bfloat16. And its largest number that float16 has too.
_HALF_A_STEP = 2**-8
_LARGEST = 65280.0


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A matrix of codes.

    Attributes:
        grid: what they are codes of.
        codes: int16[rows, cols].
        scale: [rows, groups], numbers that bfloat16 and float16 have, not 0, in the dtype of the
            weight; negative ones only for symmetric codes of 4 bits.
        zero: the same shape and dtype, whole numbers; zeros if the grid is symmetric.
    """

    grid: Grid
    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def weight(self) -> Tensor:
        """[rows, cols], the values, in the dtype of the scales."""
        cols = self.codes.shape[1]
        scale, zero = (by_column(each, self.grid, cols) for each in (self.scale, self.zero))
        return (self.codes.to(scale.dtype) - zero) * scale


def by_column(each: Tensor, grid: Grid, cols: int) -> Tensor:
    """[rows, cols], what each group has, for every column."""
    return each.repeat_interleave(grid.group, dim=1)[:, :cols]


def round_to(weight: Tensor, grid: Grid) -> Quantised:
    """Every weight to the nearest multiple; the scales clip nothing.

    Args:
        weight: [rows, cols], finite.
        grid: what to round to.
    """
    scale, zero = (one.squeeze(2) for one in next(_ranges(_in_groups(weight, grid), grid, 1.0)))
    spread = (by_column(each, grid, weight.shape[1]) for each in (scale, zero))
    return Quantised(grid, nearest(weight, *spread, grid).to(torch.int16), scale, zero)


def fit(weight: Tensor, prices: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The scale and the zero point of every group for which its nearest codes cost least.

    Args:
        weight: [rows, cols], finite; an entry that is zero stays zero and costs nothing.
        prices: [cols], of a squared error of 1.
        grid: what to quantise to.

    Returns:
        [rows, groups] each.
    """
    values = _in_groups(weight, grid)
    price = _in_groups(prices[None], grid).squeeze(0)
    scale = zero = values.new_zeros(*values.shape[:2], 1)
    least = torch.full_like(scale, torch.inf)
    for shrink in _SHRINKS:
        for tried, its_zero in _ranges(values, grid, shrink):
            error = values - (nearest(values, tried, its_zero, grid) - its_zero) * tried
            cost = torch.einsum("rgi,gi->rg", error.square_(), price)[:, :, None]
            better = cost < least
            least = torch.where(better, cost, least)
            scale, zero = torch.where(better, tried, scale), torch.where(better, its_zero, zero)
    return scale.squeeze(2), zero.squeeze(2)


def nearest(values: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The nearest codes, in the dtype of the values."""
    return (values / scale).round_().add_(zero).clamp_(grid.lowest, grid.highest)


def holdable(scale: Tensor) -> Tensor:
    """The nearest numbers that bfloat16 and float16 both have; float16's smallest for 0."""
    half = torch.finfo(torch.float16)
    size = scale.abs().to(torch.bfloat16).to(scale.dtype).clamp(half.smallest_normal, _LARGEST)
    return size.copysign(scale)


def _in_groups(weight: Tensor, grid: Grid) -> Tensor:
    """[rows, groups, group]; what is missing of the last group is zeros."""
    rows, cols = weight.shape
    missing = grid.groups(cols) * grid.group - cols
    return torch.nn.functional.pad(weight, (0, missing)).reshape(rows, -1, grid.group)


def _ranges(values: Tensor, grid: Grid, shrink: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and zero points for a fraction of each group's range, the one of least step first.

    Args:
        values: [rows, groups, group].
        grid: what to quantise to.
        shrink: the fraction; 1 clips nothing.

    Yields:
        [rows, groups, 1] each.
    """
    low = values.amin(dim=2, keepdim=True).clamp(max=0.0) * shrink
    high = values.amax(dim=2, keepdim=True).clamp(min=0.0) * shrink
    if not grid.symmetric:
        scale = _upwards((high - low) / grid.highest)
        yield scale, (-low / scale).round_().clamp_(grid.lowest, grid.highest)
        return
    zero = torch.zeros_like(low)
    up = _upwards(torch.maximum(low / grid.lowest, high / grid.highest))
    if grid.lowest == -grid.highest:
        yield up, zero
        return
    down = -_upwards(torch.maximum(high / -grid.lowest, low / -grid.highest))
    finer = up <= -down
    yield torch.where(finer, up, down), zero
    yield torch.where(finer, down, up), zero


def _upwards(scale: Tensor) -> Tensor:
    """The next larger number of bfloat16 in the range of float16; 1 for a group of zeros."""
    up = (scale * (1 + _HALF_A_STEP)).to(torch.bfloat16).to(scale.dtype)
    half = torch.finfo(torch.float16)
    return torch.where(scale > 0, up.clamp(half.smallest_normal, _LARGEST), 1.0)
