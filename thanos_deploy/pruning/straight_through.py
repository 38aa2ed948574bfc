"""What steps change of a quantised layer: where each weight lies between codes, and the scales.

Beside each code there is a real number, a position, of which the code is the nearest integer. It
begins at the weight before it was quantised, moved so far that its code is the one that was chosen;
so weights that lie near the middle between two codes are the first to take another one. What is
multiplied by is always on the grid: codes of the positions, and scales that every format can hold.
Gradients pass rounding as if it were not there, so with g the gradient by the weight

    position:  g scale, where the position is not beyond the codes
    scale:     the sum over its group of g (code - zero)

Zero points stay as they are, and weights that are zero stay zero.

Sources: Bengio, Léonard and Courville, arXiv 1308.3432 (the straight-through estimator); Esser et
al., "Learned Step Size Quantization", arXiv 1902.08153 (scales); Cheng et al., "Optimize Weight
Rounding via Signed Gradient Descent for the Quantization of LLMs", arXiv 2309.05516 (positions that
begin at the weight); Chen et al., "EfficientQAT", arXiv 2407.11062 (a block at a time).
"""

import torch
from torch import Tensor, nn

from thanos_deploy.calibration.tune import Learned
from thanos_deploy.model.linear import turned
from thanos_deploy.ranks.group import current
from thanos_deploy.ranks.sums import whole_of
from thanos_deploy.solver.codes import Quantised, by_column, holdable, in_groups
from thanos_deploy.solver.grid import Grid

# Of the first step, in codes, and as a fraction of a scale. Chosen on held-out C4 documents with
# SmolLM2-135M at int4 in groups of 32; see benchmarks/LOG.md.
_POSITION_RATE, _SCALE_RATE = 2.5e-3, 2e-3

# How far a position may begin from its code.
_REACH = 0.49


class QuantisedWeight:
    """A quantised layer as a `tune.Learner`; every rank has all of it."""

    def __init__(self, linear: nn.Module, weight: Tensor, start: Quantised) -> None:
        """Begin with the codes as they are.

        Args:
            linear: the layer.
            weight: [outputs, inputs], what it was before; its zeros stay zero.
            start: what it was quantised to.
        """
        self._linear, self._start, self._kept = linear, start, weight != 0
        codes, cols = start.codes.to(start.scale.dtype), weight.shape[1]
        # Where they are all 0, one of them is enough.
        self._zeros = (
            start.zero[:1, :1] if start.grid.symmetric else by_column(start.zero, start.grid, cols)
        )
        wanted = weight / by_column(start.scale, start.grid, cols) + self._zeros
        # Adam's fused step takes entries in the order of memory, whatever the strides are.
        self._positions = wanted.clamp(codes - _REACH, codes + _REACH).contiguous()
        self._factors = torch.ones_like(start.scale)  # of the scales
        self.learned = (
            Learned(self._positions, _POSITION_RATE),
            Learned(self._factors, _SCALE_RATE),
        )

    @property
    def quantised(self) -> Quantised:
        """What it is now."""
        start = self._start
        codes = self._codes().to(torch.int16).contiguous()
        return Quantised(start.grid, codes, self._scale(), start.zero)

    def receive(self, gradient: Tensor) -> None:
        """See `Learner`."""
        shape = self._linear.get_parameter("weight").shape
        self.pull(turned(self._linear, whole_of(current(), gradient, shape)))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """See `Learner`."""
        scales = by_column(self._scale(), self._start.grid, self._kept.shape[1])
        return ((self._codes() - self._zeros) * scales).to(dtype)

    def pull(self, gradient: Tensor) -> None:
        """Give positions and scales their gradients.

        Args:
            gradient: float32[outputs, inputs], by the weight.
        """
        start, grid = self._start, self._start.grid
        scales = by_column(self._scale(), grid, gradient.shape[1])
        within = (self._positions >= grid.lowest - 0.5) & (self._positions <= grid.highest + 0.5)
        moves = within & self._kept
        self._positions.grad = (gradient * scales * moves).contiguous()
        self._factors.grad = start.scale * by_scale(gradient, self._codes() - self._zeros, grid)

    def _scale(self) -> Tensor:
        """[outputs, groups]."""
        return holdable(self._factors * self._start.scale, self._start.grid)

    def _codes(self) -> Tensor:
        """[outputs, inputs], of the positions, and the zero point for what is zero."""
        grid = self._start.grid
        codes = self._positions.round().clamp_(grid.lowest, grid.highest)
        return torch.where(self._kept, codes, self._zeros)


def by_scale(gradient: Tensor, steps: Tensor, grid: Grid) -> Tensor:
    """[outputs, groups], the gradient by the scales.

    Args:
        gradient: [outputs, inputs], by the weight.
        steps: [outputs, inputs], of a scale that each weight is: its code less the zero point.
        grid: of the codes.
    """
    return in_groups(gradient * steps, grid).sum(dim=2)
