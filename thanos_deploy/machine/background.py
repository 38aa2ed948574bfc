"""Reading and writing while something else is computed.

A GPU leaves the host idle, so files are read ahead and written in a thread. A processor computes
itself: there tensors are read and written when it is asked for, and nothing is held in memory
early. What only waits for a disk is done in a thread beside either.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor

K = TypeVar("K")
T = TypeVar("T")


def has_time(device: torch.device) -> bool:
    """The host has nothing else to do while this device computes."""
    return device.type == "cuda"


class Background:
    """One thread beside a GPU that computes, with a stream of its own to move tensors in.

    What it moves to the GPU is there when the future has its result.
    """

    def __init__(self, device: torch.device | None) -> None:
        """Begin with nothing to do.

        Args:
            device: where the computing is done; None for calls that move no tensors, which have a
                thread whatever computes.
        """
        beside_gpu = device is not None and has_time(device)
        self._pool = ThreadPoolExecutor(1) if beside_gpu or device is None else None
        # One for all calls: each stream has memory of its own.
        self._stream = torch.cuda.Stream(device) if beside_gpu else None

    @property
    def parallel(self) -> bool:
        """Calls run beside what is computed; if not, at once."""
        return self._pool is not None

    def start(self, call: Callable[[], T]) -> "Future[T]":
        """Have a call done after those that were started before."""
        if self._pool is not None:
            return self._pool.submit(self._done, call)
        future: Future[T] = Future()
        future.set_result(call())
        return future

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Keep the memory of tensors that calls have made until what uses them now is done."""
        if self._stream is not None:
            for tensor in tensors:
                if tensor.is_cuda:
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def close(self) -> None:
        """Wait for what was started, and end the thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _done(self, call: Callable[[], T]) -> T:
        if self._stream is None:
            return call()
        # What the call reads of the GPU may still be computed there.
        self._stream.wait_stream(torch.cuda.default_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            result = call()
        self._stream.synchronize()
        return result


class Ahead(Generic[K, T]):
    """Reads what is expected to be asked for next, one thing ahead."""

    def __init__(self, read: Callable[[K], T], background: Background) -> None:
        """Begin with nothing read.

        Args:
            read: reads a thing.
            background: where it is done.
        """
        self._read, self._background = read, background
        self._coming: tuple[K, Future[T]] | None = None

    def take(self, which: K, following: K | None) -> T:
        """A thing, which may have been read already.

        Args:
            which: the thing.
            following: what will probably be asked for after it; None for nothing.
        """
        coming, self._coming = self._coming, None
        taken = (
            coming[1].result()
            if coming is not None and coming[0] == which
            else self._background.start(lambda: self._read(which)).result()
        )
        if following is not None and self._background.parallel:
            self._coming = following, self._background.start(lambda: self._read(following))
        return taken

    def forget(self) -> None:
        """Wait for what is being read, and drop it."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming[1].result()
