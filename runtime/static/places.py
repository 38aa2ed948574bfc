"""Where everything is that the steps of one room read and write."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from runtime.static.cache import BlockShape, StaticCache, cache_bytes
from runtime.static.replay import Recording
from runtime.static.room import Room


class Places:
    """Tensors that stay where they are, and the recordings that know where that is.

    Attributes:
        room: what they are made for.
        inputs: int64[batch + 1] on the device: the new token of every sequence, then the index of
            their place in the cache.
        staged: the same on the host, where the GPU can fetch it by itself.
        prompt: int64[batch * tokens], ids of a prompt, row by row.
        mask: bool[batch, tokens], False for padding.
        gaps: int64[batch, 1], how much smaller than its index the position of a token is.
        logits: float32[batch, vocabulary], what the last step found.
        cache: keys and values.
        recorded: steps by what they are for.
        pool: the memory of their intermediate results; None without a GPU.
    """

    def __init__(
        self, shapes: Sequence[BlockShape], room: Room, *, vocabulary: int, device: torch.device
    ) -> None:
        """Allocate them.

        Args:
            shapes: of the model's blocks.
            room: what to make them for.
            vocabulary: of the model.
            device: where it is.
        """
        on_gpu = device.type == "cuda" and torch.cuda.is_available()
        zeros = partial(torch.zeros, device=device)
        self.room = room
        self.inputs = zeros(room.batch + 1, dtype=torch.int64)
        self.staged = torch.zeros(room.batch + 1, dtype=torch.int64, pin_memory=on_gpu)
        self.prompt = zeros(room.batch * room.tokens, dtype=torch.int64)
        self.mask = zeros(room.batch, room.tokens, dtype=torch.bool)
        self.gaps = zeros(room.batch, 1, dtype=torch.int64)
        self.logits = zeros(room.batch, vocabulary, dtype=torch.float32)
        self.cache = StaticCache(shapes, room, self.inputs[-1])
        self.recorded: dict[tuple[str, int, int], Recording] = {}
        self.pool: Any = torch.cuda.graph_pool_handle() if on_gpu else None

    def copy_from(self, other: "Places") -> None:
        """Take over the sequences of a smaller room."""
        batch, tokens = other.mask.shape
        self.mask[:batch, :tokens] = other.mask
        self.gaps[:batch] = other.gaps
        self.cache.copy_from(other.cache)


def needed_bytes(shapes: Sequence[BlockShape], room: Room, *, vocabulary: int) -> int:
    """Memory that `Places` take: the cache, and little else."""
    return cache_bytes(shapes, room) + room.batch * (vocabulary * 4 + room.tokens * 9)
