"""Detect clients that have disconnected."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Return the result of some work, which is cancelled if the client disconnects.

    Args:
        request: the client's request; its body has been read.
        work: the work that the client waits for.

    Raises:
        ClientDisconnect: the client went away first.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def require_present(request: Request) -> None:
    """Refuse to begin work for a client that has disconnected already.

    Args:
        request: the client's request; its body has been read.

    Raises:
        ClientDisconnect: the client has disconnected.
    """
    if await request.is_disconnected():
        raise ClientDisconnect


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
