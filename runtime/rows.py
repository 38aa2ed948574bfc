"""Sequences side by side and their kv cache: what is the same wherever the tokens of a row lie."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from runtime.engine import Ids
from runtime.graph import Graph
from runtime.memory import Tensor


class Rows(ABC):
    """Rows of a graph, of which any can leave: the last one takes its place.

    Attributes:
        lengths: int64[rows], the tokens of each row.
    """

    lengths: Ids

    def __init__(self, graph: Graph, most: int, *, room: int = 0) -> None:
        """Begin without rows.

        Args:
            graph: what reads tokens.
            most: rows that may come.
            room: tokens of a row that are sure to come.
        """
        self._least_room = room
        self._graph = graph
        self._memory = graph.memory
        self._most = most
        self._like = graph.empty_cache(1)
        self.clear()

    @abstractmethod
    def clear(self) -> None:
        """Forget everything, and free the memory."""

    @property
    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """The cache, each [rows, heads, columns, dim]."""

    @abstractmethod
    def _first(self, row: int) -> int:
        """The column of a row's first token."""

    @abstractmethod
    def _columns(self, row: int) -> range:
        """The columns that go with a row when it moves."""

    def copy(self, row: int, tokens: range) -> list[Tensor]:
        """The cache of some tokens of a row, in memory of its own: each [1, heads, tokens, dim]."""
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
        """Forget a row; the last one takes its place."""
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
        """Memory for the cache of rows, whatever is in it."""
        return [
            self._memory.allocate(rows * like.shape[1] * columns * like.shape[3], like.type)
            for like in self._like
        ]
