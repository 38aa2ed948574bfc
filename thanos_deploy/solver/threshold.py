"""The value that parts the smallest scores of a matrix from the others, whoever has its rows."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thanos_deploy.solver.division import Division

# Integers of the same size.
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}

# Bits of a score that one histogram looks at: 2048 counts are few enough to be kept beside each
# core of a GPU, and to be sent for nothing.
_DIGIT = 11


@dataclass(frozen=True, slots=True, eq=False)
class Threshold:
    """Which scores of a matrix go: those below a value, and some of those that are equal to it.

    Attributes:
        value: a scalar.
        ties: how many of the equal ones go, in column order, then in row order; a number or a
            scalar, on the device of the scores.
        division: how the rows of the matrix are divided.
    """

    value: Tensor
    ties: int | Tensor
    division: Division

    def mark(self, scores: Tensor) -> Tensor:
        """Mark what goes from the whole matrix, or from its first columns.

        Args:
            scores: [rows, cols], those that are here.

        Returns:
            bool[rows, cols], True = removed.
        """
        mask, _ = self.mark_and_count(scores)
        return mask

    def mark_and_count(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and how many go from these columns of the whole matrix, a scalar."""
        below, equal = scores < self.value, scores == self.value
        if self.division.add is None:
            across = equal.T  # so that counting runs down the columns
            rank = across.flatten().cumsum(dim=0).reshape(across.shape)
            mask = below | (across & (rank <= self.ties)).T
            return mask, mask.sum()
        # [runs, cols], and one row more for what goes anyhow.
        counts = below.new_zeros(self.division.count + 1, scores.shape[1], dtype=torch.int64)
        for number, run in self.division.own.items():
            counts[number] = equal[run].sum(dim=0)
        counts[-1] = below.sum(dim=0)
        counts = self.division.sum(counts)
        in_column = counts[:-1].sum(dim=0)
        before = in_column.cumsum(dim=0) - in_column + counts[:-1].cumsum(dim=0) - counts[:-1]
        mask = below
        for number, run in self.division.own.items():
            rank = equal[run].cumsum(dim=0) + before[number]
            mask[run] |= equal[run] & (rank <= self.ties)
        return mask, counts[-1].sum() + in_column.sum().clamp(max=self.ties)


def threshold(scores: Tensor, count: int | Tensor, division: Division | None = None) -> Threshold:
    """What parts the `count` smallest scores of a matrix from the others.

    Args:
        scores: [rows, cols], finite and without a sign, not even that of -0.0.
        count: from 0 to the number of scores of the whole matrix; as a scalar on the device of the
            scores it is never read by the host.
        division: how the rows of the matrix are divided; None if all are here.
    """
    division = Division.whole(len(scores)) if division is None else division
    if scores.device.type != "cpu" or division.add is not None:
        value, below = _by_histograms(scores, count, division)
        return Threshold(value, count - below, division)
    # NumPy's selection takes a tenth of the time of torch's.
    count = int(count)
    if count == 0:
        return Threshold(scores.new_tensor(-math.inf), 0, division)
    parted = scores.numpy().flatten()
    parted.partition(count - 1)
    value = scores.new_tensor(parted[count - 1])
    smaller = int(np.count_nonzero(parted[:count] < parted[count - 1]))
    return Threshold(value, count - smaller, division)


def kth_smallest(scores: Tensor, count: int | Tensor) -> Tensor:
    """The `count`-th smallest score, from 1 on; 0.0 for `count` 0. Exact, and without host reads.

    Args:
        scores: float32 or float64, of any shape, finite and without a sign.
        count: a number, or a scalar on the device of the scores.

    Returns:
        a scalar on the device of the scores.
    """
    value, _ = _by_histograms(scores, count, Division.whole(len(scores)))
    return value


def _by_histograms(
    scores: Tensor, count: int | Tensor, division: Division
) -> tuple[Tensor, Tensor]:
    """The `count`-th smallest score of all that the division has, and how many are smaller.

    Numbers without a sign are in the order of their bits read as an integer. So the value is found
    digit by digit from the highest down, 11 bits at a time: of the scores that begin as the value
    does, a histogram of the next digit is counted, and those who share the rows add theirs up. For
    float32 that is three histograms, which on a GPU move 52 bytes a score. A radix sort with its
    64-bit indices moves 96.
    """
    bits, left = scores.view(_BITS[scores.dtype]), 8 * scores.itemsize - 1
    value = torch.zeros((), dtype=bits.dtype, device=bits.device)
    below = torch.zeros((), dtype=torch.int64, device=bits.device)
    while left:
        width = min(_DIGIT, left)
        left -= width
        digits = (bits >> left) - (value << width)  # of another beginning, what is no digit
        found = division.sum(_histogram(digits, 1 << width))
        reached = found.cumsum(dim=0)
        digit = (below + reached < count).sum()
        if bits.device.type == "cpu":  # which may know how many scores are left
            bits = bits[digits == digit]
        below = below + (reached - found).index_select(0, digit[None]).squeeze(0)
        value = (value << width) + digit.to(value.dtype)
    return value.view(scores.dtype), below


def _histogram(digits: Tensor, count: int) -> Tensor:
    """How often each digit occurs; int64[count]. On a processor there is nothing but digits."""
    if digits.device.type == "cpu":
        return torch.from_numpy(np.bincount(digits.numpy().ravel(), minlength=count))
    # One bin more, as the last one takes its upper edge in.
    return torch.histc(digits, bins=count + 1, min=0, max=count + 1)[:count].to(torch.int64)
