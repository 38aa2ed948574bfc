"""Middleware that every request passes before it reaches a route.

    Recorded   gives it an id, and counts and logs how it ended
    Bounded    reads its body, which may be neither too large nor too slow nor compressed
    Headed     answers HEAD wherever GET is answered

The middleware of `access` is between the first two. Each class wraps an ASGI application. None of
them waits for the whole response, so streams pass through.
"""

import asyncio
import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server.errors import CLIENT_GONE, RefusedError
from runtime.server.logs import REQUEST_ID, Record
from runtime.server.metrics import Metrics

_log = logging.getLogger(__name__)

# Longest path in the log, in characters.
_PATH = 200


class Recorded:
    """Gives every request an id, and counts and logs how it ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        record = Record.begin(scope)
        status = CLIENT_GONE

        async def identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, identified)
        finally:
            # The pattern of the path, because there is no limit to the number and content of paths.
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(route, str(status)).inc()
            _log.info(
                "request",
                extra={
                    "fields": {
                        "request_id": record.request_id,
                        "peer": (scope.get("client") or ("",))[0],
                        "method": scope["method"],
                        "route": route,
                        "path": scope["path"][:_PATH],
                        "status": status,
                        "seconds": round(time.monotonic() - record.started, 6),
                        **record.fields,
                    }
                },
            )


class Bounded:
    """Reads the whole body before it calls the application."""

    def __init__(self, app: ASGIApp, *, body_bytes: int, seconds: float) -> None:
        self._app = app
        self._most = body_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            async with asyncio.timeout(self._seconds):
                body = await self._body(Headers(scope=scope), receive)
        except TimeoutError:
            refused = RefusedError(408, "the body did not arrive in time", code="timeout")
            return await refused.closing().response(scope)(scope, receive, send)
        except RefusedError as refused:
            return await refused.closing().response(scope)(scope, receive, send)
        if body is None:
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, again, send)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return the whole body; None if the client disconnects meanwhile."""
        if headers.get("content-encoding", "identity") != "identity":
            raise RefusedError(
                415, "compressed bodies are not supported", code="unsupported_encoding"
            )
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._most:
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._most:
                raise self._too_large()
            if not message.get("more_body"):
                return bytes(body)

    def _too_large(self) -> RefusedError:
        return RefusedError(
            413, f"the body has more than {self._most} bytes", code="body_too_large"
        )


class Headed:
    """Lets routes answer HEAD as they answer GET; the HTTP server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope.get("method") != "HEAD":
            return await self._app(scope, receive, send)
        asked = {**scope, "method": "GET"}
        try:
            await self._app(asked, receive, send)
        finally:
            scope["route"] = asked.get("route")  # for `Recorded`
