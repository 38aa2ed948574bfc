"""The rows of a batch and their KV cache: the part that does not depend on the layout of a row."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from runtime.engine import Ids
from runtime.graph import Graph
from runtime.memory import Tensor

# Tokens of each sequence that `read_once` of the engines reads in one run of the graph.
PIECE = 128

# A cache that has become too small is replaced by one with this many times the needed room.
HEADROOM = 1.25


class Rows(ABC):
    """The rows of a batch and their KV cache; when a row leaves, the last row takes its number.

    Attributes:
        lengths: int64[rows], number of tokens of each row.
    """

    lengths: Ids

    def __init__(self, graph: Graph, most: int, *, room: int = 0) -> None:
        """Start without rows.

        Args:
            graph: the graph that reads the tokens.
            most: largest number of rows.
            room: smallest capacity to allocate for a row, in tokens.
        """
        self._least_room = room
        self._graph = graph
        self._memory = graph.memory
        self._most = most
        self._like = graph.empty_cache(1)
        self.clear()

    @abstractmethod
    def clear(self) -> None:
        """Drop all rows, and free their memory."""

    @property
    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """The KV cache: tensors of shape [rows, heads, columns, dim]."""

    @abstractmethod
    def _first(self, row: int) -> int:
        """The column of a row's first token."""

    @abstractmethod
    def _columns(self, row: int) -> range:
        """The columns to copy when a row moves."""

    def copy(self, row: int, tokens: range) -> list[Tensor]:
        """Return a copy of the KV cache of some tokens of a row: each [1, heads, tokens, dim]."""
        first = self._first(row)
        columns = range(first + tokens.start, first + tokens.stop)
        copied = []
        for tensor, new in zip(self.tensors, self._allocate(1, len(tokens)), strict=True):
            shape = (1, tensor.shape[1], len(tokens), tensor.shape[3])
            copied.append(replace(new, shape=shape))
            self._memory.copy(
                copied[-1].lines(range(1), range(len(tokens))),
                tensor.lines(range(row, row + 1), columns),
            )
        return copied

    def remove(self, row: int) -> None:
        """Drop a row; the last row takes its number."""
        last = len(self.lengths) - 1
        if row != last:
            columns = self._columns(last)
            for tensor in self.tensors:
                one, other = (tensor.lines(range(at, at + 1), columns) for at in (row, last))
                self._memory.copy(one, other)
            self.lengths[row] = self.lengths[last]
        self.lengths = self.lengths[:-1]
        if not len(self.lengths):
            self.clear()

    def _allocate(self, rows: int, columns: int) -> Sequence[Tensor]:
        """Allocate memory for the KV cache of rows; its content is undefined."""
        return [
            self._memory.allocate(rows * like.shape[1] * columns * like.shape[3], like.type)
            for like in self._like
        ]
