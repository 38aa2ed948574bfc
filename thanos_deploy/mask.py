"""Which weights go, given a score for each: exact counts, and one rule for ties."""

import math

import torch
from torch import Tensor

from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured

# How far a guess of a threshold may be off to be of use, as a fraction.
_NEAR = 0.1


def removed_count(fraction: float, entries: int) -> int:
    """floor(fraction * entries), safe from binary fractions that fall just short of an integer."""
    return min(entries, math.floor(fraction * entries + 1e-6))


def smallest(scores: Tensor, pattern: Pattern, *, per_row: bool) -> Tensor:
    """Mark the smallest scores as a pattern has it; of a structured one, the smallest column means.

    Args:
        scores: [rows, cols], finite.
        pattern: what to remove.
        per_row: an unstructured fraction goes from every row alike, not from the whole matrix.

    Returns:
        bool[rows, cols], True = removed.
    """
    match pattern:
        case Unstructured(sparsity) if per_row:
            return smallest_in_rows(scores, removed_count(sparsity, scores.shape[1]))
        case Unstructured(sparsity):
            return smallest_in_matrix(scores, removed_count(sparsity, scores.numel()))
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
    return smallest_in_rows(grouped, group - kept).reshape(scores.shape)


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


def smallest_in_matrix(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` smallest scores of the whole matrix.

    Equal scores go in column order, then in row order.

    Args:
        scores: [rows, cols], finite.

    Returns:
        bool[rows, cols] with exactly `count` True.
    """
    return up_to(scores, kth_smallest(scores, count), count, columns=scores.shape[1])


def kth_smallest(scores: Tensor, count: int, *, near: Tensor | None = None) -> Tensor:
    """The largest of the `count` smallest scores; what none is below if there are none.

    Args:
        scores: [rows, cols], finite.
        count: from 0 to the number of scores.
        near: a guess. It changes the time that this takes and not the result.
    """
    if count == 0:
        return scores.new_tensor(-math.inf)
    if near is not None:
        low, high = near * (1 - _NEAR), near * (1 + _NEAR)
        below = int(torch.count_nonzero(scores < low))
        between = scores.masked_select((scores >= low) & (scores <= high))
        if below < count <= below + len(between):
            return between.kthvalue(count - below).values
    return scores.flatten().kthvalue(count).values


def up_to(scores: Tensor, threshold: Tensor, count: int, *, columns: int) -> Tensor:
    """Mark the `count` smallest scores of a matrix, and look at its first columns.

    Equal scores go in column order, then in row order.

    Args:
        scores: [rows, cols].
        threshold: the largest of those that go; see `kth_smallest`.
        count: how many go from the whole matrix.
        columns: how many columns to return.

    Returns:
        bool[rows, columns].
    """
    first = scores[:, :columns]
    ties = (first == threshold).T  # transposed, so that counting runs down the columns
    rank = ties.flatten().cumsum(dim=0).reshape(ties.shape)
    left = count - int(torch.count_nonzero(scores < threshold))
    return (first < threshold) | (ties & (rank <= left)).T


def smallest_columns(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` columns with the smallest scores; equal scores go in column order.

    Args:
        scores: [cols].

    Returns:
        bool[cols], True = removed.
    """
    return smallest_in_rows(scores, count)
