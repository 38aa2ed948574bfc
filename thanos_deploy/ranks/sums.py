"""Sums whose last bit does not depend on the number of ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from thanos_deploy.ranks.group import Ranks, all_gather

# Entries of which a run is a multiple, so that none ends within what is computed at once, where the
# last bit could depend on it.
_TOGETHER = 64


def run_of(ranks: Ranks, tensor: Tensor) -> Tensor:
    """This rank's run of the entries of a tensor that every rank has; a view or a copy.

    Args:
        ranks: those that have runs, in their order.
        tensor: of any shape.
    """
    return _padded(ranks, tensor).reshape(ranks.size, -1)[ranks.rank]


def whole_of(ranks: Ranks, run: Tensor, shape: torch.Size) -> Tensor:
    """The tensor whose runs the ranks have, on all of them.

    Args:
        ranks: see `run_of`.
        run: that of this rank.
        shape: of the tensor.
    """
    flat = run
    if ranks.size > 1:
        flat = run.new_empty(len(run) * ranks.size)
        all_gather(flat, run.contiguous())
    return flat[: shape.numel()].reshape(shape)


def _padded(ranks: Ranks, tensor: Tensor) -> Tensor:
    """Its entries, and zeros, so that they make runs."""
    flat = tensor.reshape(-1)
    missing = -len(flat) % (_TOGETHER * ranks.size)
    return torch.cat([flat, flat.new_zeros(missing)]) if missing else flat


class OrderedSum:
    """The sum of numbered parts, each computed by one rank, added in the order of their numbers.

    The ranks compute parts side by side; part k is that of rank (first + k) modulo their number.
    After each turn every rank gets, of the parts of all ranks, one run of entries, and adds it up;
    at the end the runs are put together. So beside its own part a rank holds a part once more while
    it is exchanged, and its run of the sum; and each part is sent once, whatever the number of
    ranks. Sums are in float32; parts are sent as they are, bfloat16 in half as many bytes.

    Attributes:
        count: of the parts.
    """

    def __init__(self, ranks: Ranks, count: int, first: int = 0) -> None:
        """Begin with no part.

        Args:
            ranks: those that add.
            count: parts, at least one.
            first: whose part 0 is.
        """
        self._ranks, self.count, self._first = ranks, count, first
        self._done = 0
        self._shapes: list[torch.Size] = []
        self._sums: list[Tensor] = []

    def mine(self, turn: int) -> int | None:
        """Number of the part that this rank computes in a turn; None if there is none for it."""
        ranks = self._ranks
        number = turn * ranks.size + (ranks.rank - self._first) % ranks.size
        return number if number < self.count else None

    @property
    def turns(self) -> int:
        """How many there are."""
        return self._ranks.turns(self.count)

    def add(self, part: Sequence[Tensor]) -> None:
        """Add this rank's part of the next turn.

        Args:
            part: contiguous, and not to be changed afterwards. From a rank that has no part in this
                turn, anything of the same shapes.
        """
        alone = self._ranks.size == 1
        present = range(self._done, min(self._done + self._ranks.size, self.count))
        self._done += self._ranks.size
        if not self._shapes:
            self._shapes = [tensor.shape for tensor in part]
        for place, tensor in enumerate(part):
            rows = [_padded(self._ranks, tensor)] if alone else self._exchanged(tensor)
            for number in present:
                row = rows[(self._first + number) % self._ranks.size]
                if number == 0:  # of what was received more than this is not wanted
                    self._sums.append(row.to(torch.float32, copy=not alone))
                else:
                    self._sums[place] += row

    def finish(self) -> list[Tensor]:
        """The sum, on every rank."""
        return [
            whole_of(self._ranks, run, shape)
            for run, shape in zip(self.runs(), self._shapes, strict=True)
        ]

    def runs(self) -> list[Tensor]:
        """This rank's run of each tensor of the sum; see `run_of`."""
        assert self._done >= self.count
        return self._sums

    def _exchanged(self, tensor: Tensor) -> Sequence[Tensor]:
        """This rank's run of every rank's tensor."""
        size = self._ranks.size
        flat = _padded(self._ranks, tensor)
        received = torch.empty_like(flat)
        dist.all_to_all_single(received, flat)
        return received.reshape(size, -1).unbind()
