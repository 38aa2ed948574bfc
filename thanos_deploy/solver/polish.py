"""Improve the n:m mask of a pruned layer: choose each group's mask again, given all others.

A block-wise method chooses each group's mask when it reaches the group, from weights that later
groups and the final fit change. Here every group is visited once more. With E = P - W for the
pruned weight P, the loss is the sum over the rows of e H e^T. As a function of one group c alone,
it is a quadratic whose minimum without a mask is p = P_c - (e H)_c A with A = H_cc^-1. Removing the
weights z of the group and refitting its other weights adds p_z (A_zz)^-1 p_z^T to the loss and
leaves p - p_z (A_zz)^-1 A_z. That is the multi-weight lemma of Ilin and Richtarik, arXiv
2504.05346, for one group. All masks of the pattern are tried and the best one is taken, so the loss
never grows.

Cost of a pass over a [rows, cols] layer: 4 rows cols^2, as much as two conjugate-gradient steps.
"""

from itertools import combinations
from math import comb
from typing import TypeGuard

import torch
from torch import Tensor

from thanos_deploy.pattern import Pattern, SemiStructured

# Largest number of columns whose effect on the columns to their right is applied in one product.
_BLOCK = 128

# Largest number of masks of a group. All of them are tried; 8:16 would have 12,870.
_MASKS = 128


def few_masks(pattern: Pattern) -> TypeGuard[SemiStructured]:
    """Return whether a group of this pattern has few enough masks to try all of them."""
    return isinstance(pattern, SemiStructured) and comb(pattern.group, pattern.kept) <= _MASKS


def polish(
    weight: Tensor, hessian: Tensor, diagonal: Tensor, pruned: Tensor, pattern: SemiStructured
) -> tuple[Tensor, Tensor]:
    """Choose the mask of every group of columns once more and refit the weights that it keeps.

    Args:
        weight: [rows, cols], the weight whose output is the target.
        hessian: [cols, cols].
        diagonal: [cols], the diagonal of the damped Hessian; positive.
        pruned: [rows, cols], a weight that has the pattern.
        pattern: the pattern; see `few_masks`.

    Returns:
        the new weight, [rows, cols], whose loss with damping is not larger, up to the rounding
        errors of the sums; and the new mask, bool[rows, cols], True = removed.
    """
    group = pattern.group
    damping = diagonal - hessian.diagonal()
    masks = _masks(pattern, weight.device)
    leaves = torch.zeros(len(masks), group, dtype=torch.bool, device=weight.device)
    leaves.scatter_(1, masks, True)
    error = pruned - weight
    pull = torch.addcmul(error @ hessian, error, damping)  # half the gradient
    pruned, removed = pruned.clone(), torch.empty_like(pruned, dtype=torch.bool)
    start = 0
    for block in torch.split(pruned, _BLOCK - _BLOCK % group, dim=1):
        stop = start + block.shape[1]
        own = hessian[start:stop, start:stop] + damping[start:stop].diag()
        choices = _choices(own, masks, group)
        before, here = block.clone(), pull[:, start:stop].clone()
        for number, (inverse, roots, moves) in enumerate(zip(*choices, strict=True)):
            at = slice(number * group, (number + 1) * group)
            values = block[:, at]
            best = values - here[:, at] @ inverse
            costs = (best @ roots).square_().view(-1, *masks.shape).sum(dim=2)
            way = costs.argmin(dim=1)
            removed[:, start:stop][:, at] = gone = leaves[way]
            taken = best.gather(1, masks[way])
            fitted = best.sub_((taken[:, :, None] * moves[way]).sum(dim=1)).masked_fill_(gone, 0.0)
            here[:, at.stop :].addmm_(fitted - values, own[at, at.stop :])
            values.copy_(fitted)
        pull[:, stop:].addmm_(block - before, hessian[start:stop, stop:])
        start = stop
    return pruned, removed


def _masks(pattern: SemiStructured, device: torch.device) -> Tensor:
    """All masks of a group, each as the indices that it removes; int64[ways, count]."""
    ways = combinations(range(pattern.group), pattern.group - pattern.kept)
    return torch.tensor(list(ways), device=device)


def _inverse(positive: Tensor) -> Tensor:
    """Invert positive definite matrices, unchecked, because a check would wait for the device."""
    lower, _ = torch.linalg.cholesky_ex(positive)
    return torch.cholesky_inverse(lower)


def _choices(own: Tensor, masks: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the matrices by which every group of a block prices and applies its masks.

    Args:
        own: [cols, cols], the damped Hessian of the block.
        masks: int64[ways, count], the indices that each mask removes.
        group: number of columns of a group.

    Returns:
        for all groups, in the dtype of the Hessian:
        A, [groups, group, group].
        R, [groups, group, ways * count]: the squares of p R, summed over `count`, are the costs of
        the masks, because (A_zz)^-1 is L^-T L^-1 for the Cholesky factor L of A_zz.
        (A_zz)^-1 A_z, [groups, ways, count, group].
    """
    ways, count = masks.shape
    groups = len(own) // group
    each = torch.arange(groups, device=own.device)
    diagonal = own.reshape(groups, group, groups, group)[each, :, each]
    inverse = _inverse(diagonal.double())
    lower, _ = torch.linalg.cholesky_ex(inverse[:, masks[:, :, None], masks[:, None, :]])
    identity = torch.eye(count, dtype=lower.dtype, device=own.device)
    lower_inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    roots = inverse.new_zeros(groups, group, ways, count)
    each_way = torch.arange(ways, device=own.device)
    roots[:, masks, each_way[:, None]] = lower_inverse.mT
    moves = torch.cholesky_inverse(lower) @ inverse[:, masks]
    return (
        inverse.to(own.dtype),
        roots.flatten(2).to(own.dtype),
        moves.to(own.dtype),
    )
