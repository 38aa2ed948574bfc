"""SparseGPT: prune column by column; the columns to the right absorb the error of each.

Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot", arXiv 2301.00774. V_jj^2 is the optimal-brain-surgeon denominator of column j once
everything to its left is frozen, and row j of V gives the update; see
`thanos_deploy.solver.hessian`.

There are two differences from the published code. A block removes exactly its share (the published
threshold removes one more, and still more with ties), and ties are broken in a fixed order. Cost
for a [rows, cols] layer: cols^3 to factor and rows cols^2 to update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thanos_deploy.methods import Preset, check_group
from thanos_deploy.methods._blocks import Blocks
from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured

if TYPE_CHECKING:
    from torch import Tensor

    from thanos_deploy.solver.division import Division
    from thanos_deploy.solver.layer import LayerProblem, LayerResult


@dataclass(frozen=True, slots=True)
class Options(Blocks):
    """The block size, and the damping. A block's updates to its right are applied together."""


PRESETS = {"paper": Preset(Options())}


def prune(problem: LayerProblem, pattern: Pattern, options: Options) -> LayerResult:
    """Prune one linear layer.

    Unstructured: each block of columns loses the same fraction, chosen over all its rows at once.
    n:m: the mask of each group is chosen when its first column is reached, from the weights at that
    time. Structured (as the Thanos paper defines this baseline): each block loses the columns with
    the smallest mean score, their number rounded up.

    Args:
        problem: float32 or float64 tensors; the work is done in the weight's dtype.
        pattern: the pattern to prune to.
        options: see `Options`.

    Raises:
        HessianError: the weight or the Hessian is not finite, or the Hessian cannot be factored.
        ModelError, UsageError: see `check`.
    """
    import torch

    from thanos_deploy.solver.hessian import factor
    from thanos_deploy.solver.layer import LayerResult
    from thanos_deploy.solver.mask import smallest_in_groups

    cols, block_columns = problem.weight.shape[1], options.block_columns
    check(problem.name, cols, pattern, options)
    factored, division = factor(problem, options), problem.division
    W, V = problem.weight.clone(), factored.V
    M = torch.zeros_like(W, dtype=torch.bool)
    for start in range(0, cols, block_columns):
        stop = min(start + block_columns, cols)
        scores = (W[:, start:stop] / V.diagonal()[start:stop]).square()
        M[:, start:stop] = _block_mask(scores, pattern, division)
        errors = torch.zeros_like(W[:, start:stop])
        for j in range(start, stop):
            if isinstance(pattern, SemiStructured) and j % pattern.group == 0:
                group = slice(j, j + pattern.group)
                scores = (W[:, group] / V.diagonal()[group]).square()
                M[:, group] = smallest_in_groups(scores, pattern.kept, pattern.group)
            error = torch.where(M[:, j], W[:, j], 0.0) / V[j, j]
            W[:, j:stop] -= error[:, None] * V[j, j:stop]
            W[:, j] = torch.where(M[:, j], 0.0, W[:, j])
            errors[:, j - start] = error
        W[:, stop:] -= division.product(errors, V[start:stop, stop:])
    return LayerResult.of(problem, W, M, damping=factored.damping)


def divisible(pattern: Pattern, options: Options) -> bool:
    """Return whether ranks can prune the rows of a layer separately; false for whole columns.

    The threshold of an unstructured pattern is found from counts, and n:m groups lie within rows.
    """
    return not isinstance(pattern, Structured)


def check(name: str, cols: int, pattern: Pattern, options: Options) -> None:
    """Refuse a layer that `prune` cannot handle, judged by its number of inputs alone.

    Raises:
        ModelError: the number of inputs is not a multiple of the pattern's group.
        UsageError: the block size is not a multiple of the pattern's group.
    """
    check_group(name, cols, pattern)
    options.check_pattern(name, pattern)


def _block_mask(scores: Tensor, pattern: Pattern, division: Division) -> Tensor:
    """Choose the mask of a block before any of its columns is visited; empty for n:m patterns."""
    import torch

    from thanos_deploy.solver.mask import removed_count, smallest_columns, smallest_in_matrix

    match pattern:
        case Unstructured(sparsity):
            count = removed_count(sparsity, division.rows * scores.shape[1])
            return smallest_in_matrix(scores, count, division)
        case SemiStructured():
            return torch.zeros_like(scores, dtype=torch.bool)  # chosen group by group
        case Structured(sparsity):
            count = math.ceil(sparsity * scores.shape[1] - 1e-6)
            return smallest_columns(scores.mean(dim=0), count).expand_as(scores)
