"""The prefix cache: KV cache of the beginnings of earlier prompts, so that they are read only once.

Many prompts begin alike: with the same system prompt, the same examples, or the conversation so
far. The KV cache of these tokens does not depend on anything that comes later. It is kept in blocks
of a fixed number of tokens. The key of a block is the block before it and its own tokens, so two
prompts share blocks as far as they are the same. When there is no room for another block, the least
recently used one is dropped.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.memory import Tensor

# Number of tokens of a block.
_TOKENS = 32


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Some tokens of a prompt, and their KV cache.

    Attributes:
        ids: the tokens.
        cache: the KV cache of the tokens: tensors of shape [1, heads, tokens, dim].
    """

    ids: tuple[int, ...]
    cache: Sequence[Tensor]


# The block before (None for the first block of a prompt), and the tokens of the block.
_Key = tuple[Block | None, tuple[int, ...]]


class _Graph(Protocol):
    def empty_cache(self, batch: int) -> list[Tensor]: ...


class Prefixes:
    """The blocks of the prefix cache, within a limit of memory.

    Not thread-safe: the batcher's thread is the only one that uses it.
    """

    def __init__(self, graph: _Graph, most_bytes: int) -> None:
        """Start without blocks.

        Args:
            graph: the graph whose KV cache is kept.
            most_bytes: largest size of all blocks together, in bytes; if it is less than the size
                of a block, nothing is kept.
        """
        size = sum(
            like.shape[1] * _TOKENS * like.shape[3] * like.type.bytes
            for like in graph.empty_cache(1)
        )
        self._most = most_bytes // size
        self._blocks: OrderedDict[_Key, Block] = OrderedDict()  # the most recently used come last

    def find(self, prompt: Sequence[int]) -> list[Block]:
        """Return the blocks with which a prompt begins, and mark them as used.

        They never include the last token of the prompt, which has to be read for its logits.
        """
        found: list[_Key] = []
        before: Block | None = None
        for ids in _cut(prompt[:-1]):
            if (before, ids) not in self._blocks:
                break
            found.append((before, ids))
            before = self._blocks[before, ids]
        self._mark(found)
        return [self._blocks[key] for key in found]

    def keep(self, prompt: Sequence[int], copy: Callable[[range], Sequence[Tensor]]) -> None:
        """Add those blocks of a prompt that are not in the cache yet.

        Args:
            prompt: the ids of the prompt, all of which have been read.
            copy: returns a copy of the KV cache of a range of the prompt's tokens.
        """
        before: Block | None = None
        kept = []
        for place, ids in enumerate(_cut(prompt)[: self._most]):
            key = (before, ids)
            if key in self._blocks:
                self._blocks.move_to_end(key)
            else:
                while len(self._blocks) >= self._most:
                    self._blocks.popitem(last=False)
                tokens = range(place * _TOKENS, (place + 1) * _TOKENS)
                self._blocks[key] = Block(ids, copy(tokens))
            before = self._blocks[key]
            kept.append(key)
        self._mark(kept)

    def _mark(self, keys: Sequence[_Key]) -> None:
        """Mark the blocks of a prompt as used.

        The first block becomes the most recent, because the others are found only through it.
        """
        for key in reversed(keys):
            self._blocks.move_to_end(key)


def covered(blocks: Sequence[Block]) -> int:
    """Return the number of tokens of all blocks together."""
    return sum(len(block.ids) for block in blocks)


def _cut(ids: Sequence[int]) -> list[tuple[int, ...]]:
    """Cut tokens into whole blocks, and leave out the rest."""
    return [
        tuple(ids[start : start + _TOKENS]) for start in range(0, len(ids) - _TOKENS + 1, _TOKENS)
    ]
