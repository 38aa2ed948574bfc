"""The tensors that all steps on one static KV cache read and write."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from runtime.static.cache import BlockShape, StaticCache, cache_bytes
from runtime.static.replay import Recording
from runtime.static.room import Room


class Places:
    """Tensors at fixed addresses, and the recorded steps that use these addresses.

    Attributes:
        room: capacity of the cache; "batch" and "tokens" below are its sizes.
        inputs: int64[batch + 1] on the device: the new token of every sequence, then the index at
            which the cache stores these tokens.
        staged: host copy of `inputs`, in pinned memory if there is a GPU.
        prompt: int64[batch * tokens], token IDs of the prompts, row by row.
        mask: bool[batch, tokens], False for padding.
        gaps: int64[batch, 1], the padding of every sequence: the index of a token in the cache
            minus its position ID.
        logits: float32[batch, vocabulary], the result of the last step.
        cache: keys and values.
        recorded: maps "prefill" or "decode", number of sequences, and tokens of the prompt or
            positions that a new token attends to, to the recorded step.
        pool: memory pool for intermediate results of the recorded steps; None without a GPU.
    """

    def __init__(
        self, shapes: Sequence[BlockShape], room: Room, *, vocabulary: int, device: torch.device
    ) -> None:
        """Allocate the tensors.

        Args:
            shapes: cache shapes of the model's blocks.
            room: capacity of the cache.
            vocabulary: vocabulary size of the model.
            device: device of the model.
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
        """Copy the sequences from places with a smaller room."""
        batch, tokens = other.mask.shape
        self.mask[:batch, :tokens] = other.mask
        self.gaps[:batch] = other.gaps
        self.cache.copy_from(other.cache)


def needed_bytes(shapes: Sequence[BlockShape], room: Room, *, vocabulary: int) -> int:
    """Return the bytes that `Places` take on the device, nearly all of them for the cache."""
    return cache_bytes(shapes, room) + room.batch * (vocabulary * 4 + room.tokens * 9)
