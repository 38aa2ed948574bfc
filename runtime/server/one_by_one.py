"""A thread that does the work of requests one by one, and the bounded queue before it."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from runtime.batching import Busy

T = TypeVar("T")


class OneByOne:
    """Runs work on a thread of its own, one piece at a time; the others wait in a queue."""

    def __init__(self, name: str, *, queue: int, full: str) -> None:
        """Start with an empty queue.

        Args:
            name: the name of the thread.
            queue: largest number of pieces of work that wait.
            full: the message for whoever finds the queue full.
        """
        self._room = threading.Semaphore(queue + 1)
        self._full = full
        self._worker = ThreadPoolExecutor(1, name)
        self._closing = threading.Event()

    async def run(self, work: Callable[[Callable[[], bool]], T]) -> T:
        """Run `work` when its turn comes, and return its result.

        Args:
            work: called on the thread with a function that returns True once nobody waits for the
                result, so that long work can stop early.

        Raises:
            Busy: the queue is full.
        """
        if not self._room.acquire(blocking=False):
            raise Busy(self._full, fix="try again later")
        gone = threading.Event()
        future = self._worker.submit(work, lambda: gone.is_set() or self._closing.is_set())
        # Cancelled work leaves the queue at once, or may stop early if it is running.
        future.add_done_callback(lambda _: self._room.release())
        try:
            return await asyncio.wrap_future(future)
        finally:
            gone.set()

    def close(self, *, wait: bool) -> None:
        """Tell the running work that nobody waits for it, and drop the waiting work.

        Args:
            wait: return only when the running work has ended.
        """
        self._closing.set()
        self._worker.shutdown(wait=wait, cancel_futures=True)
