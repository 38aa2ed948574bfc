"""Improve the codes, scales and zero points of a quantised layer by coordinate descent.

With E = Q - W, the loss is the sum over the rows of e H e^T. It is quadratic in each code, each
scale and each zero point while the others are fixed. Group by group, each of them moves to the best
value on the grid, and no move increases the loss. For a code in column j the best real value is
q_j - (e H)_j / H_jj, and the code nearest to it is the best one. A group's scale moves the weights
along their codes, and its zero point moves them along the scale.

Cost of a pass over a [rows, cols] layer: 2 rows cols^2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from thanos_deploy.solver.codes import Quantised, holdable, nearest
from thanos_deploy.solver.grid import Grid


def descend(
    weight: Tensor, kept: Tensor, hessian: Tensor, start: Quantised, *, passes: int
) -> Quantised:
    """Lower the loss of a quantised layer by coordinate descent.

    Args:
        weight: [rows, cols], finite.
        kept: bool[rows, cols], False where the quantised weight is zero.
        hessian: [cols, cols], with a positive diagonal.
        start: the quantised weight to improve.
        passes: number of passes over all codes, scales and zero points.

    Returns:
        a quantised weight whose loss is not larger, up to the rounding errors of the sums.
    """
    grid, group = start.grid, start.grid.width(weight.shape[1])
    codes, scales, zeros = start.codes.to(weight.dtype), start.scale.clone(), start.zero.clone()
    for _ in range(passes):
        error = Quantised(grid, codes, scales, zeros).weight - weight
        pull = error @ hessian  # half the gradient
        for number in range(scales.shape[1]):
            part = slice(number * group, min((number + 1) * group, len(hessian)))
            here = _Group(
                grid, kept[:, part], hessian[part, part], codes[:, part], pull[:, part].clone()
            )
            scale, zero = scales[:, number], zeros[:, number]
            before = here.values(scale, zero)
            here.move_codes(scale, zero)
            scale = here.move_scale(scale, zero)
            if not grid.symmetric:
                zero = here.move_zero(scale, zero)
            scales[:, number], zeros[:, number] = scale, zero
            pull += (here.values(scale, zero) - before) @ hessian[part]
    return Quantised(grid, codes.to(torch.int16), scales, zeros)


@dataclass(slots=True, eq=False)
class _Group:
    """One group of columns, and the loss as a function of this group alone.

    Attributes:
        grid: the grid of the codes.
        kept: bool[rows, inputs], False where a weight has to stay zero.
        hessian: [inputs, inputs], the block of the Hessian at these columns.
        codes: [rows, inputs], changed in place.
        pull: [rows, inputs], e H in these columns for the current weights: half the gradient.
    """

    grid: Grid
    kept: Tensor
    hessian: Tensor
    codes: Tensor
    pull: Tensor

    def values(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The dequantised weights of the group; [rows, inputs]."""
        return (self.codes - zero[:, None]) * scale[:, None]

    def move_codes(self, scale: Tensor, zero: Tensor) -> None:
        """Move every code to its best value, one column after another."""
        for column, row in enumerate(self.hessian):
            code = self.codes[:, column]
            wanted = (code - zero) * scale - self.pull[:, column] / row[column]
            best = nearest(wanted, scale, zero, self.grid)
            moved = torch.where(self.kept[:, column], best - code, 0.0)
            self.pull += (moved * scale)[:, None] * row
            code += moved

    def move_scale(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the best scale of the same sign that every format can hold."""
        along = self.codes - zero[:, None]
        slope, bend, through = self._quadratic(along)
        wanted = holdable(scale - slope / bend, self.grid)
        step = torch.where(wanted * scale > 0, wanted - scale, 0.0)
        return scale + self._take(step, slope, bend, through)

    def move_zero(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the best zero point; weights that are zero stay zero."""
        along = torch.where(self.kept, -scale[:, None], 0.0)
        slope, bend, through = self._quadratic(along)
        wanted = (zero - slope / bend).round_().clamp_(self.grid.lowest, self.grid.highest)
        zero = zero + self._take(wanted - zero, slope, bend, through)
        self.codes.copy_(torch.where(self.kept, self.codes, zero[:, None]))
        return zero

    def _quadratic(self, along: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Expand the loss along a direction: a step t adds 2 t slope + t^2 bend to it.

        Returns:
            slope, [rows]; bend, [rows], infinite where the direction is zero, so that the best step
            is 0; and the change of `pull` at t = 1, [rows, inputs].
        """
        through = along @ self.hessian
        bend = (along * through).sum(dim=1)
        return (along * self.pull).sum(dim=1), torch.where(bend > 0, bend, torch.inf), through

    def _take(self, step: Tensor, slope: Tensor, bend: Tensor, through: Tensor) -> Tensor:
        """Take the steps that lower the loss; return them, with 0 in place of the others."""
        taken = torch.where(step * (2 * slope + step * bend) < 0, step, 0.0)
        self.pull += taken[:, None] * through
        return taken
