"""Better codes, scales and zero points for a quantised layer, one after another.

With E = Q - W, what is lost is the sum over the rows of e H e^T, a quadratic in every code, every
scale and every zero point while the others stand still. Each is put to the best value that the grid
has, group by group, and each step that is taken loses less than before it. For a code at column j
the best real value is q_j - (e H)_j / H_jj, and the nearest code is the best one; a group's scale
is a step along its codes, and its zero point one along its scale.

Cost of a pass over a [rows, cols] layer: twice rows cols^2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from thanos_deploy.solver.codes import Quantised, holdable, nearest
from thanos_deploy.solver.grid import Grid


def descend(weight: Tensor, hessian: Tensor, start: Quantised, *, passes: int) -> Quantised:
    """Improve what a layer was quantised to.

    Args:
        weight: [rows, cols], finite; its zeros stay zero.
        hessian: [cols, cols], with positive numbers on the diagonal.
        start: codes of it.
        passes: how often every code, scale and zero point has its turn.

    Returns:
        codes that lose no more, but for the rounding errors of the sums.
    """
    grid, group = start.grid, start.grid.width(weight.shape[1])
    kept = weight != 0
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
    """The columns of a layer that share scales, and what is lost as long as only they change.

    Attributes:
        grid: what they are quantised to.
        kept: bool[rows, inputs], those that are not to be zero.
        hessian: [inputs, inputs].
        codes: [rows, inputs], changed in place.
        pull: [rows, inputs], (e H) at these columns, for the values as they are now.
    """

    grid: Grid
    kept: Tensor
    hessian: Tensor
    codes: Tensor
    pull: Tensor

    def values(self, scale: Tensor, zero: Tensor) -> Tensor:
        """What the codes stand for."""
        return (self.codes - zero[:, None]) * scale[:, None]

    def move_codes(self, scale: Tensor, zero: Tensor) -> None:
        """Put every code to its best, one column after another."""
        for column, row in enumerate(self.hessian):
            code = self.codes[:, column]
            wanted = (code - zero) * scale - self.pull[:, column] / row[column]
            best = nearest(wanted, scale, zero, self.grid)
            moved = torch.where(self.kept[:, column], best - code, 0.0)
            self.pull += (moved * scale)[:, None] * row
            code += moved

    def move_scale(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The best scale of its sign, of those that every format can hold."""
        along = self.codes - zero[:, None]
        slope, bend, through = self._quadratic(along)
        wanted = holdable(scale - slope / bend, self.grid)
        step = torch.where(wanted * scale > 0, wanted - scale, 0.0)
        return scale + self._take(step, slope, bend, through)

    def move_zero(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The best zero point; weights that are zero stay so."""
        along = torch.where(self.kept, -scale[:, None], 0.0)
        slope, bend, through = self._quadratic(along)
        wanted = (zero - slope / bend).round_().clamp_(self.grid.lowest, self.grid.highest)
        zero = zero + self._take(wanted - zero, slope, bend, through)
        self.codes.copy_(torch.where(self.kept, self.codes, zero[:, None]))
        return zero

    def _quadratic(self, along: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a step t along a direction, which adds 2 t slope + t^2 bend to what is lost.

        Returns:
            slope and bend, [rows] each, where a direction that leads nowhere bends upwards; and
            [rows, inputs], what the pull changes by at t = 1.
        """
        through = along @ self.hessian
        bend = (along * through).sum(dim=1)
        return (along * self.pull).sum(dim=1), torch.where(bend > 0, bend, torch.inf), through

    def _take(self, step: Tensor, slope: Tensor, bend: Tensor, through: Tensor) -> Tensor:
        """The steps that lose less; the others are 0."""
        taken = torch.where(step * (2 * slope + step * bend) < 0, step, 0.0)
        self.pull += taken[:, None] * through
        return taken
