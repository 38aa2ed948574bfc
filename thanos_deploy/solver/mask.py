"""Choose the weights to remove from their scores: exact counts, and one rule for ties."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured


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
    return threshold(scores, count).mark(scores)


@dataclass(frozen=True, slots=True, eq=False)
class Threshold:
    """Which scores of a matrix go: those below a value, and some of those that are equal to it.

    Attributes:
        value: a scalar.
        ties: how many of the equal ones go, in column order, then in row order; a number or a
            scalar, on the device of the scores.
    """

    value: Tensor
    ties: int | Tensor

    def mark(self, scores: Tensor) -> Tensor:
        """Mark what goes from the whole matrix, or from its first columns.

        Args:
            scores: [rows, cols].

        Returns:
            bool[rows, cols], True = removed.
        """
        equal = (scores == self.value).T  # transposed, so that counting runs down the columns
        rank = equal.flatten().cumsum(dim=0).reshape(equal.shape)
        return (scores < self.value) | (equal & (rank <= self.ties)).T


def threshold(scores: Tensor, count: int | Tensor) -> Threshold:
    """What parts the `count` smallest scores of a matrix from the others.

    Args:
        scores: [rows, cols], finite and without a sign, not even that of -0.0.
        count: from 0 to the number of scores; as a scalar on the device of the scores it is never
            read by the host.
    """
    if scores.device.type != "cpu":
        value = kth_smallest(scores, count)
        return Threshold(value, count - (scores < value).sum())
    # NumPy's selection takes a tenth of the time of torch's.
    count = int(count)
    if count == 0:
        return Threshold(scores.new_tensor(-math.inf), 0)
    parted = scores.numpy().flatten()
    parted.partition(count - 1)
    value = scores.new_tensor(parted[count - 1])
    below = int(np.count_nonzero(parted[:count] < parted[count - 1]))
    return Threshold(value, count - below)


# Integers of the same size.
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def kth_smallest(scores: Tensor, count: int | Tensor) -> Tensor:
    """The `count`-th smallest score, from 1 on; 0.0 for `count` 0. Exact, and without host reads.

    Numbers without a sign are in the order of their bits read as an integer. So the value is found
    bit by bit from the highest down: a bit is set if fewer than `count` scores lie below what it
    makes of the value. For float32 that is 31 counts, each of which moves 6 bytes a score (4 read,
    the comparison written and read): 186 in all, less than a radix sort with its 64-bit indices
    (four passes that read and write 12), and nothing is kept but one comparison.

    Args:
        scores: float32 or float64, of any shape, finite and without a sign.
        count: a number, or a scalar on the device of the scores.

    Returns:
        a scalar on the device of the scores.
    """
    bits = scores.view(_BITS[scores.dtype])
    value = torch.zeros((), dtype=bits.dtype, device=bits.device)
    for bit in reversed(range(8 * scores.itemsize - 1)):
        higher = value + (1 << bit)
        value = torch.where((bits < higher).sum() < count, higher, value)
    return value.view(scores.dtype)


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
