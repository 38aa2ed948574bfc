"""A step that is recorded once and replayed: a CUDA graph, or on a CPU the step itself."""

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch

Step = Callable[[], object]

# Runs before a recording: kernels are compiled and tuned, libraries take their workspaces.
_WARMUP = 2


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """The one on which steps are recorded; libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Recording(Protocol):
    """A step on tensors that keep their places, which has the same effect if it runs again."""

    def capture(self, step: Step) -> None:
        """Record a step; it is run, too."""

    def replay(self) -> None:
        """Do again what was recorded, with what the tensors hold now."""


class Replay:
    """A step on the current GPU, as one CUDA graph."""

    def __init__(self, pool: Any) -> None:
        """Nothing is recorded yet.

        Args:
            pool: of `torch.cuda.graph_pool_handle`, shared by steps that never run at once.
        """
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def capture(self, step: Step) -> None:
        """See `Recording.capture`."""
        stream = _side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        # Other threads of a server may go on using the GPU.
        with torch.cuda.graph(
            self._graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            step()

    def replay(self) -> None:
        """See `Recording.replay`."""
        self._graph.replay()


class Eager:
    """A step that is run anew each time, for devices without CUDA graphs."""

    def __init__(self, pool: Any = None) -> None:
        """Nothing is recorded yet; there is no pool."""
        self._step: Step | None = None

    def capture(self, step: Step) -> None:
        """See `Recording.capture`."""
        self._step = step

    def replay(self) -> None:
        """See `Recording.replay`."""
        assert self._step is not None
        self._step()
