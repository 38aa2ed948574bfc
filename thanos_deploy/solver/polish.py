"""Better n:m masks for a pruned layer: every group's mask is chosen again, in view of the others.

The blocks of a method choose each group's mask when they reach it, from weights that later groups
and the final fit change. Here every group has its turn once more. With E = P - W for the pruned
weight P, what is lost is the sum over the rows of e H e^T. As long as only the group c changes, it
is a quadratic whose minimum without a mask is p = P_c - (e H)_c A with A = H_cc^-1; removing the
weights z of it and fitting the others costs p_z (A_zz)^-1 p_z^T more, and leaves
p - p_z (A_zz)^-1 A_z. That is the multi-weight lemma of Ilin and Richtarik, arXiv 2504.05346, for
one group. All masks of the pattern are tried and the best one is taken, so no group loses more than
before.

Cost of a pass over a [rows, cols] layer: 4 rows cols^2, as of two steps of conjugate gradients.
"""

from itertools import combinations
from math import comb
from typing import TypeGuard

import torch
from torch import Tensor

from thanos_deploy.pattern import Pattern, SemiStructured

# Columns whose effect on those to the right is added up in one product, at most.
_BLOCK = 128

# Of a group. All of them are tried, and 8:16 would have 12,870.
_MASKS = 128


def few_masks(pattern: Pattern) -> TypeGuard[SemiStructured]:
    """The masks of a group of this pattern are so few that all can be tried."""
    return isinstance(pattern, SemiStructured) and comb(pattern.group, pattern.kept) <= _MASKS


def polish(
    weight: Tensor, hessian: Tensor, diagonal: Tensor, pruned: Tensor, pattern: SemiStructured
) -> tuple[Tensor, Tensor]:
    """Choose the mask of every group of columns again, once, and fit what it keeps.

    Args:
        weight: [rows, cols], the weight whose output is wanted.
        hessian: [cols, cols].
        diagonal: [cols], that of the Hessian with its damping; positive.
        pruned: [rows, cols], of the pattern.
        pattern: which; see `few_masks`.

    Returns:
        [rows, cols], which loses no more, damping included, but for the rounding errors of the
        sums; and bool[rows, cols], True = removed.
    """
    group = pattern.group
    damping = diagonal - hessian.diagonal()
    masks = _masks(pattern, weight.device)
    error = pruned - weight
    pull = torch.addcmul(error @ hessian, error, damping)  # half the gradient
    pruned, removed = pruned.clone(), torch.empty_like(pruned, dtype=torch.bool)
    start = 0
    for block in torch.split(pruned, _BLOCK - _BLOCK % group, dim=1):
        stop = start + block.shape[1]
        own = hessian[start:stop, start:stop] + damping[start:stop].diag()
        before, here = block.clone(), pull[:, start:stop].clone()
        for first in range(0, stop - start, group):
            at = slice(first, first + group)
            values = block[:, at]
            inverse = _inverse(own[at, at].double())
            best = values - here[:, at] @ inverse.to(weight.dtype)
            fitted, gone = _fitted(best, inverse, masks)
            here.addmm_(fitted - values, own[at])
            values.copy_(fitted)
            removed[:, start:stop][:, at] = gone
        pull[:, stop:].addmm_(block - before, hessian[start:stop, stop:])
        start = stop
    return pruned, removed


def _masks(pattern: SemiStructured, device: torch.device) -> Tensor:
    """Every way to remove as many of a group as the pattern does; int64[ways, count]."""
    ways = combinations(range(pattern.group), pattern.group - pattern.kept)
    return torch.tensor(list(ways), device=device)


def _inverse(positive: Tensor) -> Tensor:
    """Of positive definite matrices; that they are is not checked, which would be waited for."""
    lower, _ = torch.linalg.cholesky_ex(positive)
    return torch.cholesky_inverse(lower)


def _fitted(best: Tensor, inverse: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest mask of every row, and the weights that it keeps, fitted.

    Args:
        best: [rows, group], the weights that would lose least without a mask.
        inverse: float64[group, group], A.
        masks: int64[ways, count], what each removes.

    Returns:
        [rows, group], and bool[rows, group], True = removed.
    """
    price = _inverse(inverse[masks[:, :, None], masks[:, None, :]])  # [ways, count, count]
    moved = (price @ inverse[masks]).to(best.dtype)  # (A_zz)^-1 A_z, [ways, count, group]
    values = best[:, masks]  # [rows, ways, count]
    costs = torch.einsum("rwi,wij,rwj->rw", values, price.to(best.dtype), values)
    way = costs.argmin(dim=1)
    gone = masks[way]
    change = (best.gather(1, gone)[:, None] @ moved[way]).squeeze(1)
    removed = torch.zeros_like(best, dtype=torch.bool).scatter_(1, gone, True)
    return (best - change).masked_fill_(removed, 0.0), removed
