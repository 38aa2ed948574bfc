"""Judge whether a weight keeps its pattern in the file that was written.

Every claim of a pattern in a bundle is read back from the tensor that was written, after the cast
to the checkpoint's dtype and after export, and never taken from the pruning mask.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured

if TYPE_CHECKING:  # a server has no torch, and reads verdicts
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one weight.

    Attributes:
        sparsity: fraction of the entries that are zero.
        holds: the whole weight keeps the pattern. For n:m: no aligned group of m inputs, in any
            row, has more than n non-zeros.
    """

    sparsity: float
    holds: bool


def judge(nonzero: "NDArray[np.bool_] | Tensor", pattern: Pattern) -> Verdict:
    """Judge one weight, where it is.

    Args:
        nonzero: bool[rows, cols], the entries that are not zero; cols are the inputs.
        pattern: what is claimed.
    """
    entries: Any = nonzero  # only what arrays of NumPy and of PyTorch have in common is used
    rows, cols = entries.shape
    size = rows * cols
    zeros = size - int(entries.sum())
    match pattern:
        case SemiStructured(kept, group):
            holds = cols % group == 0 and bool(
                (entries.reshape(rows, cols // group, group).sum(2) <= kept).all()
            )
        case Unstructured(sparsity):
            # Methods that choose row by row round down in each.
            holds = zeros > sparsity * size - rows - 1e-6
        case Structured(sparsity):
            dead = int((~entries.any(0)).sum())
            holds = dead >= math.floor(sparsity * cols + 1e-6)
    return Verdict(sparsity=zeros / size, holds=holds)
