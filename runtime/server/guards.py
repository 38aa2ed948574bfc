"""What a request passes before the routes see it.

    Recorded   gives it an id, and counts and logs how it ended
    Locked     lets nobody in without a key
    Bounded    reads its body, which may be neither too large nor too slow nor compressed

Each wraps an ASGI application. None of them waits for the response, so streams pass through.
"""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server.errors import CLIENT_GONE, RefusedError
from runtime.server.logs import REQUEST_ID, Record
from runtime.server.metrics import Metrics
from thanos_deploy.errors import UsageError

_log = logging.getLogger(__name__)

# What load balancers and kubelets ask, who have no key.
_OPEN = frozenset({"/health", "/v2/health/live", "/v2/health/ready"})


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
            # The pattern of the path: paths themselves are without number, and may hold anything.
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(route, str(status)).inc()
            _log.info(
                "request",
                extra={
                    "fields": {
                        "request_id": record.request_id,
                        "method": scope["method"],
                        "route": route,
                        "status": status,
                        "seconds": round(time.monotonic() - record.started, 6),
                        **record.fields,
                    }
                },
            )


class Locked:
    """Lets nobody in without one of the keys; where there is none, everybody."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["path"] in _OPEN or self._opens(scope):
            return await self._app(scope, receive, send)
        refused = RefusedError(
            401,
            "Incorrect API key provided; give one as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refused.response(scope)(scope, receive, send)

    def _opens(self, scope: Scope) -> bool:
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = _digest(key.strip() if kind.lower() == "bearer" else "")
        # All are compared, in constant time each: how long it takes tells nothing about any.
        return not self._digests or any(
            [hmac.compare_digest(given, digest) for digest in self._digests]
        )


class Bounded:
    """Reads the body before anything else happens."""

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
            return await refused.response(scope)(scope, receive, send)
        except RefusedError as refused:
            return await refused.response(scope)(scope, receive, send)
        if body is None:
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, again, send)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """All of it; None if the client goes away meanwhile."""
        if headers.get("content-encoding", "identity") != "identity":
            raise RefusedError(415, "compressed bodies are not read", code="unsupported_encoding")
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._most:
                raise RefusedError(
                    413, f"the body has more than {self._most} bytes", code="body_too_large"
                )
            if not message.get("more_body"):
                return bytes(body)


def read_keys(path: Path) -> list[str]:
    """The keys in a file, one a line; empty lines do not count.

    Raises:
        UsageError: it cannot be read, or has no key, or one that no header can carry.
    """
    try:
        keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: keys cannot be read ({error})", fix="give a text file with a key on each line"
        ) from error
    keys = [key for key in keys if key]
    if not keys or not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise UsageError(
            f"{path}: no key, or one with other characters than printable ASCII without spaces",
            fix="write a key on each line",
        )
    return keys


def _digest(key: str) -> bytes:
    """Of equal length for all keys, so that comparing them does not tell theirs."""
    return hashlib.sha256(key.encode("latin-1")).digest()
