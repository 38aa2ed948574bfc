"""A kv cache whose tensors keep their place, in the form that transformers' models take.

transformers' own `StaticCache` is not used: it takes the number of heads of every block from one
configuration, cuts the cache of a block with a sliding window by steps that depend on how full it
is, which no recording of one step can replay, and lets a prompt attend to all empty places. Here
every block keeps whole sequences, as wide as the block itself is, windows are a matter of the mask
alone, and a prompt attends to itself.
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
    """What one block keeps of every token.

    Attributes:
        heads: key-value heads.
        key_size, value_size: channels of a head.
        dtype: of both.
    """

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Of one token."""
        return self.heads * (self.key_size + self.value_size) * self.dtype.itemsize


def block_shapes(model: Any) -> tuple[BlockShape, ...]:
    """What the blocks of a causal model of transformers keep, by asking it to read one token.

    No configuration says it of a model whose blocks differ in width.
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
        for layer in cast(list[Any], cache.layers)  # lists of any kind of layer, says its type
    )


def cache_bytes(shapes: Sequence[BlockShape], room: Room) -> int:
    """Memory that a `StaticCache` takes."""
    return room.batch * room.tokens * sum(shape.token_bytes for shape in shapes)


class StaticCache(Cache):
    """Keys and values of all blocks.

    Before the model is called, `read_prompt` or `append` says what the call is.
    """

    def __init__(self, shapes: Sequence[BlockShape], room: Room, index: Tensor) -> None:
        """Allocate it.

        Args:
            shapes: of the blocks.
            room: what it holds.
            index: int64[], where the next token goes; read whenever one is appended.
        """
        self._place = _Place(index)
        self._blocks = [_Block(shape, room, self._place) for shape in shapes]
        super().__init__(layers=[*self._blocks])

    def read_prompt(self) -> None:
        """From now on tokens are put at the beginning and attend to each other alone."""
        self._place.reach = None

    def append(self, reach: int) -> None:
        """From now on one token of every sequence is put at the index.

        Args:
            reach: how many places it attends to, from the first one on.
        """
        self._place.reach = reach

    def copy_from(self, other: "StaticCache") -> None:
        """Take over what a smaller cache of the same model holds."""
        for mine, theirs in zip(self._blocks, other._blocks, strict=True):
            batch, _, tokens, _ = theirs.keys.shape
            mine.keys[:batch, :, :tokens] = theirs.keys
            mine.values[:batch, :, :tokens] = theirs.values


class _Place:
    """What all blocks of a cache have in common.

    Attributes:
        index: int64[], where the next token goes.
        reach: places that it attends to; None while a prompt is read.
    """

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self.reach: int | None = None


class _Block(CacheLayerMixin):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Keys and values of one block: [batch, heads, tokens, channels of a head]."""

    is_compileable = True  # transformers then makes masks without asking the GPU for values
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
        """There is nothing left to do."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Put new keys and values in their places and return those to attend to."""
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
        """How many places are attended to, and the first of them."""
        return self._place.reach or query_length, 0

    def get_seq_length(self) -> Any:
        """Tokens that were there before: int64[] while one is appended."""
        return 0 if self._place.reach is None else self._place.index

    def get_max_length(self) -> int:
        """Places of a sequence."""
        return self._tokens
