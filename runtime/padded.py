"""Rows of a neutral graph: each has its own length, and all have the same past length.

The graph takes a KV cache whose past is equally long in all rows, so shorter rows are padded on the
left, and the mask hides the padding:

    row 0   . . . a b c d e
    row 1   . . . . . f g h      past = 8, padding common to all = 3
    row 2   . . . . i j k l

The cache lies in two sets of buffers, which take turns: a step reads the past from one set and
writes the present into the other. Every tensor begins where its buffer begins, so the last row can
be cut off, and rows can be added below it, without moving the others. All rows are copied only to
make room for a longer prompt, and to remove padding that is common to all rows, once copying this
padding in every step has cost as much as removing it. The buffers are in the memory of the device
that the graph runs on; see `runtime.memory`.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np

from runtime.engine import Ids, Logits
from runtime.graph import Graph
from runtime.memory import Tensor
from runtime.prefixes import Block, Prefixes, covered
from runtime.rows import HEADROOM, PIECE, Rows, RowsReading


def read_once(graph: Graph, ids: Ids, mask: Ids, given_up: Callable[[], bool]) -> Logits:
    """See `ServingEngine.logits`."""
    cache: Sequence[Tensor] = graph.empty_cache(len(ids))
    # In pieces, because a run makes the logits of all its positions.
    for start in range(0, ids.shape[1], PIECE):
        if given_up():
            raise CancelledError
        end = start + PIECE
        last, cache = graph.run(ids[:, start:end], mask[:, :end], cache)
    return last


class PaddedRows(Rows):
    """Rows of one batch, padded on the left to the same past length."""

    def clear(self) -> None:
        """Drop all rows, and free their memory."""
        self.lengths = np.zeros(0, np.int64)
        self._past = 0
        self._padding_copied = 0  # columns of common padding, since it was last removed
        # Capacity of the two sets of buffers, in tokens of every row.
        self._present_room = self._spare_room = 0
        self._present: Sequence[Tensor] = self._like
        self._spare: Sequence[Tensor] = self._like

    def join(self, prompts: Sequence[Sequence[int]], prefixes: Prefixes) -> "PaddedReading":
        """Start to read the prompts of newcomers; see `SlotEngine.join`."""
        return PaddedReading(self._graph, prompts, prefixes, self)

    def decode(self, ids: Ids) -> Logits:
        """See `SlotEngine.decode`."""
        return self.read(ids[:, None], self.lengths + 1)

    def add(self, rows: int) -> None:
        """Add rows without tokens below the others."""
        old = len(self.lengths)
        assert old + rows <= self._most
        self.lengths = np.pad(self.lengths, (0, rows))
        for tensor in self.tensors:
            # The old content may be NaN, which no mask hides.
            self._memory.zero(tensor.lines(range(old, old + rows), range(self._past)))

    def extend(self, others: "PaddedRows") -> None:
        """Copy the rows of another batch below the rows of this one."""
        if others._past > self._past:
            self._move(others._past)
        old, more = len(self.lengths), len(others.lengths)
        self.add(more)
        self.lengths[old:] = others.lengths
        tokens = range(self._past - others._past, self._past)
        for tensor, other in zip(self.tensors, others.tensors, strict=True):
            self._memory.copy(
                tensor.lines(range(old, old + more), tokens),
                other.lines(range(more), range(others._past)),
            )

    def recall(self, beginnings: Sequence[Sequence[Block]], lengths: Ids) -> None:
        """Copy blocks of the prefix cache into the rows, none of which may have a token yet.

        Args:
            beginnings: the blocks with which the prompt of each row begins.
            lengths: int64[rows], number of tokens that each row takes from its blocks.
        """
        if not lengths.any():
            return
        self._move(int(lengths.max()))
        self.lengths = lengths.copy()
        for row, (blocks, length) in enumerate(zip(beginnings, lengths.tolist(), strict=True)):
            start = 0
            for block in blocks:
                taken = min(length - start, len(block.ids))
                if taken <= 0:
                    break
                place = self._past - length + start
                for tensor, kept in zip(self.tensors, block.cache, strict=True):
                    self._memory.copy(
                        tensor.lines(range(row, row + 1), range(place, place + taken)),
                        kept.lines(range(1), range(taken)),
                    )
                start += taken

    def _first(self, row: int) -> int:
        return self._past - int(self.lengths[row])

    def _columns(self, row: int) -> range:
        return range(self._past)

    def read(self, ids: Ids, lengths: Ids) -> Logits:
        """Append tokens to every row.

        Args:
            ids: int64[rows, tokens], with padding on the left.
            lengths: int64[rows], lengths of the rows after this call.

        Returns:
            float32[rows, vocabulary], the logits after the last token.
        """
        longest = int(self.lengths.max())
        self._padding_copied += self._past - longest
        if self._padding_copied > longest:
            self._move(longest)
        total = self._past + ids.shape[1]
        mask = (np.arange(total) >= total - lengths[:, None]).astype(np.int64)
        logits, _ = self._graph.run(ids, mask, self.tensors, into=self._room(total))
        self._turn(total)
        self.lengths = lengths
        return logits

    def _move(self, past: int) -> None:
        """Lengthen or shorten the past, by adding or removing padding on its left."""
        rows, kept = range(len(self.lengths)), min(past, self._past)
        for new, old in zip(self._room(past), self.tensors, strict=True):
            self._memory.zero(new.lines(rows, range(past - kept)))
            self._memory.copy(
                new.lines(rows, range(past - kept, past)),
                old.lines(rows, range(self._past - kept, self._past)),
            )
        self._turn(past)
        self._padding_copied = 0

    @property
    def tensors(self) -> list[Tensor]:
        """The KV cache: tensors of shape [rows, heads, past, dim]."""
        return self._cut(self._present, self._past)

    def _room(self, past: int) -> list[Tensor]:
        """The spare buffers as a cache of another past, to be written before `_turn`."""
        if self._spare_room < past:
            self._spare_room = max(int(HEADROOM * past) + 1, self._least_room)
            # The buffers may be large: free the old ones before the new ones are allocated.
            self._spare = []
            self._spare = self._allocate(self._most, self._spare_room)
        return self._cut(self._spare, past)

    def _cut(self, buffers: Sequence[Tensor], past: int) -> list[Tensor]:
        rows = len(self.lengths)
        return [
            replace(buffer, shape=(rows, like.shape[1], past, like.shape[3]))
            for buffer, like in zip(buffers, self._like, strict=True)
        ]

    def _turn(self, past: int) -> None:
        self._present, self._spare = self._spare, self._present
        self._present_room, self._spare_room = self._spare_room, self._present_room
        self._past = past


class PaddedReading(RowsReading[PaddedRows]):
    """Prefill of new rows of a `PaddedRows`."""

    def __init__(
        self, graph: Graph, prompts: Sequence[Sequence[int]], prefixes: Prefixes, batch: PaddedRows
    ) -> None:
        """Start with the prefixes of the prompts that are in the prefix cache."""
        self._lengths = np.array(list(map(len, prompts)))
        # The buffers of newcomers hold nothing but their prompts.
        newcomers = PaddedRows(graph, len(prompts), room=int(self._lengths.max()))
        super().__init__(prompts, prefixes, newcomers, batch)
        known = [prefixes.find(prompt) for prompt in prompts]
        columns = max(
            len(prompt) - covered(its) for prompt, its in zip(prompts, known, strict=True)
        )
        # Padding is on the left only, so all rows read the same number of columns, and a row with a
        # longer cached prefix takes only a part of that.
        beginnings = np.maximum(self._lengths - columns, 0)
        self.reused = int(beginnings.sum())
        self._unread = np.zeros((len(prompts), columns), np.int64)
        for row, (prompt, beginning) in enumerate(zip(prompts, beginnings, strict=True)):
            unread = prompt[beginning:]
            self._unread[row, -len(unread) :] = unread
        newcomers.add(len(prompts))
        newcomers.recall(known, beginnings)

    @property
    def left(self) -> int:
        """See `Reading.left`."""
        return self._unread.size

    def _read_piece(self, tokens: int) -> Logits | None:
        columns = max(1, tokens // len(self._unread))
        piece, self._unread = self._unread[:, :columns], self._unread[:, columns:]
        left = self._unread.shape[1]
        logits = self._newcomers.read(piece, np.maximum(self._lengths - left, 0))
        return None if left else logits

    def abandon(self, newcomer: int) -> None:
        """See `Reading.abandon`."""
        super().abandon(newcomer)
        for values in (self._lengths, self._unread):
            values[newcomer] = values[-1]
        self._lengths, self._unread = self._lengths[:-1], self._unread[:-1]
