"""Slots on ONNX Runtime: the rows of one batch, each as long as it likes.

The graph takes a kv cache of one past for all rows, so shorter rows are padded on the left, and the
mask hides the padding:

    row 0   . . . a b c d e
    row 1   . . . . . f g h      past = 8, padding common to all = 3
    row 2   . . . . i j k l

The cache lies in two sets of buffers, which take turns: a step reads the past from one and writes
the present into the other. Every tensor begins where its buffer begins, so the last row can be cut
off, and rows can be put below it, without moving the others. All rows are copied only to make room
for a longer prompt, and to cut common padding off once that has cost as much as the copy will.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.engine import Ids, Logits
from runtime.engines.onnxruntime import Graph

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
        self._most = most
        self._like = graph.empty_cache(1)
        self.clear()

    def clear(self) -> None:
        """Forget everything, and free the memory."""
        self.lengths = np.zeros(0, np.int64)
        self._past = 0
        self._padding_copied = 0  # tokens of common padding, since it was last cut off
        self._present = self._spare = [entry.ravel() for entry in self._like]

    def add(self, rows: int) -> None:
        """Put rows without tokens below the others."""
        old = len(self.lengths)
        self.lengths = np.pad(self.lengths, (0, rows))
        for tensor in self._tensors():
            tensor[old:] = 0  # whatever lay there might be NaN, which no mask hides

    def extend(self, others: "Rows") -> None:
        """Put the rows of others below the own ones."""
        if others._past > self._past:
            self._move(others._past)
        old = len(self.lengths)
        self.add(len(others.lengths))
        self.lengths[old:] = others.lengths
        for tensor, other in zip(self._tensors(), others._tensors(), strict=True):
            tensor[old:, :, self._past - others._past :] = other

    def remove(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        for values in (self.lengths, *self._tensors()):
            values[row] = values[-1]
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
        logits, _ = self._graph.run(
            ids,
            mask,
            [self._graph.place(tensor) for tensor in self._tensors()],
            into=[self._graph.place(tensor) for tensor in self._room(total)],
        )
        self._turn(total)
        self.lengths = lengths
        return logits

    def _move(self, past: int) -> None:
        """Make the past longer or shorter, on its left, where there is only padding."""
        for new, old in zip(self._room(past), self._tensors(), strict=True):
            kept = min(past, self._past)
            new[:, :, : past - kept] = 0
            new[:, :, past - kept :] = old[:, :, self._past - kept :]
        self._turn(past)
        self._padding_copied = 0

    def _tensors(self) -> list[NDArray[Any]]:
        """The cache, each [rows, heads, past, dim]."""
        return self._cut(self._present, self._past)

    def _room(self, past: int) -> list[NDArray[Any]]:
        """The same of another past, to be written before `_turn`."""
        heads, dim = self._like[0].shape[1], self._like[0].shape[3]
        if self._spare[0].size < self._most * heads * past * dim:
            roomy = int(_HEADROOM * past) + 1
            # Only what is written takes memory: the past may be long, or the rows may be many.
            self._spare = [
                np.empty(self._most * like.shape[1] * roomy * like.shape[3], like.dtype)
                for like in self._like
            ]
        return self._cut(self._spare, past)

    def _cut(self, buffers: list[NDArray[Any]], past: int) -> list[NDArray[Any]]:
        cut = []
        for buffer, like in zip(buffers, self._like, strict=True):
            shape = (len(self.lengths), like.shape[1], past, like.shape[3])
            cut.append(buffer[: math.prod(shape)].reshape(shape))
        return cut

    def _turn(self, past: int) -> None:
        self._present, self._spare = self._spare, self._present
        self._past = past


class OnnxRuntimeSlots:
    """See `runtime.batching.SlotEngine`.

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
