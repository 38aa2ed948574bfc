"""Weights as codes: the nearest ones, and the scales and zero points that suit them.

Codes from -8 to 7 reach farther below zero than above. A scale of theirs may be negative, so that
the side that reaches farther is the one that needs it: the step is then an eighth of the largest
weight of a group rather than a seventh. Symmetric codes of 8 bits reach as far on both sides.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thanos_deploy.solver.grid import Grid

# Scales that are tried for a group, as fractions of the one that clips nothing.
_SHRINKS = tuple(1.0 - 0.025 * step for step in range(17))

# Of a scale, so that bfloat16 and float16 both have it: bits of its significand, and the range.
_BITS = 8
_SMALLEST, _LARGEST = 2.0**-14, 2.0**15
# Of four bits with a zero point: as float16 has to hold scale * zero too, for GGUF's Q4_1.
_BITS_WITH_ZERO, _LARGEST_WITH_ZERO = 7, 2.0**11


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A matrix of codes.

    Attributes:
        grid: what they are codes of.
        codes: int16[rows, cols].
        scale: [rows, groups], numbers that bfloat16 and float16 have, not 0, in the dtype of the
            weight; negative ones only for symmetric codes of 4 bits. With codes of 4 bits and zero
            points, float16 has scale * zero as well.
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

    def grouped(self, group: int) -> "Quantised":
        """The same codes and values for a format of smaller groups, each with the same scale.

        Args:
            group: inputs that share a scale there; divides the groups, if rows have several.
        """
        cols = self.codes.shape[1]
        places = torch.arange(0, cols, group, device=self.codes.device) // self.grid.width(cols)
        return Quantised(
            replace(self.grid, group=group),
            self.codes,
            self.scale[:, places],
            self.zero[:, places],
        )


def by_column(each: Tensor, grid: Grid, cols: int) -> Tensor:
    """[rows, cols], what each group has, for every column."""
    return each.repeat_interleave(grid.width(cols), dim=1)[:, :cols]


def in_groups(each: Tensor, grid: Grid) -> Tensor:
    """[rows, groups, group], what each column has; what is missing of the last group is zeros."""
    rows, cols = each.shape
    missing = grid.groups(cols) * grid.width(cols) - cols
    return torch.nn.functional.pad(each, (0, missing)).reshape(rows, -1, grid.width(cols))


def round_to(weight: Tensor, grid: Grid) -> Quantised:
    """Every weight to the nearest multiple; the scales clip nothing.

    Args:
        weight: [rows, cols], finite.
        grid: what to round to.
    """
    scale, zero = (one.squeeze(2) for one in next(_ranges(in_groups(weight, grid), grid, 1.0)))
    scales, zeros = (by_column(each, grid, weight.shape[1]) for each in (scale, zero))
    codes = nearest(weight, scales, zeros, grid).to(torch.int16).contiguous()
    return Quantised(grid, codes, scale.contiguous(), zero.contiguous())


def fit(weight: Tensor, prices: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The scale and the zero point of every group for which its nearest codes cost least.

    Args:
        weight: [rows, cols], finite; an entry that is zero stays zero and costs nothing.
        prices: [cols], of a squared error of 1.
        grid: what to quantise to.

    Returns:
        [rows, groups] each.
    """
    values = in_groups(weight, grid)
    price = in_groups(prices[None], grid).squeeze(0)
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


def holdable(scale: Tensor, grid: Grid) -> Tensor:
    """The nearest numbers that can be scales; see `Quantised`."""
    return _held(scale.abs(), grid, torch.round).copysign(scale)


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
        scale = _upwards((high - low) / grid.highest, grid)
        yield scale, (-low / scale).round_().clamp_(grid.lowest, grid.highest)
        return
    zero = torch.zeros_like(low)
    up = _upwards(torch.maximum(low / grid.lowest, high / grid.highest), grid)
    if grid.lowest == -grid.highest:
        yield up, zero
        return
    down = -_upwards(torch.maximum(high / -grid.lowest, low / -grid.highest), grid)
    finer = up <= -down
    yield torch.where(finer, up, down), zero
    yield torch.where(finer, down, up), zero


def _upwards(scale: Tensor, grid: Grid) -> Tensor:
    """The next larger number that can be a scale; 1 for a group of zeros."""
    return torch.where(scale > 0, _held(scale, grid, torch.ceil), 1.0)


def _held(scale: Tensor, grid: Grid, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Positive numbers that can be scales, of which `rounded` chooses one of two neighbours."""
    bits, largest = _BITS, _LARGEST
    if grid.bits == 4 and not grid.symmetric:
        bits, largest = _BITS_WITH_ZERO, _LARGEST_WITH_ZERO
    significand, exponent = torch.frexp(scale)
    held = torch.ldexp(rounded(significand * 2**bits), exponent - bits)
    return held.clamp(_SMALLEST, largest)
