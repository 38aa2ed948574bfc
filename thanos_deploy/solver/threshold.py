"""Select the smallest scores of a matrix whose rows may be divided among ranks."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thanos_deploy.solver.division import Division

# The integer dtype of the same size, in which the bits of a score are read.
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}

# Bits of a score that one histogram covers: 2048 counts fit into the shared memory of a GPU, and
# sending them to other ranks costs next to nothing.
_DIGIT = 11


@dataclass(frozen=True, slots=True, eq=False)
class Threshold:
    """The scores of a matrix to remove: all below a value, and some of those equal to it.

    Attributes:
        value: a scalar tensor on the device of the scores.
        ties: how many of the scores equal to `value` are removed, in column order, then in row
            order; a number, or a scalar tensor on the device of the scores.
        division: how the rows of the matrix are divided.
    """

    value: Tensor
    ties: int | Tensor
    division: Division

    def mark(self, scores: Tensor) -> Tensor:
        """Mark the scores to remove, in the whole matrix or in its first columns.

        Args:
            scores: [rows on this rank, cols].

        Returns:
            bool[rows, cols], True = removed.
        """
        mask, _ = self.mark_and_count(scores)
        return mask

    def mark_and_count(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mask of `mark`, and its count over all ranks as a scalar tensor."""
        below, equal = scores < self.value, scores == self.value
        if self.division.add is None:
            across = equal.T  # so that counting runs down the columns
            rank = across.flatten().cumsum(dim=0).reshape(across.shape)
            mask = below | (across & (rank <= self.ties)).T
            return mask, mask.sum()
        # One row for the ties of each run, and a last row for the scores below the value.
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
    """Find the threshold that removes exactly the `count` smallest scores of a matrix.

    Args:
        scores: [rows, cols], finite and non-negative, without -0.0.
        count: from 0 to the number of scores of the whole matrix. The host never reads a scalar
            tensor on a GPU.
        division: how the rows of the matrix are divided; None if this rank holds all of them.
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
    """The exact `count`-th smallest score, counted from 1; 0.0 for `count` 0.

    On a GPU, the host reads nothing.

    Args:
        scores: float32 or float64, of any shape, finite and non-negative, without -0.0.
        count: a number, or a scalar tensor on the device of the scores.

    Returns:
        a scalar tensor on the device of the scores.
    """
    value, _ = _by_histograms(scores, count, Division.whole(len(scores)))
    return value


def _by_histograms(
    scores: Tensor, count: int | Tensor, division: Division
) -> tuple[Tensor, Tensor]:
    """The `count`-th smallest score over all ranks of the division, and how many are smaller.

    Non-negative floats have the same order as their bits read as integers. So the value is found
    digit by digit from the highest down, 11 bits at a time: a histogram counts the next digit of
    the scores whose leading bits are those of the value, and the ranks that share the rows sum
    their histograms. For float32 that is three histograms, which on a GPU move 52 bytes a score. A
    radix sort with its 64-bit indices moves 96.
    """
    bits, left = scores.view(_BITS[scores.dtype]), 8 * scores.itemsize - 1
    value = torch.zeros((), dtype=bits.dtype, device=bits.device)
    below = torch.zeros((), dtype=torch.int64, device=bits.device)
    while left:
        width = min(_DIGIT, left)
        left -= width
        digits = (bits >> left) - (value << width)  # out of range where the leading bits differ
        found = division.sum(_histogram(digits, 1 << width))
        reached = found.cumsum(dim=0)
        digit = (below + reached < count).sum()
        if bits.device.type == "cpu":  # only here is it free to read how many scores are left
            bits = bits[digits == digit]
        below = below + (reached - found).index_select(0, digit[None]).squeeze(0)
        value = (value << width) + digit.to(value.dtype)
    return value.view(scores.dtype), below


def _histogram(digits: Tensor, count: int) -> Tensor:
    """Count each digit; int64[count]. A GPU ignores entries out of range; a CPU must have none."""
    if digits.device.type == "cpu":
        return torch.from_numpy(np.bincount(digits.numpy().ravel(), minlength=count))
    # One extra bin, because the last bin includes its upper edge.
    return torch.histc(digits, bins=count + 1, min=0, max=count + 1)[:count].to(torch.int64)
