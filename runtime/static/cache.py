"""A KV cache whose tensors never move, in the form that transformers' models take.

transformers' own `StaticCache` is not used, for three reasons. It takes the number of heads of all
blocks from one configuration. It cuts the cache of a block with a sliding window in a way that
depends on how full the cache is, which a recorded step cannot repeat. And it lets a prompt attend
to all empty positions. Here every block has its own number of heads and stores whole sequences,
sliding windows are applied by the mask alone, and a prompt attends only to itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from runtime.static.room import Room


@dataclass(frozen=True, slots=True)
class BlockShape:
    """The shape of what one block caches for every token.

    Attributes:
        heads: number of key-value heads.
        key_size, value_size: channels of the keys and of the values of one head.
        dtype: dtype of keys and values.
    """

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes in the cache of this block."""
        return self.heads * (self.key_size + self.value_size) * self.dtype.itemsize


def block_shapes(model: Any) -> tuple[BlockShape, ...]:
    """Find the cache shapes of a causal model's blocks, by running the model on one token.

    The configuration does not give them for a model whose blocks differ in width.
    """
    cache = DynamicCache()
    with torch.inference_mode():
        model(
            input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return tuple(
        BlockShape(
            layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], layer.keys.dtype
        )
        for layer in cast(list[Any], cache.layers)  # its annotation allows any kind of layer
    )


def cache_bytes(shapes: Sequence[BlockShape], room: Room) -> int:
    """Return the bytes that a `StaticCache` takes."""
    return room.batch * room.tokens * sum(shape.token_bytes for shape in shapes)


class StaticCache(Cache):
    """Keys and values of all blocks.

    Before each call of the model, `read_prompt` or `append` selects what the call does.
    """

    def __init__(self, shapes: Sequence[BlockShape], room: Room, index: Tensor) -> None:
        """Allocate the cache, filled with zeros.

        Args:
            shapes: cache shapes of the blocks.
            room: capacity of the cache.
            index: int64[] on the device, the index in the cache at which a new token is stored; it
                is read at every appended token.
        """
        self._place = _Place(index)
        self._blocks = [_Block(shape, room, self._place) for shape in shapes]
        super().__init__(layers=[*self._blocks])

    def read_prompt(self) -> None:
        """From now on, store tokens at the beginning, and let them attend only to each other."""
        self._place.reach = None

    def append(self, reach: int) -> None:
        """From now on, store one token of every sequence at the index.

        Args:
            reach: number of positions that the token attends to, from the first one on.
        """
        self._place.reach = reach

    def copy_from(self, other: "StaticCache") -> None:
        """Copy the content of a smaller cache of the same model."""
        for mine, theirs in zip(self._blocks, other._blocks, strict=True):
            batch, _, tokens, _ = theirs.keys.shape
            mine.keys[:batch, :, :tokens] = theirs.keys
            mine.values[:batch, :, :tokens] = theirs.values


class _Place:
    """State that all blocks of a cache share.

    Attributes:
        index: int64[], the index in the cache at which a new token is stored.
        reach: number of positions that the token attends to; None while a prompt is read.
    """

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self.reach: int | None = None


class _Block(CacheLayerMixin):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Keys and values of one block: [batch, heads, tokens, channels of a head]."""

    is_compileable = True  # transformers then makes masks without reading values from the GPU
    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, shape: BlockShape, room: Room, place: _Place) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._place = place
        self._tokens = room.tokens
        self.keys, self.values = (
            torch.zeros(
                (room.batch, shape.heads, room.tokens, size),
                dtype=shape.dtype,
                device=place.index.device,
            )
            for size in (shape.key_size, shape.value_size)
        )
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing, because the tensors are allocated already."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all keys and values that are attended to."""
        batch, _, tokens, _ = key_states.shape
        keys, values = self.keys[:batch], self.values[:batch]
        if self._place.reach is None:
            keys[:, :, :tokens] = key_states
            values[:, :, :tokens] = value_states
            return key_states, value_states
        index = self._place.index[None]
        keys.index_copy_(2, index, key_states)
        values.index_copy_(2, index, value_states)
        return keys[:, :, : self._place.reach], values[:, :, : self._place.reach]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of positions that are attended to, and the first of them."""
        return self._place.reach or query_length, 0

    def get_seq_length(self) -> Any:
        """Return the number of earlier tokens: 0 for a prompt, else the index, int64[]."""
        return 0 if self._place.reach is None else self._place.index

    def get_max_length(self) -> int:
        """Return the most tokens of a sequence."""
        return self._tokens
