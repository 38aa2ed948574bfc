"""Rows of a graph with ONNX Runtime's own attention, which writes the KV cache in place.

The cache has one buffer for each tensor, [rows, heads, room, dim]. Every row begins at the left end
and has a length of its own:

    row 0   a b c d e . . . . .
    row 1   f g h . . . . . . .      room = 10
    row 2   i j k l . . . . . .

Each buffer is both the past and the present of a step. The step writes the new token of each row
behind the last one; it writes nothing else of the cache, and copies nothing. A row is copied only
when its prompt has been read, when it takes the number of a row that has left, and when the room
becomes too small. Content beyond a row's length is never read.

ONNX Runtime's attention can read several prompts together only from their beginnings. The rest of a
prompt, after a cached prefix or after its first piece, is read one row at a time.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from runtime.engine import Ids, Logits
from runtime.graph import Binding, Graph
from runtime.memory import Tensor
from runtime.prefixes import Block, Prefixes, covered
from runtime.rows import HEADROOM, PIECE, Rows, RowsReading


def read_once(graph: Graph, ids: Ids, mask: Ids, given_up: Callable[[], bool]) -> Logits:
    """See `ServingEngine.logits`."""
    prompts = [row[real == 1].tolist() for row, real in zip(ids, mask, strict=True)]
    reading = InPlaceReading(graph, prompts, Prefixes(graph, 0), None)
    while (logits := reading.read(PIECE * len(prompts))) is None:
        if given_up():
            raise CancelledError
    return logits


class InPlaceRows(Rows):
    """Rows of one batch, each at the left end of the buffers."""

    def clear(self) -> None:
        """Drop all rows, and free their memory."""
        self.lengths = np.zeros(0, np.int64)
        self._room = 0
        self._buffers: Sequence[Tensor] = self._like
        self._bound: dict[range, Binding] = {}

    def join(self, prompts: Sequence[Sequence[int]], prefixes: Prefixes) -> "InPlaceReading":
        """Start to read the prompts of newcomers; see `SlotEngine.join`."""
        return InPlaceReading(self._graph, prompts, prefixes, self)

    def decode(self, ids: Ids) -> Logits:
        """See `SlotEngine.decode`."""
        return self.read(range(len(ids)), ids[:, None], np.ones_like(ids))

    def read(self, rows: range, ids: Ids, counts: Ids) -> Logits:
        """Append tokens to some rows.

        Args:
            rows: the numbers of the rows. If more than one token is appended to a row, this must be
                a single row, or rows that have no tokens yet.
            ids: int64[rows, tokens], with padding on the right.
            counts: int64[rows], number of tokens of each row that are not padding.

        Returns:
            float32[rows, vocabulary], the logits after the last token.
        """
        before = self.lengths[rows.start : rows.stop]
        after = before + counts
        self._make_room(int(after.max()))
        if rows not in self._bound:
            # The number of rows changes only now and then, so a binding serves many steps.
            self._bound[rows] = self._graph.bind(self._tensors(rows))
        logits = self._graph.append(self._bound[rows], ids, before, after)
        self.lengths[rows.start : rows.stop] = after
        return logits

    def add(self, lengths: Ids) -> None:
        """Add rows below the others, with these lengths; the caller writes their cache."""
        assert len(self.lengths) + len(lengths) <= self._most
        self._make_room(int(lengths.max()))
        self.lengths = np.concatenate([self.lengths, lengths])

    def extend(self, others: "InPlaceRows") -> None:
        """Copy the rows of another batch below the rows of this one."""
        old, more = len(self.lengths), len(others.lengths)
        self.add(others.lengths)
        tokens = range(int(others.lengths.max()))
        for tensor, other in zip(
            self._tensors(range(old, old + more)), others.tensors, strict=True
        ):
            self._memory.copy(tensor.lines(range(more), tokens), other.lines(range(more), tokens))

    @property
    def tensors(self) -> list[Tensor]:
        """The KV cache: tensors of shape [rows, heads, room, dim]."""
        return self._tensors(range(len(self.lengths)))

    def recall(self, row: int, blocks: Sequence[Block]) -> None:
        """Copy blocks of the prefix cache into a row that has no tokens yet."""
        self._make_room(covered(blocks))
        for block in blocks:
            start = int(self.lengths[row])
            self.lengths[row] += len(block.ids)
            for tensor, kept in zip(self._tensors(range(row, row + 1)), block.cache, strict=True):
                self._memory.copy(
                    tensor.lines(range(1), range(start, start + len(block.ids))),
                    kept.lines(range(1), range(len(block.ids))),
                )

    def _first(self, row: int) -> int:
        return 0

    def _columns(self, row: int) -> range:
        return range(int(self.lengths[row]))

    def _make_room(self, tokens: int) -> None:
        if tokens <= self._room:
            return
        old, kept = self._buffers, self._room
        wanted = max(int(HEADROOM * tokens), self._least_room)
        self._room = max(min(wanted, self._graph.max_sequence), tokens)
        self._bound.clear()
        self._buffers = self._allocate(self._most, self._room)
        used = range(int(self.lengths.max(initial=0)))
        rows = range(len(self.lengths))
        if used:
            before = self._shaped(old, kept)
            for new, earlier in zip(self.tensors, before, strict=True):
                self._memory.copy(new.lines(rows, used), earlier.lines(rows, used))

    def _tensors(self, rows: range) -> list[Tensor]:
        """The KV cache of some rows."""
        found = []
        for tensor in self._shaped(self._buffers, self._room):
            address = tensor.lines(rows, range(self._room)).address
            shape = (len(rows), *tensor.shape[1:])
            found.append(replace(tensor, address=address, shape=shape))
        return found

    def _shaped(self, buffers: Sequence[Tensor], room: int) -> list[Tensor]:
        return [
            replace(buffer, shape=(self._most, like.shape[1], room, like.shape[3]))
            for buffer, like in zip(buffers, self._like, strict=True)
        ]


class InPlaceReading(RowsReading[InPlaceRows]):
    """Prefill of new rows of an `InPlaceRows`."""

    def __init__(
        self,
        graph: Graph,
        prompts: Sequence[Sequence[int]],
        prefixes: Prefixes,
        batch: InPlaceRows | None,
    ) -> None:
        """Start with the prefixes of the prompts that are in the prefix cache."""
        # The buffers of newcomers hold nothing but their prompts.
        newcomers = InPlaceRows(graph, len(prompts), room=max(map(len, prompts)))
        super().__init__(prompts, prefixes, newcomers, batch)
        # The logits after each prompt, once they are known: float32[vocabulary].
        self._logits: list[NDArray[np.float32] | None] = [None] * len(prompts)
        newcomers.add(np.zeros(len(prompts), np.int64))
        for row, prompt in enumerate(self._prompts):
            newcomers.recall(row, prefixes.find(prompt))
        self.reused = int(newcomers.lengths.sum())

    @property
    def left(self) -> int:
        """See `Reading.left`."""
        return sum(map(len, self._prompts)) - int(self._newcomers.lengths.sum())

    def _read_piece(self, tokens: int) -> Logits | None:
        longest = max(map(len, self._prompts))
        if not self._newcomers.lengths.any() and len(self._prompts) * longest <= tokens:
            self._read_together(longest)
        else:
            self._read_one_by_one(tokens)
        if self.left:
            return None
        return np.stack([one for one in self._logits if one is not None])

    def _read_together(self, longest: int) -> None:
        ids = np.zeros((len(self._prompts), longest), np.int64)
        for row, prompt in enumerate(self._prompts):
            ids[row, : len(prompt)] = prompt
        counts = np.array(list(map(len, self._prompts)))
        self._logits = list(self._newcomers.read(range(len(ids)), ids, counts))

    def _read_one_by_one(self, tokens: int) -> None:
        budget = max(tokens, 1)
        for row, prompt in enumerate(self._prompts):
            start = int(self._newcomers.lengths[row])
            piece = np.array([prompt[start : start + budget]], np.int64)
            if not piece.size:
                continue
            count = np.array([piece.size])
            self._logits[row] = self._newcomers.read(range(row, row + 1), piece, count)[0]
            budget -= piece.size
            if not budget:
                return

    def abandon(self, newcomer: int) -> None:
        """See `Reading.abandon`."""
        super().abandon(newcomer)
        self._logits[newcomer] = self._logits[-1]
        self._logits.pop()
