"""The ranks that work together, and what they tell each other.

Every function here but `current` is called by all ranks in the same order, as PyTorch's collectives
are. A process by itself is a group of one, for which all of them do nothing.
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

# So long a rank waits for another one, which may have to solve a wide layer: `watch` sees who has
# ended.
WORK = timedelta(days=7)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Here:
    """A rank has come this far."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that work together.

    Attributes:
        rank: its number.
        size: how many there are.
        channel: through which they talk; None for the one that everybody has from the beginning.
    """

    rank: int
    size: int
    channel: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """This is the one that writes and speaks."""
        return self.rank == 0

    def has(self, shard: int) -> bool:
        """A shard of the calibration data is this process's."""
        return shard % self.size == self.rank

    def turns(self, shards: int) -> int:
        """How often every rank computes a shard, if they all do so side by side."""
        return -(-shards // self.size)

    def gather(self, message: T) -> list[T]:
        """What every rank has to say, in the order of the ranks.

        Args:
            message: a frozen dataclass, of the same type for all of them; see `codec`.
        """
        if self.size == 1:
            return [message]
        return [decode(type(message), one) for one in self._gather(encode(message))]

    def merge(self, said: Mapping[str, T], kind: type[T]) -> dict[str, T]:
        """What all ranks have to say of different things, by the names of these.

        Args:
            said: by this rank.
            kind: type of what is said of one thing, a frozen dataclass; see `codec`.
        """
        if self.size == 1:
            return dict(said)
        every = self._gather(encode(said))
        return {name: decode(kind, one) for of_rank in every for name, one in of_rank.items()}

    def share(self, message: T) -> T:
        """What rank 0 has to say; nobody reads what the others say, which is of the same type."""
        return self.gather(message)[0]

    def _gather(self, value: Json) -> list[Json]:
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        all_gather(lengths, torch.tensor([len(own)]), self.channel)
        padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        padded[: len(own)] = own
        every = torch.empty(self.size * len(padded), dtype=torch.uint8)
        all_gather(every, padded, self.channel)
        rows = every.reshape(self.size, -1)
        return [
            json.loads(row[:length].numpy().tobytes())
            for row, length in zip(rows, lengths.tolist(), strict=True)
        ]

    def spread(self, tensor: Tensor, source: int) -> None:
        """Give all ranks, in place, what a tensor of one of them holds.

        Args:
            tensor: of the same shape and dtype everywhere; contiguous.
            source: whose.
        """
        if self.size > 1:
            # gloo does not know every dtype
            dist.broadcast(tensor.view(torch.uint8), group=self.channel, group_src=source)

    def hand_over(self, tensor: Tensor, source: int, target: int) -> None:
        """Give one rank, in place, what a tensor of another one holds; nothing to the others."""
        if source == target or self.rank not in (source, target):
            return
        if self.rank == source:
            dist.send(tensor.view(torch.uint8), target)
        else:
            dist.recv(tensor.view(torch.uint8), source)

    def add(self, counts: Tensor) -> Tensor:
        """The sum of what all have counted, for all of them.

        Args:
            counts: integers, of the same shape for all of them; on a GPU the host does not wait.
        """
        whole = counts.clone()
        dist.all_reduce(whole, group=self.channel)
        return whole

    def team(self, members: tuple[int, ...]) -> "Ranks | None":
        """Some of the ranks, to work by themselves; None for a rank that is not one of them.

        All ranks ask for it, in one order.

        Args:
            members: their numbers, rising; at least two.
        """
        if members not in _teams:
            channel = dist.new_group(list(members), timeout=WORK)
            mine = self.rank in members
            _teams[members] = (
                Ranks(members.index(self.rank), len(members), channel) if mine else None
            )
        return _teams[members]

    def beside(self) -> "Ranks":
        """The same ranks, to talk in another thread; all of them ask for it at once."""
        if self.size == 1:
            return self
        return Ranks(self.rank, self.size, dist.new_group(timeout=WORK))

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.gather(_Here())


def all_gather(every: Tensor, own: Tensor, channel: dist.ProcessGroup | None = None) -> None:
    """Gather a tensor of each rank into one of all, in the order of the ranks.

    Args:
        every: [ranks * entries], which is written.
        own: [entries], of this rank; contiguous.
        channel: see `Ranks`.
    """
    if hasattr(dist, "all_gather_single"):
        dist.all_gather_single(every, own, group=channel)
    else:  # as older versions of PyTorch call it
        dist.all_gather_into_tensor(every, own, group=channel)


ALONE = Ranks(0, 1)

_here = [ALONE]

# Those of the ranks that have worked by themselves.
_teams: dict[tuple[int, ...], Ranks | None] = {}


def current() -> Ranks:
    """The ranks that this process works with now."""
    return _here[-1]


def enter(ranks: Ranks) -> None:
    """Work with these from now on."""
    _here.append(ranks)


def leave() -> None:
    """Work with those again that there were before `enter`."""
    _here.pop()
    _teams.clear()
