"""Slots on ONNX Runtime: the rows of one batch, each as long as it likes.

The graph takes a kv cache of one past for all rows, so shorter rows are padded on the left:

    row 0   . . . a b c d e
    row 1   . . . . . f g h      past = 8, padding common to all = 3
    row 2   . . . . i j k l

and the mask hides the padding. A row that leaves is cut out, prompts that were read beside the
batch are put below it, and then what is padding in all rows goes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.engine import Ids, Logits
from runtime.engines.onnxruntime import Graph


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences side by side.

    Attributes:
        lengths: int64[rows], how many tokens each row has; the rest of the past is padding.
        past: tokens in the cache of every row, with padding.
        cache: of the graph, each [rows, heads, past, dim].
    """

    lengths: Ids
    past: int
    cache: list[Any]


class OnnxRuntimeSlots:
    """See `runtime.batching.SlotEngine`.

    Attributes:
        max_sequence: the most tokens of a row, prompt and answer together.
        vocabulary: how many ids there are.
        slots: the most rows.
    """

    def __init__(self, graph: Graph, *, slots: int) -> None:
        self.max_sequence = graph.max_sequence
        self.vocabulary = graph.vocabulary
        self.slots = slots
        self._graph = graph
        self._rows = self._empty(0)
        self._newcomers = self._empty(0)
        self._unread = np.zeros((0, 0), np.int64)  # left-padded, what is left of the prompts

    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        """See `SlotEngine.join`."""
        self._unread = np.zeros((len(prompts), max(map(len, prompts))), np.int64)
        for row, prompt in enumerate(prompts):
            self._unread[row, -len(prompt) :] = prompt
        self._lengths = np.array([len(prompt) for prompt in prompts])
        self._newcomers = self._empty(len(prompts))

    def read(self, tokens: int) -> Logits | None:
        """See `SlotEngine.read`."""
        columns = max(1, tokens // len(self._unread))
        piece, rest = self._unread[:, :columns], self._unread[:, columns:]
        # What is unread is on the right, so the padding has been read first.
        lengths = np.maximum(self._lengths - rest.shape[1], 0)
        logits, self._newcomers = self._append(self._newcomers, piece, lengths)
        self._unread = rest
        if rest.shape[1]:
            return None
        self._rows = self._merge(self._rows, self._newcomers)
        self._newcomers = self._empty(0)
        return logits

    def decode(self, ids: Ids) -> Logits:
        """See `SlotEngine.decode`."""
        logits, self._rows = self._append(self._rows, ids[:, None], self._rows.lengths + 1)
        return logits

    def leave(self, rows: Sequence[int]) -> None:
        """See `SlotEngine.leave`."""
        staying = np.setdiff1d(
            np.arange(len(self._rows.lengths) + len(self._newcomers.lengths)), rows
        )
        inside = staying[staying < len(self._rows.lengths)]
        beside = staying[staying >= len(self._rows.lengths)] - len(self._rows.lengths)
        self._rows = self._keep(self._rows, inside)
        self._newcomers = self._keep(self._newcomers, beside)
        if len(self._unread):
            self._unread, self._lengths = self._unread[beside], self._lengths[beside]

    def clear(self) -> None:
        """See `SlotEngine.clear`."""
        self._rows = self._newcomers = self._empty(0)
        self._unread = np.zeros((0, 0), np.int64)

    def _empty(self, rows: int) -> Rows:
        return Rows(np.zeros(rows, np.int64), 0, self._graph.empty_cache(rows))

    def _append(self, rows: Rows, ids: Ids, lengths: Ids) -> tuple[Logits, Rows]:
        total = rows.past + ids.shape[1]
        mask = (np.arange(total) >= total - lengths[:, None]).astype(np.int64)
        logits, cache = self._graph.run(ids, mask, rows.cache)
        return logits, Rows(lengths, total, cache)

    def _keep(self, rows: Rows, kept: Ids) -> Rows:
        if len(kept) == len(rows.lengths):
            return rows
        if not len(kept):
            return self._empty(0)
        lengths = rows.lengths[kept]
        past = int(lengths.max())
        return Rows(
            lengths,
            past,
            [
                self._graph.place(np.ascontiguousarray(entry.numpy()[kept, :, rows.past - past :]))
                for entry in rows.cache
            ],
        )

    def _merge(self, rows: Rows, newcomers: Rows) -> Rows:
        if not len(rows.lengths):
            return newcomers
        lengths = np.concatenate([rows.lengths, newcomers.lengths])
        past = int(lengths.max())
        return Rows(
            lengths,
            past,
            [
                self._graph.place(
                    np.concatenate([_fit(above.numpy(), past), _fit(below.numpy(), past)])
                )
                for above, below in zip(rows.cache, newcomers.cache, strict=True)
            ],
        )


def _fit(entry: NDArray[Any], past: int) -> NDArray[Any]:
    """[rows, heads, past, dim] of another past: padding on the left comes or goes."""
    more = past - entry.shape[2]
    return np.pad(entry, ((0, 0), (0, 0), (max(more, 0), 0), (0, 0)))[:, :, max(-more, 0) :]
