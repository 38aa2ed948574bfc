"""Does a weight, as it was written, keep its pattern?

Every claim of a pattern in a bundle is read back from the tensor that was written, after the cast
to the checkpoint's dtype and after export, and never taken from the pruning mask.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one weight holds.

    Attributes:
        sparsity: fraction of the entries that are zero.
        holds: the whole weight keeps the pattern. For n:m: no aligned group of m inputs, in any
            row, has more than n non-zeros.
    """

    sparsity: float
    holds: bool


def judge(nonzero: NDArray[np.bool_], pattern: Pattern) -> Verdict:
    """Judge one weight.

    Args:
        nonzero: bool[rows, cols], the entries that are not zero; cols are the inputs.
        pattern: what is claimed.
    """
    zeros = int(nonzero.size - np.count_nonzero(nonzero))
    match pattern:
        case SemiStructured(kept, group):
            rows, cols = nonzero.shape
            holds = cols % group == 0 and bool(
                (nonzero.reshape(rows, cols // group, group).sum(axis=2) <= kept).all()
            )
        case Unstructured(sparsity):
            # Methods that choose row by row round down in each.
            holds = zeros > sparsity * nonzero.size - len(nonzero) - 1e-6
        case Structured(sparsity):
            dead = int((~nonzero.any(axis=0)).sum())
            holds = dead >= math.floor(sparsity * nonzero.shape[1] + 1e-6)
    return Verdict(sparsity=zeros / nonzero.size, holds=holds)
