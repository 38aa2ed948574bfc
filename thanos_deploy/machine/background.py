"""Read and write tensors in a background thread while a device computes.

While a GPU computes, the host is idle, so a thread reads files ahead and writes them. On a CPU such
a thread would compete with the computation, so tensors are read and written at the time of the call
and no memory is held early. Work that only waits for a disk gets a thread with either device.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor

K = TypeVar("K")
T = TypeVar("T")


def host_is_idle(device: torch.device) -> bool:
    """Whether the host is idle while this device computes."""
    return device.type == "cuda"


class Background:
    """One thread that works while a GPU computes, with its own CUDA stream for copying tensors.

    Once a future has its result, all copies to the GPU that the call made are complete.
    """

    def __init__(self, device: torch.device | None) -> None:
        """Start without any work.

        Args:
            device: the device that computes. With a CPU there is no thread, and calls run at once.
                None for calls that move no tensors: they always run in a thread.
        """
        beside_gpu = device is not None and host_is_idle(device)
        self._pool = ThreadPoolExecutor(1) if beside_gpu or device is None else None
        # One stream for all calls, because PyTorch's allocator keeps a memory pool per stream.
        self._stream = torch.cuda.Stream(device) if beside_gpu else None

    @property
    def parallel(self) -> bool:
        """Whether calls run in the thread; if not, `start` runs them before it returns."""
        return self._pool is not None

    def start(self, call: Callable[[], T]) -> "Future[T]":
        """Run a call after all calls that were started before it."""
        if self._pool is not None:
            return self._pool.submit(self._done, call)
        future: Future[T] = Future()
        future.set_result(call())
        return future

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Keep the memory of tensors made by calls until the current stream has used them."""
        if self._stream is not None:
            for tensor in tensors:
                if tensor.is_cuda:
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def close(self) -> None:
        """Wait for the running call, cancel calls that have not begun, and end the thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _done(self, call: Callable[[], T]) -> T:
        if self._stream is None:
            return call()
        # The default stream may still be computing the tensors that the call reads.
        self._stream.wait_stream(torch.cuda.default_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            result = call()
        self._stream.synchronize()
        return result


class Ahead(Generic[K, T]):
    """A reader that reads one item ahead: the one expected to be asked for next."""

    def __init__(self, read: Callable[[K], T], background: Background) -> None:
        """Start with nothing read.

        Args:
            read: reads the item with a given key.
            background: runs the reads.
        """
        self._read, self._background = read, background
        self._coming: tuple[K, Future[T]] | None = None

    def take(self, which: K, following: K | None) -> T:
        """Return an item, which may have been read ahead, and start to read the next one.

        Args:
            which: the key of the item.
            following: the key that will probably be asked for next; None to read nothing ahead.
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
        """Wait for the item that is being read ahead, and drop it."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming[1].result()
