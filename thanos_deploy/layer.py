"""One linear layer as a pruning problem, and its solution."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LayerProblem:
    """A linear layer and what calibration saw of its input.

    Attributes:
        weight: float32[rows, cols]; rows are outputs, columns are inputs.
        hessian: float32[cols, cols]; the sum of x x^T over the calibration tokens, undamped, in
            any positive scale. Its diagonal is the squared input norm that Wanda's score uses, so
            this one statistic serves every method. The paper's H is twice this one, which changes
            no result.
        name: the layer's name, for messages.
    """

    weight: Tensor
    hessian: Tensor
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class LayerResult:
    """A pruned layer.

    Attributes:
        weight: float32[rows, cols]; exactly +0.0 wherever `mask` is True.
        mask: bool[rows, cols]; True = removed.
        relative_error: fraction of the output's energy that changed, see `relative_error`.
        damping: fraction that was added to the Hessian's diagonal to factor it; 0 where the
            method factors nothing.
    """

    weight: Tensor
    mask: Tensor
    relative_error: float
    damping: float


def without_update(problem: LayerProblem, mask: Tensor) -> LayerResult:
    """The layer with the masked weights set to zero and nothing else changed.

    Args:
        problem: the layer.
        mask: bool[rows, cols], True = removed.
    """
    weight = torch.where(mask, 0.0, problem.weight)
    error = relative_error(problem.weight, weight, problem.hessian)
    return LayerResult(weight, mask, error, damping=0.0)


def relative_error(before: Tensor, after: Tensor, hessian: Tensor) -> float:
    """||(after - before) X||_F^2 / ||before X||_F^2, from the undamped X X^T.

    A layer whose output is zero on all calibration tokens cannot lose anything: its error is 0.

    Args:
        before: float32[rows, cols].
        after: float32[rows, cols].
        hessian: float32[cols, cols], any positive scale.
    """
    energy = ((before @ hessian) * before).sum().item()
    change = after - before
    return ((change @ hessian) * change).sum().item() / energy if energy > 0.0 else 0.0
