"""Slots on ONNX Runtime: the rows of one batch, each with its own length.

The graph takes a kv cache of one past for all rows, so shorter rows are padded on the left, and the
mask hides the padding:

    row 0   . . . a b c d e
    row 1   . . . . . f g h      past = 8, padding common to all = 3
    row 2   . . . . i j k l

The cache lies in two sets of buffers, which take turns: a step reads the past from one and writes
the present into the other. Every tensor begins where its buffer begins, so the last row can be cut
off, and rows can be put below it, without moving the others. All rows are copied only to make room
for a longer prompt, and to cut common padding off once that has cost as much as the copy will. The
buffers are in the memory of the device that the graph runs on; see `runtime.memory`.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np

from runtime.engine import Ids, Logits, require_readable
from runtime.graph import Graph
from runtime.memory import Tensor

# Tokens of each sequence that are read at once where nobody says how many.
_PIECE = 128

# Of the past that a buffer is made for, beyond what is needed now.
_HEADROOM = 1.25


class Rows:
    """Sequences side by side, and their kv cache.

    Attributes:
        lengths: int64[rows], the tokens of each row; the rest of the past is padding.
    """

    def __init__(self, graph: Graph, most: int) -> None:
        """Begin without rows.

        Args:
            graph: what reads tokens.
            most: rows that may come.
        """
        self._graph = graph
        self._memory = graph.memory
        self._most = most
        self._like = graph.empty_cache(1)
        self.clear()

    def clear(self) -> None:
        """Forget everything, and free the memory."""
        self.lengths = np.zeros(0, np.int64)
        self._past = 0
        self._padding_copied = 0  # tokens of common padding, since it was last cut off
        # Of the buffers, the tokens that they have room for in every row.
        self._present_room = self._spare_room = 0
        self._present = self._spare = self._like

    def add(self, rows: int) -> None:
        """Put rows without tokens below the others."""
        old = len(self.lengths)
        assert old + rows <= self._most
        self.lengths = np.pad(self.lengths, (0, rows))
        for tensor in self._tensors():
            # Whatever lay there might be NaN, which no mask hides.
            self._memory.zero(tensor.lines(range(old, old + rows), range(self._past)))

    def extend(self, others: "Rows") -> None:
        """Put the rows of others below the own ones."""
        if others._past > self._past:
            self._move(others._past)
        old, more = len(self.lengths), len(others.lengths)
        self.add(more)
        self.lengths[old:] = others.lengths
        tokens = range(self._past - others._past, self._past)
        for tensor, other in zip(self._tensors(), others._tensors(), strict=True):
            self._memory.copy(
                tensor.lines(range(old, old + more), tokens),
                other.lines(range(more), range(others._past)),
            )

    def remove(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        last = len(self.lengths) - 1
        self.lengths[row] = self.lengths[last]
        if row != last:
            for tensor in self._tensors():
                one, other = (
                    tensor.lines(range(place, place + 1), range(self._past))
                    for place in (row, last)
                )
                self._memory.copy(one, other)
        self.lengths = self.lengths[:-1]
        if not len(self.lengths):
            self.clear()

    def read(self, ids: Ids, lengths: Ids) -> Logits:
        """Append tokens to every row.

        Args:
            ids: int64[rows, tokens], with padding on the left.
            lengths: int64[rows], of the rows afterwards.

        Returns:
            float32[rows, vocabulary], what follows.
        """
        longest = int(self.lengths.max())
        self._padding_copied += self._past - longest
        if self._padding_copied > longest:
            self._move(longest)
        total = self._past + ids.shape[1]
        mask = (np.arange(total) >= total - lengths[:, None]).astype(np.int64)
        logits, _ = self._graph.run(ids, mask, self._tensors(), into=self._room(total))
        self._turn(total)
        self.lengths = lengths
        return logits

    def _move(self, past: int) -> None:
        """Make the past longer or shorter, on its left, where there is only padding."""
        rows, kept = range(len(self.lengths)), min(past, self._past)
        for new, old in zip(self._room(past), self._tensors(), strict=True):
            self._memory.zero(new.lines(rows, range(past - kept)))
            self._memory.copy(
                new.lines(rows, range(past - kept, past)),
                old.lines(rows, range(self._past - kept, self._past)),
            )
        self._turn(past)
        self._padding_copied = 0

    def _tensors(self) -> list[Tensor]:
        """The cache, each [rows, heads, past, dim]."""
        return self._cut(self._present, self._past)

    def _room(self, past: int) -> list[Tensor]:
        """The same of another past, to be written before `_turn`."""
        if self._spare_room < past:
            self._spare_room = int(_HEADROOM * past) + 1
            # The past may be long, and the rows may be many: the smaller ones go first.
            self._spare = []
            self._spare = [
                self._memory.allocate(
                    self._most * like.shape[1] * self._spare_room * like.shape[3], like.type
                )
                for like in self._like
            ]
        return self._cut(self._spare, past)

    def _cut(self, buffers: list[Tensor], past: int) -> list[Tensor]:
        rows = len(self.lengths)
        return [
            replace(buffer, shape=(rows, like.shape[1], past, like.shape[3]))
            for buffer, like in zip(buffers, self._like, strict=True)
        ]

    def _turn(self, past: int) -> None:
        self._present, self._spare = self._spare, self._present
        self._present_room, self._spare_room = self._spare_room, self._present_room
        self._past = past


class OnnxRuntimeSlots:
    """See `runtime.engine.ServingEngine`.

    Attributes:
        max_sequence: the most tokens of a row, prompt and answer together.
        vocabulary: how many ids there are.
        slots: the most rows, newcomers included.
    """

    def __init__(self, graph: Graph, *, slots: int) -> None:
        self.max_sequence = graph.max_sequence
        self.vocabulary = graph.vocabulary
        self.slots = slots
        self._graph = graph
        self._rows = Rows(graph, slots)
        self._newcomers = Rows(graph, slots)
        self._prompts = np.zeros(0, np.int64)  # lengths
        self._unread = np.zeros((0, 0), np.int64)  # the right part of the padded prompts

    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        """See `SlotEngine.join`."""
        self._prompts = np.array([len(prompt) for prompt in prompts])
        self._unread = np.zeros((len(prompts), self._prompts.max()), np.int64)
        for row, prompt in enumerate(prompts):
            self._unread[row, -len(prompt) :] = prompt
        self._newcomers.add(len(prompts))

    def read(self, tokens: int) -> Logits | None:
        """See `SlotEngine.read`."""
        columns = max(1, tokens // len(self._unread))
        piece, self._unread = self._unread[:, :columns], self._unread[:, columns:]
        left = self._unread.shape[1]
        logits = self._newcomers.read(piece, np.maximum(self._prompts - left, 0))
        if left:
            return None
        self._rows.extend(self._newcomers)
        self._newcomers.clear()
        return logits

    def decode(self, ids: Ids) -> Logits:
        """See `SlotEngine.decode`."""
        return self._rows.read(ids[:, None], self._rows.lengths + 1)

    def leave(self, row: int) -> None:
        """See `SlotEngine.leave`."""
        self._rows.remove(row)

    def abandon(self, newcomer: int) -> None:
        """See `SlotEngine.abandon`."""
        self._newcomers.remove(newcomer)
        for values in (self._prompts, self._unread):
            values[newcomer] = values[-1]
        self._prompts, self._unread = self._prompts[:-1], self._unread[:-1]

    def clear(self) -> None:
        """See `SlotEngine.clear`."""
        self._rows.clear()
        self._newcomers.clear()

    def logits(
        self, ids: Ids, mask: Ids | None = None, given_up: Callable[[], bool] = lambda: False
    ) -> Logits:
        """See `ServingEngine.logits`."""
        require_readable(ids, self.vocabulary)
        self._graph.require_room(ids.shape[1])
        mask = np.ones_like(ids) if mask is None else mask
        cache: Sequence[Tensor] = self._graph.empty_cache(len(ids))
        # In pieces, because a run gives the logits of all its positions.
        for start in range(0, ids.shape[1], _PIECE):
            if given_up():
                raise CancelledError
            end = start + _PIECE
            last, cache = self._graph.run(ids[:, start:end], mask[:, :end], cache)
        return last
