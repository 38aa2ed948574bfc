"""Choose the weights to remove from their scores: exact counts, and one rule for ties."""

import math
from itertools import combinations

import torch
from torch import Tensor

from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured
from thanos_deploy.solver.division import Division
from thanos_deploy.solver.threshold import threshold

# Up to this group size, a CPU compares all pairs of scores faster than it sorts them. A GPU sorts,
# because that takes fewer kernel launches.
_COUNTED = 8


def removed_count(fraction: float, entries: int) -> int:
    """floor(fraction * entries), safe from binary fractions that fall just short of an integer."""
    return min(entries, math.floor(fraction * entries + 1e-6))


def smallest(
    scores: Tensor, pattern: Pattern, *, per_row: bool, division: Division | None = None
) -> Tensor:
    """Mark the smallest scores that a pattern removes; a structured one removes whole columns.

    Columns are compared by their mean scores.

    Args:
        scores: [rows, cols], finite.
        pattern: the pattern.
        per_row: remove an unstructured pattern's fraction from every row, not from the whole
            matrix.
        division: how the rows of the matrix are divided, if other ranks hold some of them; not for
            a structured pattern.

    Returns:
        bool[rows, cols], True = removed.
    """
    match pattern:
        case Unstructured(sparsity) if per_row:
            return smallest_in_rows(scores, removed_count(sparsity, scores.shape[1]))
        case Unstructured(sparsity):
            rows = len(scores) if division is None else division.rows
            count = removed_count(sparsity, rows * scores.shape[1])
            return smallest_in_matrix(scores, count, division)
        case SemiStructured(kept, group):
            return smallest_in_groups(scores, kept, group)
        case Structured(sparsity):
            count = removed_count(sparsity, scores.shape[1])
            return smallest_columns(scores.mean(dim=0), count).expand_as(scores)


def smallest_in_groups(scores: Tensor, kept: int, group: int) -> Tensor:
    """In each row and each `group` consecutive columns, mark all but the `kept` largest scores.

    Among equal scores, those in lower columns are removed first.

    Args:
        scores: [rows, cols], cols a multiple of `group`.

    Returns:
        bool[rows, cols], True = removed.
    """
    grouped = scores.reshape(scores.shape[0], -1, group)
    if scores.device.type == "cpu" and group <= _COUNTED:
        return (_before_it(grouped) < group - kept).reshape(scores.shape)
    return smallest_in_rows(grouped, group - kept).reshape(scores.shape)


def _before_it(grouped: Tensor) -> Tensor:
    """Rank of each score in its group: the number of smaller scores and of equal ones before it."""
    columns = grouped.unbind(dim=-1)
    before = [torch.zeros_like(one, dtype=torch.uint8) for one in columns]
    for left, right in combinations(range(len(columns)), 2):
        first = columns[left] <= columns[right]
        before[right] += first
        before[left] += ~first
    return torch.stack(before, dim=-1)


def smallest_in_rows(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` smallest scores along the last axis; of equal scores, lower columns first.

    Args:
        scores: [..., cols].

    Returns:
        bool[..., cols], True = removed.
    """
    order = torch.sort(scores, dim=-1, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :count], True)


def smallest_in_matrix(scores: Tensor, count: int, division: Division | None = None) -> Tensor:
    """Mark the `count` smallest scores of the whole matrix.

    Equal scores are marked in column order, then in row order.

    Args:
        scores: [rows, cols], finite.
        count: number of scores to mark in the whole matrix.
        division: see `threshold`.

    Returns:
        bool[rows, cols] with exactly `count` True, over all ranks that hold rows.
    """
    return threshold(scores, count, division).mark(scores)


def cheapest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` smallest scores; of equal scores, the first are taken.

    Args:
        scores: [cols].

    Returns:
        int64[count], ascending.
    """
    return torch.sort(scores, stable=True).indices[:count].sort().values


def smallest_columns(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` columns with the smallest scores; of equal scores, lower columns first.

    Args:
        scores: [cols].

    Returns:
        bool[cols], True = removed.
    """
    return smallest_in_rows(scores, count)
