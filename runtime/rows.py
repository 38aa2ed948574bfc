"""The rows of a batch and their prefill: the part that does not depend on the layout of a row."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Generic, Self, TypeVar

from runtime.engine import Ids, Logits
from runtime.graph import Graph
from runtime.memory import Tensor
from runtime.prefixes import Prefixes

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

    @abstractmethod
    def extend(self, others: Self) -> None:
        """Copy the rows of another batch below the rows of this one."""

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


R = TypeVar("R", bound=Rows)


class RowsReading(ABC, Generic[R]):
    """Prefill of newcomers, which then join a batch; see `runtime.engine.Reading`.

    Attributes:
        reused: see `Reading`.
    """

    reused: int

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        prefixes: Prefixes,
        newcomers: R,
        batch: R | None,
    ) -> None:
        """Start with nothing read.

        Args:
            prompts: the prompts of the newcomers.
            prefixes: the prefix cache, which takes the prompts when they are read.
            newcomers: the rows into which the prompts are read; it has none yet.
            batch: the batch that takes the newcomers when they are read; None for newcomers of
                which only the logits are wanted.
        """
        self._prompts = list(map(tuple, prompts))
        self._prefixes = prefixes
        self._newcomers = newcomers
        self._batch = batch

    @property
    @abstractmethod
    def left(self) -> int:
        """See `Reading.left`."""

    @abstractmethod
    def _read_piece(self, tokens: int) -> Logits | None:
        """Read about `tokens` tokens; return the logits after the prompts if nothing is left."""

    def read(self, tokens: int) -> Logits | None:
        """See `Reading.read`."""
        logits = self._read_piece(tokens)
        if logits is not None:
            for row, prompt in enumerate(self._prompts):
                self._prefixes.keep(prompt, partial(self._newcomers.copy, row))
            if self._batch is not None:
                self._batch.extend(self._newcomers)
        return logits

    def abandon(self, newcomer: int) -> None:
        """See `Reading.abandon`."""
        self._newcomers.remove(newcomer)
        self._prompts[newcomer] = self._prompts[-1]
        self._prompts.pop()
