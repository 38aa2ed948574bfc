"""Continuous batching on ONNX Runtime: the rows of one batch, each with its own length.

The layout of the rows in memory depends on the graph: see `runtime.padded` for a neutral graph, and
`runtime.in_place` for a graph with ONNX Runtime's own attention.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError

import numpy as np

from runtime import in_place, padded
from runtime.engine import Ids, Logits, Reading, require_readable
from runtime.graph import Graph
from runtime.in_place import InPlaceRows
from runtime.padded import PaddedRows
from runtime.prefixes import Prefixes, covered


class OnnxRuntimeSlots:
    """Serving engine on ONNX Runtime; see `runtime.engine.ServingEngine`.

    Attributes:
        max_sequence: largest number of tokens of a row, prompt and answer together.
        vocabulary: number of token ids.
        slots: largest number of rows, including those whose prompts are still being read.
    """

    def __init__(self, graph: Graph, *, slots: int, prefix_bytes: int = 0) -> None:
        """Start without rows.

        Args:
            graph: the graph to run.
            slots: largest number of rows.
            prefix_bytes: size of the prefix cache in the device's memory, in bytes.
        """
        self.max_sequence = graph.max_sequence
        self.vocabulary = graph.vocabulary
        self.slots = slots
        self._graph = graph
        self._rows: InPlaceRows | PaddedRows
        if graph.in_place:
            self._rows, self._read_once = InPlaceRows(graph, slots), in_place.read_once
        else:
            self._rows, self._read_once = PaddedRows(graph, slots), padded.read_once
        self._prefixes = Prefixes(graph, prefix_bytes)

    def remembered(self, prompt: Sequence[int]) -> int:
        """See `SlotEngine.remembered`."""
        return covered(self._prefixes.find(prompt))

    def join(self, prompts: Sequence[Sequence[int]]) -> Reading:
        """See `SlotEngine.join`."""
        return self._rows.join(prompts, self._prefixes)

    def decode(self, ids: Ids) -> Logits:
        """See `SlotEngine.decode`."""
        return self._rows.decode(ids)

    def leave(self, row: int) -> None:
        """See `SlotEngine.leave`."""
        self._rows.remove(row)

    def clear(self) -> None:
        """See `SlotEngine.clear`."""
        self._rows.clear()

    def logits(
        self, ids: Ids, mask: Ids | None = None, given_up: Callable[[], bool] = lambda: False
    ) -> Logits:
        """See `ServingEngine.logits`."""
        require_readable(ids, self.vocabulary)
        self._graph.require_room(ids.shape[1])
        mask = np.ones_like(ids) if mask is None else mask
        return self._read_once(self._graph, ids, mask, given_up)

    def score(
        self, ids: Sequence[int], given_up: Callable[[], bool] = lambda: False
    ) -> Iterator[Logits]:
        """See `ServingEngine.score`."""
        for part in self._graph.read(np.array(ids)):
            if given_up():
                raise CancelledError
            yield part
