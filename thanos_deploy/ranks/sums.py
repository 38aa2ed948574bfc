"""Sums whose last bit does not depend on the number of ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from thanos_deploy.ranks.group import Ranks, all_gather

# The length of a run is a multiple of this many entries, so that no run ends inside a vector of
# entries that are computed together, where the last bit could depend on it.
_TOGETHER = 64


def run_of(ranks: Ranks, tensor: Tensor) -> Tensor:
    """Return this rank's run of a tensor's entries: one of `ranks.size` equal, contiguous pieces.

    Args:
        ranks: the ranks that have the runs, in their order.
        tensor: the whole tensor, of any shape, the same on every rank.

    Returns:
        [entries], padded with zeros at the end of the tensor; a view or a copy.
    """
    return _padded(ranks, tensor).reshape(ranks.size, -1)[ranks.rank]


def whole_of(ranks: Ranks, run: Tensor, shape: torch.Size) -> Tensor:
    """All-gather a tensor from the runs of all ranks.

    Args:
        ranks: see `run_of`.
        run: this rank's run.
        shape: shape of the whole tensor.
    """
    flat = run
    if ranks.size > 1:
        flat = run.new_empty(len(run) * ranks.size)
        all_gather(flat, run.contiguous())
    return flat[: shape.numel()].reshape(shape)


def _padded(ranks: Ranks, tensor: Tensor) -> Tensor:
    """Return the entries, padded with zeros to a whole number of runs."""
    flat = tensor.reshape(-1)
    missing = -len(flat) % (_TOGETHER * ranks.size)
    return torch.cat([flat, flat.new_zeros(missing)]) if missing else flat


class OrderedSum:
    """The sum of numbered parts, each computed by one rank, added in the order of their numbers.

    The ranks compute parts in turns, in parallel; part k belongs to rank (first + k) modulo the
    number of ranks. After each turn an all-to-all exchange gives every rank one run of entries of
    all parts of the turn, which it adds to its run of the sum. At the end the runs are gathered.

    So a rank holds its own part, a second buffer of the same size during the exchange, and its run
    of the sum. Each part is sent once, whatever the number of ranks. Sums are in float32; parts are
    sent in their own dtype, so that bfloat16 takes half as many bytes.

    Attributes:
        count: number of parts.
    """

    def __init__(self, ranks: Ranks, count: int, first: int = 0) -> None:
        """Begin with no part.

        Args:
            ranks: the ranks that compute the parts.
            count: number of parts, at least one.
            first: the rank that computes part 0.
        """
        self._ranks, self.count, self._first = ranks, count, first
        self._done = 0
        self._shapes: list[torch.Size] = []
        self._sums: list[Tensor] = []

    def mine(self, turn: int) -> int | None:
        """Return the number of this rank's part in a turn; None if it has none."""
        ranks = self._ranks
        number = turn * ranks.size + (ranks.rank - self._first) % ranks.size
        return number if number < self.count else None

    @property
    def turns(self) -> int:
        """Number of turns."""
        return self._ranks.turns(self.count)

    def add(self, part: Sequence[Tensor]) -> None:
        """Add this rank's part of the next turn; called by all ranks.

        Args:
            part: the tensors of the part; contiguous, and not to be changed afterwards. A rank that
                has no part in this turn passes any tensors of the same shapes.
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
                if number == 0:  # copied, so that the rest of the received buffer can be freed
                    self._sums.append(row.to(torch.float32, copy=not alone))
                else:
                    self._sums[place] += row

    def finish(self) -> list[Tensor]:
        """Return the tensors of the sum, on every rank."""
        return [
            whole_of(self._ranks, run, shape)
            for run, shape in zip(self.runs(), self._shapes, strict=True)
        ]

    def runs(self) -> list[Tensor]:
        """Return this rank's run of each tensor of the sum; see `run_of`."""
        assert self._done >= self.count
        return self._sums

    def _exchanged(self, tensor: Tensor) -> Sequence[Tensor]:
        """Exchange runs all-to-all; return this rank's run of every rank's tensor."""
        size = self._ranks.size
        flat = _padded(self._ranks, tensor)
        received = torch.empty_like(flat)
        dist.all_to_all_single(received, flat)
        return received.reshape(size, -1).unbind()
