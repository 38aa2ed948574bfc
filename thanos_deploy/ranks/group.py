"""The ranks that work together, and what they tell each other.

Every function here but `current` is called by all ranks in the same order, as PyTorch's collectives
are. A process by itself is a group of one, for which all of them do nothing.
"""

import json
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from thanos_deploy.bundle.codec import Json

# So long a rank waits for another one, which may have to solve a wide layer: `watch` sees who has
# ended.
WORK = timedelta(days=7)


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

    def gather(self, value: Json) -> list[Json]:
        """What every rank has to say, in the order of the ranks; JSON-ready values."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        dist.all_gather_into_tensor(lengths, torch.tensor([len(own)]), group=self.channel)
        padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        padded[: len(own)] = own
        every = torch.empty(self.size * len(padded), dtype=torch.uint8)
        dist.all_gather_into_tensor(every, padded, group=self.channel)
        rows = every.reshape(self.size, -1)
        return [
            json.loads(row[:length].numpy().tobytes())
            for row, length in zip(rows, lengths.tolist(), strict=True)
        ]

    def share(self, value: Json) -> Json:
        """What rank 0 has to say."""
        return self.gather(value if self.first else {})[0]

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
        self.gather({})


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
