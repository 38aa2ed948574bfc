"""Judge whether a weight keeps its sparsity pattern in the file that was written.

Every statement about patterns in a bundle is checked on the tensor that was written, after the cast
to the checkpoint's dtype and after export. It is never taken from the pruning mask.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured

if TYPE_CHECKING:  # a server reads verdicts and has no torch
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one weight.

    Attributes:
        sparsity: fraction of the entries that are zero.
        holds: whether the whole weight keeps the pattern. For n:m: no aligned group of m inputs, in
            any row, has more than n non-zeros.
    """

    sparsity: float
    holds: bool


def judge(nonzero: "NDArray[np.bool_] | Tensor", pattern: Pattern) -> Verdict:
    """Judge one weight, on the device that it is on.

    Args:
        nonzero: bool[rows, cols], the entries that are not zero; cols are the inputs.
        pattern: the pattern that the weight should keep.
    """
    entries: Any = nonzero  # only methods that NumPy and PyTorch have in common are used
    rows, cols = entries.shape
    size = rows * cols
    zeros = size - int(entries.sum())
    match pattern:
        case SemiStructured(kept, group):
            holds = cols % group == 0 and bool(
                (entries.reshape(rows, cols // group, group).sum(2) <= kept).all()
            )
        case Unstructured(sparsity):
            # Methods that choose row by row round down in each row.
            holds = zeros > sparsity * size - rows - 1e-6
        case Structured(sparsity):
            dead = int((~entries.any(0)).sum())
            holds = dead >= math.floor(sparsity * cols + 1e-6)
    return Verdict(sparsity=zeros / size, holds=holds)
