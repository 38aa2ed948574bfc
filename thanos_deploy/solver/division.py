"""The rows of one layer, divided into runs that may be solved on different ranks.

The result for a run does not depend on the rank that solves it. Matrix products are computed one
run at a time, because the last bit of a product depends on its size. Counts over all rows are
integers, because their sum is the same in every order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows that are checked at a time, so that no temporary is as large as the whole weight.
_ROWS = 64

# All-reduce of a tensor of integers, as a sum over the ranks that hold runs of the layer.
Add = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Division:
    """How the rows of a layer are divided into runs, and which runs this rank holds.

    Attributes:
        rows: number of rows of the whole layer.
        count: number of runs of the whole layer.
        own: maps the number of each run on this rank, ascending, to its rows among this rank's
            rows.
        add: sums integers over the ranks that hold runs. It is a collective, so these ranks must
            call it in the same order. None if this rank holds all runs.
    """

    rows: int
    count: int
    own: dict[int, slice]
    add: Add | None = None

    @classmethod
    def whole(cls, rows: int) -> "Division":
        """The division of a layer in a single run, all of it on this rank."""
        return cls(rows, 1, {0: slice(0, rows)})

    @property
    def runs(self) -> list[slice]:
        """This rank's runs, as slices of this rank's rows."""
        return list(self.own.values())

    def sum(self, counts: Tensor) -> Tensor:
        """Sum integers over all ranks that hold runs.

        Args:
            counts: integers, of the same shape on every rank.
        """
        return counts if self.add is None else self.add(counts)

    def not_finite(self, tensor: Tensor) -> int:
        """Count the NaN and infinite entries over all ranks that hold runs; a collective.

        Args:
            tensor: [rows on this rank, cols].
        """
        # In chunks, because the temporaries of this check are as large as the rows it covers.
        parts = [torch.count_nonzero(~part.isfinite()) for part in torch.split(tensor, _ROWS)]
        return int(self.sum(torch.stack(parts).sum()))

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Compute `left @ right`, one run of rows at a time.

        Args:
            left: [rows on this rank, inner].
            right: [inner, cols].
        """
        if self.runs == [slice(0, len(left))]:
            return left @ right
        result = left.new_empty(len(left), right.shape[1])
        for run in self.runs:
            torch.mm(left[run], right, out=result[run])
        return result

    def pieces(self, most: int) -> Iterator[slice]:
        """Yield this rank's runs in pieces of at most `most` rows."""
        for run in self.runs:
            for start in range(run.start, run.stop, most):
                yield slice(start, min(start + most, run.stop))
