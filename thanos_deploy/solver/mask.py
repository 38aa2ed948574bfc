"""Choose the weights to remove from their scores: exact counts, and one rule for ties."""

import math
from itertools import combinations

import torch
from torch import Tensor

from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured
from thanos_deploy.solver.division import Division
from thanos_deploy.solver.threshold import threshold

# A processor compares all scores of so small a group with each other in less time than it sorts
# them; a GPU has the sort in fewer launches.
_COUNTED = 8


def removed_count(fraction: float, entries: int) -> int:
    """floor(fraction * entries), safe from binary fractions that fall just short of an integer."""
    return min(entries, math.floor(fraction * entries + 1e-6))


def smallest(
    scores: Tensor, pattern: Pattern, *, per_row: bool, division: Division | None = None
) -> Tensor:
    """Mark the smallest scores as a pattern has it; of a structured one, the smallest column means.

    Args:
        scores: [rows, cols], finite.
        pattern: what to remove.
        per_row: an unstructured fraction goes from every row alike, not from the whole matrix.
        division: how the rows of the matrix are divided, where some are elsewhere; not for a
            structured pattern.

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

    Equal scores go in column order, the lower column first.

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
    """How many scores of a group go before each: smaller ones, and equal ones of lower columns."""
    columns = grouped.unbind(dim=-1)
    before = [torch.zeros_like(one, dtype=torch.uint8) for one in columns]
    for left, right in combinations(range(len(columns)), 2):
        first = columns[left] <= columns[right]
        before[right] += first
        before[left] += ~first
    return torch.stack(before, dim=-1)


def smallest_in_rows(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` smallest scores along the last axis; equal scores go in column order.

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

    Equal scores go in column order, then in row order.

    Args:
        scores: [rows, cols], finite.
        count: of the whole matrix.
        division: see `threshold`.

    Returns:
        bool[rows, cols] with exactly `count` True.
    """
    return threshold(scores, count, division).mark(scores)


def cheapest(scores: Tensor, count: int) -> Tensor:
    """Where the `count` smallest scores are; of equal ones, the first go.

    Args:
        scores: [cols].

    Returns:
        int64[count], rising.
    """
    return torch.sort(scores, stable=True).indices[:count].sort().values


def smallest_columns(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` columns with the smallest scores; equal scores go in column order.

    Args:
        scores: [cols].

    Returns:
        bool[cols], True = removed.
    """
    return smallest_in_rows(scores, count)
