"""Beginnings of prompts that were read before, so that they are not read again.

Many prompts begin alike: with the same system prompt, the same examples, or the conversation so
far. What the kv cache holds of the tokens there depends on nothing that comes later. It is kept in
blocks of as many tokens each; a block is known by the block before it and its own tokens, so that
two beginnings share blocks as far as they are the same. When there is no room for another block,
the one goes that was not used for the longest time.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.memory import Tensor

# Of a block.
_TOKENS = 32


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Some tokens after a beginning.

    Attributes:
        ids: the tokens.
        cache: what the kv cache holds of them, each [1, heads, tokens, dim].
    """

    ids: tuple[int, ...]
    cache: Sequence[Tensor]


# The block before, None for the first of a prompt, and the own tokens.
_Key = tuple[Block | None, tuple[int, ...]]


class _Graph(Protocol):
    def empty_cache(self, batch: int) -> list[Tensor]: ...


class Prefixes:
    """Blocks of beginnings, within a limit of memory.

    For the batcher's thread alone.
    """

    def __init__(self, graph: _Graph, most_bytes: int) -> None:
        """Begin with none.

        Args:
            graph: whose cache is kept.
            most_bytes: of all blocks; less than one block takes keeps none.
        """
        size = sum(
            like.shape[1] * _TOKENS * like.shape[3] * like.type.bytes
            for like in graph.empty_cache(1)
        )
        self._most = most_bytes // size
        self._blocks: OrderedDict[_Key, Block] = OrderedDict()  # the latest used come last

    def find(self, prompt: Sequence[int]) -> list[Block]:
        """The blocks with which a prompt begins; at least its last token is in none of them."""
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
        """Keep what is new in a prompt that was read.

        Args:
            prompt: its ids.
            copy: gives the cache of some of its tokens, in memory of its own.
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
        """They are used now; the first most of all, without which the others are not found."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)


def covered(blocks: Sequence[Block]) -> int:
    """How many tokens they have, all together."""
    return sum(len(block.ids) for block in blocks)


def _cut(ids: Sequence[int]) -> list[tuple[int, ...]]:
    """The whole blocks of some tokens."""
    return [
        tuple(ids[start : start + _TOKENS]) for start in range(0, len(ids) - _TOKENS + 1, _TOKENS)
    ]
