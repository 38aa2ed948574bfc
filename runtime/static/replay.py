"""Record a step once and replay it: as a CUDA graph, or by running the step itself."""

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch

Step = Callable[[], object]

# Runs of a step before it is recorded: kernels are compiled and tuned, and libraries allocate their
# workspaces.
_WARMUP = 2


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """The one stream of a device that records steps; libraries keep a workspace per stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Recording(Protocol):
    """A recorded step.

    The step uses tensors at fixed addresses, and has the same effect if it runs again.
    """

    def capture(self, step: Step) -> None:
        """Record a step; only `replay` is certain to run it, but this may run it, too."""

    def replay(self) -> None:
        """Run the recorded step on the present values of its tensors."""


class Replay:
    """A step on the current GPU, as one CUDA graph."""

    def __init__(self, pool: Any) -> None:
        """Make an empty recording.

        Args:
            pool: memory pool, from `torch.cuda.graph_pool_handle`; recordings that share a pool
                must never run at the same time.
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
    """A step that is simply run at each replay, where CUDA graphs cannot be used."""

    def __init__(self, pool: Any = None) -> None:
        """Make an empty recording; the pool is ignored."""
        self._step: Step | None = None

    def capture(self, step: Step) -> None:
        """See `Recording.capture`."""
        self._step = step

    def replay(self) -> None:
        """See `Recording.replay`."""
        assert self._step is not None
        self._step()
