"""The thread that does the work of requests one by one."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from runtime.batching import Busy
from runtime.server.one_by_one import OneByOne


def test_a_full_queue_refuses_and_cancelled_work_makes_room() -> None:
    begun, end = threading.Event(), threading.Event()
    done: list[str] = []

    def first(_: Callable[[], bool]) -> None:
        begun.set()
        assert end.wait(10)
        done.append("first")

    async def requests() -> None:
        works = OneByOne("test", queue=1, full="the test is busy")
        running = asyncio.create_task(works.run(first))
        await asyncio.to_thread(begun.wait, 10)
        waiting = asyncio.create_task(works.run(lambda _: done.append("cancelled")))
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="the test is busy"):
            await works.run(lambda _: done.append("refused"))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        last = asyncio.create_task(works.run(lambda _: done.append("last")))
        await asyncio.sleep(0)
        end.set()
        await asyncio.gather(running, last)
        works.close(wait=True)

    asyncio.run(requests())
    assert done == ["first", "last"]


@pytest.mark.parametrize("why", ["nobody waits", "closing"])
def test_running_work_learns_that_nobody_waits_for_it(why: str) -> None:
    begun, ended = threading.Event(), threading.Event()

    def work(given_up: Callable[[], bool]) -> None:
        begun.set()
        while not given_up():
            assert not ended.wait(0.001)
        ended.set()

    async def request() -> None:
        works = OneByOne("test", queue=0, full="busy")
        running = asyncio.create_task(works.run(work))
        await asyncio.to_thread(begun.wait, 10)
        if why == "closing":
            works.close(wait=True)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await asyncio.to_thread(ended.wait, 10)
        works.close(wait=True)

    asyncio.run(request())
