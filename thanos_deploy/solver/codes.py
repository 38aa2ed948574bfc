"""Integer codes for weights: rounding to the nearest code, and fitting scales and zero points.

Symmetric codes of 4 bits run from -8 to 7, so they reach farther below zero than above it. Their
scales may be negative: a negative scale puts a group's positive weights on the longer side, so that
the step is an eighth of the largest weight rather than a seventh. Symmetric codes of 8 bits run
from -127 to 127.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thanos_deploy.solver.grid import Grid

# Candidate scales for a group, as fractions of the scale that clips nothing.
_SHRINKS = tuple(1.0 - 0.025 * step for step in range(17))

# Bits of the significand and range of a scale, so that bfloat16 and float16 both hold it exactly.
_BITS = 8
_SMALLEST, _LARGEST = 2.0**-14, 2.0**15
# The same for 4 bits with a zero point: float16 must also hold scale * zero, for GGUF's Q4_1.
_BITS_WITH_ZERO, _LARGEST_WITH_ZERO = 7, 2.0**11


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A quantised matrix: integer codes with their scales and zero points.

    Attributes:
        grid: the grid that the codes belong to.
        codes: int16[rows, cols].
        scale: [rows, groups], in the dtype of the weight. Non-zero numbers that bfloat16 and
            float16 both hold exactly; negative only for symmetric codes of 4 bits. For codes of 4
            bits with zero points, float16 holds scale * zero exactly as well.
        zero: [rows, groups], in the dtype of `scale`; whole numbers, all 0 if the grid is
            symmetric.
    """

    grid: Grid
    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def weight(self) -> Tensor:
        """The dequantised weight; [rows, cols], in the dtype of the scales."""
        cols = self.codes.shape[1]
        scale, zero = (by_column(each, self.grid, cols) for each in (self.scale, self.zero))
        return (self.codes.to(scale.dtype) - zero) * scale

    def grouped(self, group: int) -> "Quantised":
        """Repeat scales and zero points for a format with smaller groups; the values are the same.

        Args:
            group: number of inputs that share a scale in that format. If a row has several groups
                now, it must divide their size.
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
    """Expand one value per group to one value per column; [rows, cols]."""
    return each.repeat_interleave(grid.width(cols), dim=1)[:, :cols]


def in_groups(each: Tensor, grid: Grid) -> Tensor:
    """Reshape one value per column to [rows, groups, group]; zeros pad the last group."""
    rows, cols = each.shape
    missing = grid.groups(cols) * grid.width(cols) - cols
    return torch.nn.functional.pad(each, (0, missing)).reshape(rows, -1, grid.width(cols))


def round_to(weight: Tensor, grid: Grid) -> Quantised:
    """Round every weight to the nearest grid value, with scales that clip nothing.

    Args:
        weight: [rows, cols], finite.
        grid: the grid to round to.
    """
    scale, zero = (one.squeeze(2) for one in next(_ranges(in_groups(weight, grid), grid, 1.0)))
    scales, zeros = (by_column(each, grid, weight.shape[1]) for each in (scale, zero))
    codes = nearest(weight, scales, zeros, grid).to(torch.int16).contiguous()
    return Quantised(grid, codes, scale.contiguous(), zero.contiguous())


def fit(weight: Tensor, prices: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Find the scale and zero point of every group that minimise the cost of its nearest codes.

    Args:
        weight: [rows, cols], finite; an entry that is zero stays zero and costs nothing.
        prices: [cols], the cost of a squared error of 1 in each column.
        grid: the grid to quantise to.

    Returns:
        the scales and the zero points, [rows, groups] each.
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
    """Round scales to the nearest numbers that every format can hold; see `Quantised`."""
    return _held(scale.abs(), grid, torch.round).copysign(scale)


def _ranges(values: Tensor, grid: Grid, shrink: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield candidate scales and zero points for a fraction of each group's range, finest first.

    Args:
        values: [rows, groups, group].
        grid: the grid to quantise to.
        shrink: the fraction; 1 clips nothing.

    Yields:
        scales and zero points, [rows, groups, 1] each.
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
    """Round up to a number that can be a scale; 1 for a group of zeros."""
    return torch.where(scale > 0, _held(scale, grid, torch.ceil), 1.0)


def _held(scale: Tensor, grid: Grid, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Round positive numbers to numbers that can be scales; `rounded` sets the direction."""
    bits, largest = _BITS, _LARGEST
    if grid.bits == 4 and not grid.symmetric:
        bits, largest = _BITS_WITH_ZERO, _LARGEST_WITH_ZERO
    significand, exponent = torch.frexp(scale)
    held = torch.ldexp(rounded(significand * 2**bits), exponent - bits)
    return held.clamp(_SMALLEST, largest)
