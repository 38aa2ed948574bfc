"""Quantise a layer column by column: the columns to the right absorb the error of each.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323, in the factor of `solver.hessian`: the error of column j, divided
by V_jj, times row j of V is what the columns from j on lose. A weight that was pruned is quantised
to zero like any other column's value, so that zeros stay zero and what compensation puts there goes
on to the right.

Each group's scale is chosen when its first column is reached, from the weights as they are then, as
the one of least error where that of column j costs its square over V_jj^2. Cost for a [rows, cols]
layer: rows cols^2 to update.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from thanos_deploy.solver.damping import DEFAULT, Damping
from thanos_deploy.solver.grid import Grid
from thanos_deploy.solver.hessian import factor
from thanos_deploy.solver.layer import LayerProblem, output_energy

# Scales that are tried for a group, as fractions of the one that clips nothing.
_SHRINKS = tuple(1.0 - 0.025 * step for step in range(17))

# Relative; of bfloat16. And its largest number that float16 has too.
_HALF_A_STEP = 2**-8
_LARGEST = 65280.0

# Columns whose updates to the right are applied together: at least so many, in whole groups.
_BLOCK = 128


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A matrix of codes.

    Attributes:
        grid: what they are codes of.
        codes: int16[rows, cols].
        scale: [rows, groups], positive numbers that bfloat16 and float16 have, in the dtype of the
            weight.
        zero: the same shape and dtype, whole numbers; zeros if the grid is symmetric.
    """

    grid: Grid
    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def weight(self) -> Tensor:
        """[rows, cols], the values, in the dtype of the scales."""
        scale, zero = (self._by_column(each) for each in (self.scale, self.zero))
        return (self.codes.to(scale.dtype) - zero) * scale

    def _by_column(self, each: Tensor) -> Tensor:
        return each.repeat_interleave(self.grid.group, dim=1)[:, : self.codes.shape[1]]


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedLayer:
    """A quantised layer, and what that cost.

    Attributes:
        quantised: its weight.
        relative_error: fraction of the energy of the output that is lost.
        rounding_error: the same if every weight had been rounded to the nearest multiple.
        compensated: fraction of the rows that compensation made better than rounding; the others
            are rounded.
        energy: of the output.
    """

    quantised: Quantised
    relative_error: float
    rounding_error: float
    compensated: float
    energy: float


def round_to(weight: Tensor, grid: Grid) -> Quantised:
    """Every weight to the nearest multiple; the scales clip nothing.

    Args:
        weight: [rows, cols], finite.
        grid: what to round to.
    """
    parts = torch.split(weight, grid.group, dim=1)
    fitted = [_range(part, grid, 1.0) for part in parts]
    codes = [_codes(part, *each, grid) for part, each in zip(parts, fitted, strict=True)]
    return Quantised(
        grid,
        torch.cat(codes, dim=1).to(torch.int16),
        torch.cat([scale for scale, _ in fitted], dim=1),
        torch.cat([zero for _, zero in fitted], dim=1),
    )


def quantise(problem: LayerProblem, grid: Grid, damping: Damping = DEFAULT) -> QuantisedLayer:
    """Quantise a layer with error compensation; where that is worse for a row, round it.

    Rows do not depend on each other, so the choice is made for each.

    Args:
        problem: the layer, pruned or not; its zeros stay zero.
        grid: what to quantise to.
        damping: of the Hessian.

    Raises:
        HessianError: the statistics are not finite or cannot be factored.
    """
    V = factor(problem, damping).V
    rounded, best = round_to(problem.weight, grid), compensate(problem.weight, V, grid)
    lost = output_energy(problem.weight - rounded.weight, problem.hessian)
    lost_best = output_energy(problem.weight - best.weight, problem.hessian)
    worse = lost_best > lost
    chosen = Quantised(
        grid,
        *(
            torch.where(worse[:, None], ours, others)
            for ours, others in (
                (rounded.codes, best.codes),
                (rounded.scale, best.scale),
                (rounded.zero, best.zero),
            )
        ),
    )
    whole = output_energy(problem.weight, problem.hessian).sum().item()
    return QuantisedLayer(
        chosen,
        relative_error=torch.minimum(lost, lost_best).sum().item() / whole if whole > 0 else 0.0,
        rounding_error=lost.sum().item() / whole if whole > 0 else 0.0,
        compensated=1.0 - worse.double().mean().item(),
        energy=whole,
    )


def compensate(weight: Tensor, V: Tensor, grid: Grid) -> Quantised:
    """Quantise column by column; the columns to the right absorb the error of each.

    Args:
        weight: [rows, cols], finite; its zeros stay zero.
        V: [cols, cols], see `solver.layer.Factor`.
        grid: what to quantise to.
    """
    rows, cols = weight.shape
    W, keep = weight.clone(), weight != 0
    codes = torch.empty_like(W, dtype=torch.int16)
    scales, zeros = (W.new_empty(rows, grid.groups(cols)) for _ in range(2))
    block = max(_BLOCK // grid.group, 1) * grid.group
    for start in range(0, cols, block):
        stop = min(start + block, cols)
        errors = torch.empty_like(W[:, start:stop])
        for j in range(start, stop):
            group = j // grid.group
            if j % grid.group == 0:
                part = slice(j, min(j + grid.group, stop))
                prices = V.diagonal()[part].square().reciprocal()
                fitted = fit_scale(W[:, part], keep[:, part], prices, grid)
                scales[:, group], zeros[:, group] = fitted[0][:, 0], fitted[1][:, 0]
            scale, zero = scales[:, group], zeros[:, group]
            code = torch.where(keep[:, j], _codes(W[:, j], scale, zero, grid), zero)
            error = (W[:, j] - (code - zero) * scale) / V[j, j]
            W[:, j + 1 : stop] -= error[:, None] * V[j, j + 1 : stop]
            codes[:, j], errors[:, j - start] = code, error
        W[:, stop:] -= errors @ V[start:stop, stop:]
    return Quantised(grid, codes, scales, zeros)


def fit_scale(part: Tensor, keep: Tensor, prices: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The scale and zero point of one group, of least price.

    Args:
        part: [rows, inputs], the weights of the group.
        keep: bool[rows, inputs], those that are not to be zero.
        prices: [inputs], of a squared error of 1.
        grid: what to quantise to.

    Returns:
        [rows, 1] each.
    """
    kept = torch.where(keep, part, 0.0)
    scale, zero = _range(kept, grid, 1.0)
    least = kept.new_full((len(part), 1), torch.inf)
    for shrink in _SHRINKS:
        tried, its_zero = _range(kept, grid, shrink)
        error = kept - (_codes(kept, tried, its_zero, grid) - its_zero) * tried
        price = (error.square() @ prices)[:, None]
        better = price < least
        least = torch.where(better, price, least)
        scale, zero = torch.where(better, tried, scale), torch.where(better, its_zero, zero)
    return scale, zero


def _range(part: Tensor, grid: Grid, shrink: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point for a fraction of the range of a group; [rows, 1] each."""
    if grid.symmetric:
        scale = part.abs().amax(dim=1, keepdim=True) * (shrink / grid.highest)
        return _positive(scale), torch.zeros_like(scale)
    low = part.amin(dim=1, keepdim=True).clamp(max=0.0) * shrink
    high = part.amax(dim=1, keepdim=True).clamp(min=0.0) * shrink
    scale = _positive((high - low) / grid.highest)
    return scale, (-low / scale).round_().clamp_(grid.lowest, grid.highest)


def _positive(scale: Tensor) -> Tensor:
    """The next larger number of bfloat16 in the range of float16; 1 for a group of zeros."""
    up = (scale * (1 + _HALF_A_STEP)).to(torch.bfloat16).to(scale.dtype)
    half = torch.finfo(torch.float16)
    return torch.where(scale > 0, up.clamp(half.smallest_normal, _LARGEST), 1.0)


def _codes(values: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The nearest codes, in the dtype of the values."""
    return (values / scale).round_().add_(zero).clamp_(grid.lowest, grid.highest)
