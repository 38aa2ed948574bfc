"""The rows of one layer in runs, some of which are solved here and the others elsewhere.

What becomes of a run does not depend on who has it. Products are made of one run at a time, because
the last bit of a product depends on its size. What is counted over all rows is counted in integers,
whose sum is the same in every order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows to look at together where a copy of all would take memory for nothing.
_ROWS = 64

# The sum of a tensor of integers over all who have runs of a layer, for all of them.
Add = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Division:
    """How the rows of a layer are divided.

    Attributes:
        rows: of the whole layer.
        count: of all runs.
        own: number of each run that is here, rising -> its rows among those that are here.
        add: asks all who have runs, in the order in which all of them ask; None if all runs are
            here.
    """

    rows: int
    count: int
    own: dict[int, slice]
    add: Add | None = None

    @classmethod
    def whole(cls, rows: int) -> "Division":
        """That of a layer in one run, which is here."""
        return cls(rows, 1, {0: slice(0, rows)})

    @property
    def runs(self) -> list[slice]:
        """The runs that are here, as rows among those that are here."""
        return list(self.own.values())

    def sum(self, counts: Tensor) -> Tensor:
        """The sum of integers over all who have runs.

        Args:
            counts: integers, of the same shape for all.
        """
        return counts if self.add is None else self.add(counts)

    def not_finite(self, tensor: Tensor) -> int:
        """How many entries of all rows are NaN or infinite, which all who have runs ask alike.

        Args:
            tensor: [rows that are here, cols].
        """
        # Some at a time: what torch needs beside them to look takes as much memory as they do.
        parts = [torch.count_nonzero(~part.isfinite()) for part in torch.split(tensor, _ROWS)]
        return int(self.sum(torch.stack(parts).sum()))

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Left @ right, one run of rows at a time.

        Args:
            left: [rows that are here, inner].
            right: [inner, cols].
        """
        if self.runs == [slice(0, len(left))]:
            return left @ right
        result = left.new_empty(len(left), right.shape[1])
        for run in self.runs:
            torch.mm(left[run], right, out=result[run])
        return result

    def pieces(self, most: int) -> Iterator[slice]:
        """The runs that are here, in pieces of no more than so many rows."""
        for run in self.runs:
            for start in range(run.start, run.stop, most):
                yield slice(start, min(start + most, run.stop))
