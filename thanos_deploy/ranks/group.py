"""The ranks that work together, and what they tell each other.

Every function here but `current` is called by all ranks in the same order, as PyTorch's collectives
are. A process by itself is a group of one, for which all of them do nothing.
"""

import json
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from thanos_deploy.bundle.codec import Json


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that work together.

    Attributes:
        rank: its number.
        size: how many there are.
    """

    rank: int
    size: int

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
        dist.all_gather_into_tensor(lengths, torch.tensor([len(own)]))
        padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        padded[: len(own)] = own
        every = torch.empty(self.size * len(padded), dtype=torch.uint8)
        dist.all_gather_into_tensor(every, padded)
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
            dist.broadcast(tensor.view(torch.uint8), source)  # gloo does not know every dtype

    def hand_over(self, tensor: Tensor, source: int, target: int) -> None:
        """Give one rank, in place, what a tensor of another one holds; nothing to the others."""
        if source == target or self.rank not in (source, target):
            return
        if self.rank == source:
            dist.send(tensor.view(torch.uint8), target)
        else:
            dist.recv(tensor.view(torch.uint8), source)

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.gather({})


ALONE = Ranks(0, 1)

_here = [ALONE]


def current() -> Ranks:
    """The ranks that this process works with now."""
    return _here[-1]


def enter(ranks: Ranks) -> None:
    """Work with these from now on."""
    _here.append(ranks)


def leave() -> None:
    """Work with those again that there were before `enter`."""
    _here.pop()
