"""The ranks that work together, and collective communication between them.

Methods that communicate are called by all ranks in the same order, like PyTorch's collectives. A
process by itself is a group of one rank, for which nothing is sent.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from thanos_deploy.bundle.codec import Json, decode, encode

# Timeout of collectives while ranks work: a rank may solve a wide layer while the others wait. A
# rank that has ended is detected by `watch`, not by this timeout.
WORK = timedelta(days=7)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Here:
    """The message of a rank that has reached a barrier."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """A group of ranks that work together, as one of them sees it.

    Attributes:
        rank: number of this process in the group.
        size: number of ranks in the group.
        process_group: process group for communication; None for PyTorch's default group.
    """

    rank: int
    size: int
    process_group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and prints messages."""
        return self.rank == 0

    def owner_of(self, shard: int) -> int:
        """Return the rank to which a shard of the calibration data belongs."""
        return shard % self.size

    def owns(self, shard: int) -> bool:
        """Whether a shard of the calibration data belongs to this rank."""
        return self.owner_of(shard) == self.rank

    def turns(self, shards: int) -> int:
        """Number of turns for this many shards, if every rank computes one shard in each turn."""
        return -(-shards // self.size)

    def gather(self, message: T) -> list[T]:
        """All-gather a message of each rank; return the messages in the order of the ranks.

        Args:
            message: a frozen dataclass, of the same type on all ranks; see `codec`.
        """
        if self.size == 1:
            return [message]
        return [decode(type(message), one) for one in self._gather(encode(message))]

    def merge(self, said: Mapping[str, T], kind: type[T]) -> dict[str, T]:
        """All-gather the dictionaries of all ranks, whose keys differ, into one.

        Args:
            said: this rank's dictionary: name -> message.
            kind: type of the messages, a frozen dataclass; see `codec`.
        """
        if self.size == 1:
            return dict(said)
        every = self._gather(encode(said))
        return {name: decode(kind, one) for of_rank in every for name, one in of_rank.items()}

    def from_first(self, message: T) -> T:
        """Return rank 0's message; the other ranks pass any message of the same type."""
        return self.gather(message)[0]

    def _gather(self, value: Json) -> list[Json]:
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        all_gather(lengths, torch.tensor([len(own)]), self.process_group)
        padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        padded[: len(own)] = own
        every = torch.empty(self.size * len(padded), dtype=torch.uint8)
        all_gather(every, padded, self.process_group)
        rows = every.reshape(self.size, -1)
        return [
            json.loads(row[:length].numpy().tobytes())
            for row, length in zip(rows, lengths.tolist(), strict=True)
        ]

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Broadcast a tensor from one rank to all ranks, in place.

        Args:
            tensor: of the same shape and dtype on all ranks; contiguous.
            source: the rank that has the values.
        """
        if self.size > 1:
            # As bytes, because gloo does not support every dtype.
            dist.broadcast(tensor.view(torch.uint8), group=self.process_group, group_src=source)

    def send(self, tensor: Tensor, source: int, target: int) -> None:
        """Send a contiguous tensor from one rank to another, in place; other ranks do nothing."""
        if source == target or self.rank not in (source, target):
            return
        if self.rank == source:
            dist.send(tensor.view(torch.uint8), target)
        else:
            dist.recv(tensor.view(torch.uint8), source)

    def all_reduce(self, counts: Tensor) -> Tensor:
        """All-reduce integer counts: return their sum over the ranks, on every rank.

        Args:
            counts: integers, of the same shape on all ranks. On a GPU the host does not wait for
                the result.
        """
        whole = counts.clone()
        dist.all_reduce(whole, group=self.process_group)
        return whole

    def team(self, members: tuple[int, ...]) -> "Ranks | None":
        """Return a group of some of the ranks, or None on a rank that is not one of them.

        All ranks call this, in the same order of teams.

        Args:
            members: numbers of the ranks, rising; at least two.
        """
        if members not in _teams:
            channel = dist.new_group(list(members), timeout=WORK)
            mine = self.rank in members
            _teams[members] = (
                Ranks(members.index(self.rank), len(members), channel) if mine else None
            )
        return _teams[members]

    def with_own_group(self) -> "Ranks":
        """Return the same ranks with a new process group, for use in another thread.

        All ranks call this together.
        """
        if self.size == 1:
            return self
        return Ranks(self.rank, self.size, dist.new_group(timeout=WORK))

    def barrier(self) -> None:
        """Wait at a barrier until all ranks have reached it."""
        self.gather(_Here())


def all_gather(every: Tensor, own: Tensor, channel: dist.ProcessGroup | None = None) -> None:
    """All-gather the tensors of all ranks into one, in the order of the ranks.

    Args:
        every: [ranks * entries], the output.
        own: [entries], this rank's tensor; contiguous.
        channel: see `Ranks`.
    """
    if hasattr(dist, "all_gather_single"):
        dist.all_gather_single(every, own, group=channel)
    else:  # older versions of PyTorch
        dist.all_gather_into_tensor(every, own, group=channel)


ALONE = Ranks(0, 1)

_here = [ALONE]

# The teams that have been made, by the numbers of their members.
_teams: dict[tuple[int, ...], Ranks | None] = {}


def current() -> Ranks:
    """Return the group of ranks that this process works with now."""
    return _here[-1]


def enter(ranks: Ranks) -> None:
    """Make these the current ranks, until `leave`."""
    _here.append(ranks)


def leave() -> None:
    """Restore the ranks that were current before `enter`."""
    _here.pop()
    _teams.clear()
