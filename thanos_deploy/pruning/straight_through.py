"""Tune a quantised layer with straight-through gradients: its positions between codes, its scales.

Each weight has a real number, its position, and the nearest integer to it is the weight's code. A
position starts at the weight before quantisation, in units of the scale, moved just far enough to
round to the chosen code. So weights near the middle between two codes are the first to change code.
The weight that the layer multiplies by is always on the grid: codes of the positions, and scales
that every format can hold. Gradients pass through rounding as if it were the identity, so with g
the gradient with respect to the weight, the gradients are

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

# Learning rates of the first step: of positions in codes, of scales as a fraction of the scale.
# Chosen on held-out C4 documents with SmolLM2-135M at int4 in groups of 32; see benchmarks/LOG.md.
_POSITION_RATE, _SCALE_RATE = 2.5e-3, 2e-3

# Largest distance between an initial position and its code.
_REACH = 0.49


class QuantisedWeight:
    """A quantised layer as a `tune.Learner`; every rank holds all of it."""

    def __init__(self, linear: nn.Module, weight: Tensor, start: Quantised) -> None:
        """Begin with the given codes and scales.

        Args:
            linear: the layer.
            weight: [outputs, inputs], the weight before quantisation; its zeros stay zero.
            start: the quantised weight.
        """
        self._linear, self._start, self._kept = linear, start, weight != 0
        codes, cols = start.codes.to(start.scale.dtype), weight.shape[1]
        # A symmetric grid has only zeros here, so a single one is broadcast.
        self._zeros = (
            start.zero[:1, :1] if start.grid.symmetric else by_column(start.zero, start.grid, cols)
        )
        wanted = weight / by_column(start.scale, start.grid, cols) + self._zeros
        # Adam's fused step reads entries in the order of memory, whatever the strides are.
        self._positions = wanted.clamp(codes - _REACH, codes + _REACH).contiguous()
        self._factors = torch.ones_like(start.scale)  # the scales are multiplied by these
        self.learned = (
            Learned(self._positions, _POSITION_RATE),
            Learned(self._factors, _SCALE_RATE),
        )

    @property
    def quantised(self) -> Quantised:
        """The layer as it is quantised now."""
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
        """Set the gradients of the positions and the scales.

        Args:
            gradient: float32[outputs, inputs], the gradient with respect to the weight.
        """
        start, grid = self._start, self._start.grid
        scales = by_column(self._scale(), grid, gradient.shape[1])
        within = (self._positions >= grid.lowest - 0.5) & (self._positions <= grid.highest + 0.5)
        moves = within & self._kept
        self._positions.grad = (gradient * scales * moves).contiguous()
        self._factors.grad = start.scale * by_scale(gradient, self._codes() - self._zeros, grid)

    def _scale(self) -> Tensor:
        """The scales as they are now; [outputs, groups]."""
        return holdable(self._factors * self._start.scale, self._start.grid)

    def _codes(self) -> Tensor:
        """The codes of the positions, and the zero point for zero weights; [outputs, inputs]."""
        grid = self._start.grid
        codes = self._positions.round().clamp_(grid.lowest, grid.highest)
        return torch.where(self._kept, codes, self._zeros)


def by_scale(gradient: Tensor, steps: Tensor, grid: Grid) -> Tensor:
    """The gradient with respect to the scales; [outputs, groups].

    Args:
        gradient: [outputs, inputs], the gradient with respect to the weight.
        steps: [outputs, inputs], each weight in units of its scale: its code less the zero point.
        grid: the grid of the codes.
    """
    return in_groups(gradient * steps, grid).sum(dim=2)
